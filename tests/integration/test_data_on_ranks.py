"""What each of several real processes reads: the same samples, whatever their number."""

import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import run_command
from tests.support.workshop import Workshop

OPTIONS = ["train.global_batch_size=12", "train.micro_batch_size=1", "data.flip=false"]
STEPS = 8


def read(workshop: Workshop, folder: Path, world: int, first: int = 0) -> list[list[Any]]:
    """The samples of each step, in the order of the global batch."""
    folder.mkdir()
    words = [folder, str(first), str(STEPS), *workshop.overrides("emoji", *OPTIONS)]
    ended = run_command("tests.support.read_samples", *words, ranks=world)
    assert ended.code == 0, ended.said
    ranks = [json.loads((folder / f"{world}_{rank}.json").read_text()) for rank in range(world)]
    return [list(chain(*step)) for step in zip(*ranks, strict=True)]


@pytest.fixture(scope="module")
def alone(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> list[list[Any]]:
    return read(workshop, tmp_path_factory.mktemp("alone") / "one", world=1)


def test_an_epoch_holds_each_sample_at_most_once(alone: list[list[Any]]) -> None:
    samples = [tuple(sample) for step in alone for sample in step]
    assert len(set(samples)) == len(samples) == STEPS * 12
    assert {epoch for epoch, _, _ in samples} >= {0, 1}


@pytest.mark.parametrize("world", [2, 3, 4])
def test_several_processes_read_what_one_reads(
    world: int, workshop: Workshop, alone: list[list[Any]], tmp_path: Path
) -> None:
    assert read(workshop, tmp_path / "ranks", world) == alone


def test_another_number_of_processes_goes_on_in_the_middle(
    workshop: Workshop, alone: list[list[Any]], tmp_path: Path
) -> None:
    assert read(workshop, tmp_path / "ranks", world=3, first=5) == alone[5:]
