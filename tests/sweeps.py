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
from trainer.loop import fit
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


def undisturbed_table(command: list[str], run: Path, copy: Path) -> list[dict[str, object]]:
    """What the command gives when nothing stops it, in a run folder of its own."""
    copy.mkdir()
    (copy / "checkpoints").symlink_to(run / "checkpoints")
    process = start([word for word in command if "run.dir=" not in word] + [f"run.dir={copy}"])
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    found = table(copy)
    assert len(found) == len(SAMPLERS) * len(STEPS) * len(SCALES)
    return found
