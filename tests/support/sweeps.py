"""A sweep of six points over a small trained model, and what its end must look like."""

import time
from collections.abc import Mapping
from pathlib import Path

import pyarrow.parquet as pq

from tests.support.processes import Command
from tests.support.workshop import Workshop
from trainer.runs.sweeps import TABLE
from trainer.train.loop import fit

SAMPLERS, SCALES = ("ddim", "dpmpp_2m"), (1, 2, 4)
SWEPT = ["sampler=ddim,dpmpp_2m", "sampler.guidance_scale=1,2,4"]
POINTS = len(SAMPLERS) * len(SCALES)
OPTIONS = ["eval.features=[efficientnet_lite0]", "eval.clip_score=true"]
TRAINING = ["train.max_steps=3", "optim.lr=0.01"]


def train(workshop: Workshop, run: Path) -> list[str]:
    """Train a little; returns the words that make `trainer.evaluate` sweep over the result."""
    assert fit(workshop.config("emoji", *TRAINING, run=run)) == 0
    words = workshop.overrides("emoji", *TRAINING, *OPTIONS, run=run)
    words = [word for word in words if not word.startswith("sampler.")]
    return ["-m", *words, "sampler.steps=2", *SWEPT]


def start(words: list[str], environment: Mapping[str, str] | None = None) -> Command:
    return Command("trainer.evaluate", words, environment=environment)


def points(run: Path) -> list[Path]:
    return list((run / "sweeps" / "points").glob("*.json"))


def kill_half_way(process: Command, run: Path) -> int:
    """Returns how many points had been measured."""
    while len(points(run)) < 2:
        assert process.poll() is None, process.printed()
        time.sleep(0.02)
    process.kill()
    return len(points(run))


def table(run: Path) -> list[dict[str, object]]:
    (path,) = (run / "sweeps").glob(f"*/{TABLE}")
    return pq.read_table(path).to_pylist()


def undisturbed_table(words: list[str], run: Path, copy: Path) -> list[dict[str, object]]:
    """What the sweep gives when nothing stops it, in a run folder of its own."""
    copy.mkdir()
    (copy / "checkpoints").symlink_to(run / "checkpoints")
    process = start([word for word in words if "run.dir=" not in word] + [f"run.dir={copy}"])
    ended = process.finish(timeout_s=400)
    assert ended.code == 0, ended.said
    found = table(copy)
    assert len(found) == POINTS
    return found
