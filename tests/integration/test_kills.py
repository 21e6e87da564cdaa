"""Killed at any moment, a run goes on from its newest committed checkpoint, with nothing lost."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.support.processes import Command

OVERRIDES = [
    "+experiment=emoji",
    "train.global_batch_size=8",
    "train.micro_batch_size=4",
    "data.lanes=2",
    "optim.warmup_steps=0",
]


@pytest.mark.parametrize(
    "kills", [pytest.param(6, id="short"), pytest.param(75, marks=pytest.mark.campaign)]
)
def test_kills_lose_nothing_that_was_committed(kills: int, tmp_path: Path) -> None:
    words = [tmp_path, str(kills), "0", *OVERRIDES]
    made = Command("tests.support.kill_ranks", words).finish(timeout_s=60 + 30 * kills)
    assert made.code == 0, made.said
    figures = json.loads(made.out.splitlines()[-1])
    print(figures)
    assert figures["kills"] == kills
    assert figures["single_ranks"] == kills // 3
    assert figures["inside_saves"] == -(-kills // 2)
    assert figures["steps"] >= kills // 2  # lives that are not killed in a save commit a step

    def lived(folder: Path) -> list[list[float]]:
        lines = (folder / "losses.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines if line.endswith("]")]

    true = {step: values for step, *values in lived(tmp_path / "undisturbed")}
    for step, *values in lived(tmp_path):
        if step in true:  # the last life may have been ahead of its saves
            assert values == true[step]
    last = f"step_{figures['steps'] + 1:08d}"
    for path in sorted((tmp_path / "checkpoints" / last).glob("*.safetensors")):
        mine, theirs = (
            load_file(folder / "checkpoints" / last / path.name)
            for folder in (tmp_path, tmp_path / "undisturbed")
        )
        assert mine.keys() == theirs.keys()
        assert all((mine[key] == theirs[key]).all() for key in mine)
