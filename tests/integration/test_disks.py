"""Disks that are full, or away for a while, and trainings that go on."""

import json
import resource
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import Command, start
from tests.support.workshop import Workshop, losses
from trainer.runs import files as run_files
from trainer.runtime.launcher import UNWRITTEN_EXIT_CODE
from trainer.train.loop import fit

SEED = 0
CAMPAIGN = [
    "checkpoint.every=5",
    "checkpoint.keep=3",
    "eval.every=20",
    "train.global_batch_size=4",
    "data.flip=false",
    "optim.schedule=constant",  # the lives do not know the last step
]


def lines(path: Path) -> list[dict[str, Any]]:
    content = path.read_bytes()
    assert content.endswith(b"\n")
    return [json.loads(line) for line in content.splitlines()]


@pytest.mark.parametrize(
    "faults", [pytest.param(12, id="short"), pytest.param(300, marks=pytest.mark.campaign)]
)
def test_no_fault_of_a_disk_changes_or_loses_a_number(
    faults: int, workshop: Workshop, tmp_path: Path
) -> None:
    words = [tmp_path, str(faults), str(SEED), *workshop.overrides("emoji", *CAMPAIGN)]
    made = Command("tests.support.disk_faults", words).finish(timeout_s=300 + 10 * faults)
    assert made.code == 0, made.said
    figures = json.loads(made.out.splitlines()[-1])
    print(figures)
    assert sum(figures["faults"].values()) >= faults
    run, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    found, true = lines(run / "metrics.jsonl"), lines(undisturbed / "metrics.jsonl")
    kinds = [Counter((line["step"], "train/loss" in line) for line in own) for own in (found, true)]
    assert kinds[0] == kinds[1]
    assert set(kinds[0].values()) == {1}
    assert losses(run) == losses(undisturbed)
    assert sorted(losses(run)) == list(range(1, figures["steps"] + 1))
    history = [line["what"] for line in lines(run / "history.jsonl")]
    assert sum("skipped, going on" in event for event in history) >= figures["skipped"]
    assert any("metrics.jsonl is written, after" in event for event in history)


def test_a_training_goes_on_past_a_full_disk_and_loses_no_line(
    workshop: Workshop, tmp_path: Path
) -> None:
    endless = ["train.max_steps=100000", "checkpoint.every=100000"]
    process = start(workshop.overrides("emoji", *endless, run=tmp_path))
    log = tmp_path / "metrics.jsonl"
    while not log.exists() or len(losses(tmp_path)) < 3:
        assert process.poll() is None, process.printed()
        time.sleep(0.005)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, hard))
    time.sleep(1.0)
    size = log.stat().st_size
    time.sleep(0.3)
    assert log.stat().st_size == size
    assert process.poll() is None
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (hard, hard))
    process.send_signal(signal.SIGTERM)
    ended = process.finish()
    assert ended.code == 85, ended.said
    steps = [line["step"] for line in lines(log)]
    assert steps == list(range(1, len(steps) + 1))
    event = lines(tmp_path / "history.jsonl")[-1]["what"]
    assert event.startswith(f"{log} is written, after")


def test_records_that_never_reach_the_disk_are_told_by_the_exit_code_and_not_lost(
    workshop: Workshop,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(path: Path, lines: list[str]) -> None:
        if path.name == "metrics.jsonl" and lines:
            raise OSError(28, "No space left on device")
        append(path, lines)

    append = run_files.append_lines
    monkeypatch.setattr(run_files, "append_lines", full)
    config = workshop.config("emoji", "train.max_steps=4", "checkpoint.patience_s=0", run=tmp_path)
    assert fit(config) == UNWRITTEN_EXIT_CODE
    assert not (tmp_path / "metrics.jsonl").exists()
    error = capsys.readouterr().err
    assert f"error: not written: {tmp_path / 'metrics.jsonl'}; " in error
    monkeypatch.undo()
    assert fit(config) == 0
    assert sorted(losses(tmp_path)) == [1, 2, 3, 4]
