"""Saved at any ZeRO stage on any number of ranks, gone on from at any other."""

import json
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.matrix_ranks import LAST, PAIRS, SAVED, label
from tests.support.processes import run_command
from tests.support.workshop import Workshop

NOISE = 1e-5
"""Of losses and of tensors, as shares of their largest values."""


@pytest.fixture(scope="module")
def results(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("matrix")
    overrides = workshop.overrides(
        "emoji",
        "train.global_batch_size=8",
        "train.micro_batch_size=2",
        "train.max_steps=100",
        "optim.lr=1e-2",
        "ema.decays=[0.3,0.9]",
        "ema.sigma_rels=[0.1]",
    )
    made = run_command("tests.support.matrix_ranks", folder, *overrides)
    assert made.code == 0, made.said
    return folder


def differences(folder: Path, one: str, other: str) -> tuple[float, float]:
    """Of losses and of tensors: weights, moments and averages."""
    runs = [json.loads((folder / f"{name}.json").read_text()) for name in (one, other)]
    tensors = [load_file(folder / f"{name}.st") for name in (one, other)]
    assert len(runs[0]) == len(runs[1]) == LAST - SAVED
    assert [step["ids"] for step in runs[0]] == [step["ids"] for step in runs[1]]
    assert tensors[0].keys() == tensors[1].keys()
    losses = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(*runs, strict=True))
    return losses, max(change(tensors[1][key], value) for key, value in tensors[0].items())


def change(new: torch.Tensor, old: torch.Tensor) -> float:
    return ((new - old).abs().max() / old.abs().max()).item()


@pytest.mark.parametrize(("source", "target"), list(product(PAIRS, PAIRS)))
def test_every_pair_goes_on_as_if_it_had_not_stopped(
    source: tuple[int, int], target: tuple[int, int], results: Path
) -> None:
    straight, resumed = f"{label(*source)}-straight", f"{label(*source)}-{label(*target)}"
    losses, tensors = differences(results, straight, resumed)
    if source == target:
        assert (losses, tensors) == (0, 0)
    else:
        assert losses < NOISE
        assert tensors < NOISE


def test_training_moves_far_more_than_the_noise(results: Path) -> None:
    straight = json.loads((results / f"{label(*PAIRS[0])}-straight.json").read_text())
    assert len({tuple(step["ids"]) for step in straight}) == LAST - SAVED
    last = load_file(results / f"{label(*PAIRS[0])}-straight.st")
    saved = load_file(
        results / label(*PAIRS[0]) / f"step_{SAVED:08d}" / "rank_00000_000.safetensors"
    )
    assert min(change(last[key], saved[key]) for key in last) > 100 * NOISE
    assert torch.equal(saved["buffer/shift"], torch.full((3,), 0.25))
