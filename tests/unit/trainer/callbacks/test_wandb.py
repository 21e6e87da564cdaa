"""The callback of W&B, with the real mirror, offline."""

import time
from pathlib import Path

import psutil
import pytest

from trainer.callbacks.callback import Start
from trainer.callbacks.wandb import Wandb
from trainer.cli import load_config
from trainer.runs.files import RunFiles
from trainer.runs.record import public_config


def mirrors() -> list[psutil.Process]:
    living = (one for one in psutil.Process().children() if one.status() != psutil.STATUS_ZOMBIE)
    return [one for one in living if "trainer.callbacks.wandb_mirror" in one.cmdline()]


def sent(run: Path, word: bytes) -> bool:
    return any(word in file.read_bytes() for file in run.glob("wandb/offline-run-*/run-*.wandb"))


def test_a_mirror_that_is_killed_starts_again_and_sends_what_comes_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["+experiment=emoji", f"run.dir={tmp_path}", "logger.wandb.mode=offline"]
    config = load_config(words)
    files = RunFiles(tmp_path)
    wandb = Wandb(config.logger.wandb, Start(config, public_config(config), 0, "one", files))
    (first,) = mirrors()
    wandb.metrics(1, {"train/early": 1.0})
    first.kill()
    deadline = time.monotonic() + 60
    step = 1
    while [one.pid for one in mirrors() if one.pid != first.pid] == []:
        assert time.monotonic() < deadline
        step += 1
        wandb.metrics(step, {"train/meanwhile": 1.0})  # the pipe tells of the end at a write
        time.sleep(0.05)
    wandb.metrics(step + 1, {"train/late": 1.0})
    wandb.close()
    files.close(0.0)
    printed = capsys.readouterr().err
    assert "W&B ended with exit code -9 and starts again" in printed
    assert mirrors() == []
    assert sent(tmp_path, b"train/meanwhile")
    assert sent(tmp_path, b"train/late")
