import errno
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typing_extensions import override

from trainer.callbacks import Callbacks
from trainer.callbacks.callback import Callback
from trainer.callbacks.console import Console
from trainer.callbacks.jsonl import JsonLines
from trainer.runs.evaluations import Values
from trainer.runs.outages import Outages


def test_a_resumed_log_has_every_step_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = JsonLines(path, 0)
    for step in (1, 2, 3):
        log.metrics(step, {"train/loss": float(step)})
    log.close()
    with path.open("a") as file:
        file.write('{"step": 4, "train/lo')  # a kill in the middle of a line
    log = JsonLines(path, 2)
    log.metrics(3, {"train/loss": 30.0})
    log.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["train/loss"]) for line in lines] == [(1, 1), (2, 2), (3, 30)]


def test_an_evaluation_that_is_made_again_is_logged_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = [
        {"step": 4, "train/loss": 1.0},
        {"step": 4, "eval/fd": 2.0, "eval/protocol": "a"},
    ]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in first))
    log = JsonLines(path, 4, evaluated=False)
    log.metrics(4, {"eval/fd": 3.0, "eval/protocol": "a"})
    log.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line.get("eval/fd") for line in lines] == [None, 3.0]


RECORDS = st.builds(
    lambda step, name, value: json.dumps({"step": step, name: value}).encode(),
    st.integers(0, 9),
    st.sampled_from(["train/loss", "eval/fd", "eval/protocol"]),
    st.sampled_from([1.0, 2.0, "a", "b"]),
)
DAMAGED = st.binary(max_size=12) | RECORDS.map(lambda line: line[:-3]) | st.just(b"\xff{}")


@settings(deadline=None, max_examples=200)
@given(st.lists(RECORDS | DAMAGED, max_size=12), DAMAGED, st.integers(0, 9))
def test_a_resumed_log_is_whole_whatever_the_crash_left(
    lines: list[bytes], torn: bytes, step: int
) -> None:
    def identity(line: bytes) -> tuple[object, ...]:
        values = json.loads(line)
        (text,) = (value for name, value in values.items() if name != "step")
        return values["step"], *values, text if isinstance(text, str) else ""

    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "metrics.jsonl")
        path.write_bytes(b"\n".join([*lines, torn]))
        log = JsonLines(path, step)
        log.metrics(step + 1, {"train/loss": 0.5})
        log.close()
        found = path.read_bytes()
        assert found.endswith(b"\n")
        written = found.splitlines()
        assert json.loads(written.pop()) == {"step": step + 1, "train/loss": 0.5}
        steps = [json.loads(line)["step"] for line in written]
        assert max(steps, default=0) <= step
        identities = [identity(line) for line in written]
        assert len(set(identities)) == len(identities)
        good = [line for line in lines if line.startswith(b'{"step": ') and line.endswith(b"}")]
        earlier = {identity(line): line for line in good if json.loads(line)["step"] <= step}
        assert dict(zip(identities, written, strict=True)) == earlier


def test_a_callback_on_a_disk_that_fails_does_not_end_the_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Full(Callback):
        @override
        def metrics(self, step: int, values: Values) -> None:
            if step < 3:
                raise OSError(errno.ENOSPC, "No space left on device")

    log = JsonLines(tmp_path / "metrics.jsonl", 0)
    events: list[str] = []
    outages = Outages(lambda event, **details: events.append(event))
    callbacks = Callbacks([Full(), log], tmp_path, outages)
    for step in range(4):
        callbacks.metrics(step, {"train/loss": 1.0})
    callbacks.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4
    assert "No space left on device; " in capsys.readouterr().err
    (event,) = events
    assert "after 3 failed attempts" in event


def test_without_a_terminal_there_is_a_line_an_interval(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(0, 100)
    values = {"train/loss": 0.5, "optim/lr": 1e-3, "throughput/images_per_s": 12.0}
    console.metrics(10, {**values, "time/step_s": 1.5})
    console.metrics(10, {"eval/fd_efficientnet_lite0": 101.25})
    console.close()
    first, second = capsys.readouterr().out.splitlines()
    assert first.split() == [
        "step",
        "10/100",
        "loss",
        "0.5000",
        "lr",
        "1.0e-03",
        "images/s",
        "12.0",
        "02:15",
        "left",
    ]
    assert second.split() == ["step", "10/100", "fd_efficientnet_lite0", "101.2"]
