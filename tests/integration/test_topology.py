"""One loss curve, whatever ranks, micro batches, ZeRO stage and offload it is computed with."""

import json
from itertools import product
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.processes import walk
from tests.support.workshop import Workshop, losses
from trainer.cli import load_config
from trainer.train.loop import fit

SHORT, LONG = 12, 50
"""Steps of the test and of the campaign."""
GLOBAL_BATCH = 8
SAME = 1e-5

Choice = tuple[int, int, str]
"""Ranks, micro batch, file of conf/deepspeed."""
CHOICES: list[Choice] = [
    (1, 8, "zero0"),
    (1, 1, "zero2_offload"),
    (2, 4, "zero1"),
    (2, 1, "zero3"),
    (2, 2, "zero1_offload"),
    (4, 2, "zero2"),
    (4, 1, "zero0"),
    (4, 2, "zero3_offload"),
]
FILES = sorted(path.stem for path in (ROOT / "conf" / "deepspeed").glob("*.yaml"))
ALL = [
    (ranks, micro, file)
    for ranks, micro, file in product((1, 2, 4), (1, 2, 4, 8), FILES)
    if ranks * micro <= GLOBAL_BATCH
]


def largest_difference(
    workshop: Workshop, folder: Path, choices: list[Choice], steps: int
) -> dict[str, float]:
    """Train with each choice; by how much its curve leaves that of the first."""
    runs: dict[Choice, Path] = {choice: folder / "{}_{}_{}".format(*choice) for choice in choices}
    for ranks in sorted({choice[0] for choice in choices}):
        overrides = [
            workshop.overrides(
                "emoji",
                f"train.max_steps={steps}",
                f"train.micro_batch_size={choice[1]}",
                f"deepspeed={choice[2]}",
                "data.lanes=8",
                "checkpoint.every=1000",
                run=run,
            )
            for choice, run in runs.items()
            if choice[0] == ranks
        ]
        if ranks == 1:
            for one in overrides:
                assert fit(load_config(one)) == 0
        else:
            walk(folder, ranks, overrides)
    curves = {choice: losses(run) for choice, run in runs.items()}
    first = curves[choices[0]]
    assert sorted(first) == list(range(1, steps + 1))
    assert max(first.values()) - min(first.values()) > 0.1
    return {
        "{} ranks, micro batch {}, {}".format(*choice): max(
            abs(curve[step] - first[step]) for step in first
        )
        for choice, curve in curves.items()
    }


def test_the_loss_curve_knows_nothing_of_ranks_micro_batches_and_stages(
    workshop: Workshop, tmp_path: Path
) -> None:
    found = largest_difference(workshop, tmp_path, CHOICES, SHORT)
    assert max(found.values()) < SAME, found


@pytest.mark.campaign
def test_every_choice_of_ranks_micro_batch_and_stage(workshop: Workshop, tmp_path: Path) -> None:
    found = largest_difference(workshop, tmp_path, [CHOICES[0], *ALL], LONG)
    print(json.dumps({"choices": len(found), "largest": max(found.values())}))
    assert max(found.values()) < SAME, found
