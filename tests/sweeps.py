"""A sweep of twelve points over a small trained model, and what its end must look like."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import torch

from tests.conftest import Workshop
from tests.integration.test_training import ROOT, kill
from trainer.cli import load_config
from trainer.config import Config
from trainer.loop import fit
from trainer.sweep import measure_point, summarise
from trainer.sweep_table import TABLE

SAMPLERS, STEPS, SCALES = ("ddim", "dpmpp_2m"), (1, 2, 3), (1, 4)
SWEPT = ["sampler=ddim,dpmpp_2m", "sampler.steps=1,2,3", "sampler.guidance_scale=1,4"]
OPTIONS = ["eval.features=[efficientnet_lite0]", "eval.clip_score=true"]
TRAINING = ["train.max_steps=3", "optim.lr=0.01"]


def train(workshop: Workshop, run: Path) -> list[str]:
    """Train a little; returns the words of the command that sweeps over the result."""
    assert fit(workshop.config("emoji", *TRAINING, run=run)) == 0
    words = workshop.overrides("emoji", *TRAINING, *OPTIONS, run=run)
    words = [word for word in words if not word.startswith("sampler.")]
    return [sys.executable, "-m", "trainer.evaluate", "-m", *words, *SWEPT]


def start(command: list[str], environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**(environment or os.environ), "OMP_NUM_THREADS": str(torch.get_num_threads())},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def points(run: Path) -> list[Path]:
    return list((run / "sweeps" / "points").glob("*.json"))


def kill_half_way(process: subprocess.Popen[str], run: Path) -> int:
    """Returns how many points had been measured."""
    while len(points(run)) < 4:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    kill(process)
    return len(points(run))


def table(run: Path) -> list[dict[str, object]]:
    (path,) = (run / "sweeps").glob(f"*/{TABLE}")
    return pq.read_table(path).to_pylist()


def expected_table(workshop: Workshop, run: Path, copy: Path) -> list[dict[str, object]]:
    """What measuring every point in this process gives, in a run folder of its own."""
    (copy / "checkpoints").parent.mkdir(parents=True, exist_ok=True)
    (copy / "checkpoints").symlink_to(run / "checkpoints")
    combinations: list[tuple[dict[str, str], Config]] = []
    for sampler in SAMPLERS:
        for steps in STEPS:
            for scale in SCALES:
                options = {
                    "sampler": sampler,
                    "sampler.steps": str(steps),
                    "sampler.guidance_scale": str(scale),
                }
                words = [f"{name}={value}" for name, value in options.items()]
                config = load_config(
                    workshop.overrides("emoji", *TRAINING, *OPTIONS, *words, run=copy)
                )
                measure_point(config)
                combinations.append((options, config))
    assert summarise(combinations) == 0
    return table(copy)


def assert_same_tables(found: list[dict[str, object]], expected: list[dict[str, object]]) -> None:
    assert len(found) == len(expected) == len(SAMPLERS) * len(STEPS) * len(SCALES)
    for row, other in zip(found, expected, strict=True):
        assert row.keys() == other.keys()
        for name, value in row.items():
            reference = other[name]
            if isinstance(value, float) and isinstance(reference, float):
                assert abs(value - reference) <= 1e-6 * max(1.0, abs(reference)), (name, row)
            else:
                assert value == reference, (name, row)
