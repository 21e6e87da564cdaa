import json
from pathlib import Path

import pytest

from trainer.callbacks.console import Console
from trainer.callbacks.jsonl import JsonLines


def test_a_resumed_log_has_every_step_once(tmp_path: Path):
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


def test_without_a_terminal_there_is_a_line_an_interval(capsys: pytest.CaptureFixture[str]):
    console = Console(0, 100)
    console.metrics(10, {"train/loss": 0.5, "optim/lr": 1e-3, "throughput/images_per_s": 12.0})
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
    ]
    assert second.split() == ["step", "10/100", "fd_efficientnet_lite0", "101.2"]
