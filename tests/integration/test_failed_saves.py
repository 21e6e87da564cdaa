"""A run whose saves fail, or are disturbed by more signals, by the loop's own rules."""

import errno
import json
import signal
import time
from collections.abc import Container
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import start
from tests.support.workshop import Workshop, losses
from trainer.checkpoints import tensors as tensor_files
from trainer.checkpoints.reader import latest_checkpoint
from trainer.train.loop import fit

TRAIN = ["train.max_steps=8", "checkpoint.every=2", "checkpoint.keep=9", "data.flip=false"]


def fill_disk(monkeypatch: pytest.MonkeyPatch, failing: Container[int]) -> None:
    """Attempts to save number 1, 2, … that are in `failing` find no space."""
    real, saves = tensor_files.save_file, 0

    def save_file(tensors: dict[str, Any], path: Path) -> None:
        nonlocal saves
        saves += 1
        if saves in failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(tensor_files, "save_file", save_file)


def saved(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (run / "checkpoints").iterdir())


def test_a_run_goes_on_past_a_full_disk(
    workshop: Workshop,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fill_disk(monkeypatch, range(2, 5))
    assert fit(workshop.config("emoji", *TRAIN, run=tmp_path)) == 0
    assert {2, 8} <= set(saved(tmp_path))
    assert sorted(losses(tmp_path)) == list(range(1, 9))
    folder, error = tmp_path / "checkpoints", capsys.readouterr().err
    assert error.count("warning: ") == 1  # in a minute
    assert f"warning: {folder} cannot be written: No space left on device; " in error
    event = json.loads((tmp_path / "history.jsonl").read_text().splitlines()[-1])
    assert event["what"].startswith(f"{folder} is written, after ")
    assert event["attempts"] == 3


def test_or_stops_where_it_is_told_to(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_disk(monkeypatch, range(2, 1000))
    options = [*TRAIN, "checkpoint.stop_on_failure=true", "checkpoint.patience_s=0"]
    with pytest.raises(OSError, match=r"no checkpoint at step \d: .*No space left.*make room"):
        fit(workshop.config("emoji", *options, run=tmp_path))
    assert saved(tmp_path) == [2]
    assert max(losses(tmp_path)) < 8


def test_a_last_save_that_fails_is_an_error(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_disk(monkeypatch, range(4, 1000))
    with pytest.raises(OSError, match=r"no checkpoint at step 8: .*make room and start again"):
        fit(workshop.config("emoji", *TRAIN, "checkpoint.patience_s=0", run=tmp_path))
    assert saved(tmp_path) == [2, 4, 6]


def test_a_last_save_waits_for_its_disk(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_disk(monkeypatch, range(4, 7))
    assert fit(workshop.config("emoji", *TRAIN, run=tmp_path)) == 0
    assert saved(tmp_path) == [2, 4, 6, 8]


def test_more_signals_during_the_last_save_change_nothing(
    workshop: Workshop, tmp_path: Path
) -> None:
    endless = ["train.max_steps=100000", "checkpoint.every=100000", "checkpoint.keep=9"]
    process = start(workshop.overrides("emoji", *endless, run=tmp_path))
    while not losses(tmp_path):
        assert process.poll() is None, process.printed()
        time.sleep(0.005)
    while process.poll() is None:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            process.send_signal(number)
        time.sleep(0.002)
        if any((tmp_path / "checkpoints").glob("*step_*")):
            break
    for _ in range(5):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.002)
    ended = process.finish()
    assert ended.code == 85, ended.said
    found = latest_checkpoint(tmp_path / "checkpoints")
    assert found is not None
    assert found.step == max(losses(tmp_path))
