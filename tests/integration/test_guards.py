"""A run into which something goes wrong: bad samples, a leap of the loss, slow and hung ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from data.config import DataConfig
from data.latent_stream import LatentStream
from tests.conftest import Workshop, losses
from tests.faults import rewrite_latents
from tests.integration.test_topology import ROOT, walk
from trainer.cli import load_config
from trainer.loop import fit
from trainer.tasks.diffusion import DiffusionTask
from trainer.watchdog import HANG_EXIT_CODE

STEPS = 12
TRAIN = [f"train.max_steps={STEPS}", "checkpoint.every=5", "data.lanes=8"]
BAD = 7
"""The number of the sample with a NaN."""


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def plan_of(workshop: Workshop, latents: Path) -> LatentStream:
    """The stream of one rank: what is trained at which step."""
    config = workshop.config("emoji", *TRAIN, f"data.latents={latents}")
    options: DataConfig = config.data
    batch = config.train.global_batch_size
    return LatentStream(
        str(latents),
        options,
        seed=config.run.seed,
        global_batch=batch,
        micro_batch=batch,
        rank=0,
        world=1,
    )


def with_nan(moments: np.ndarray) -> np.ndarray:
    moments[0, 0, 0, 0] = np.nan
    return moments


@pytest.fixture(scope="module")
def poisoned(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents with one bad sample."""
    folder = tmp_path_factory.mktemp("poisoned") / "latents"
    rewrite_latents(workshop.folder / "latents_4", folder, {BAD: with_nan})
    return folder


@pytest.fixture(scope="module")
def four_ranks(
    workshop: Workshop, poisoned: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Runs on four ranks, of which rank 1 is slow: on bad data at each stage, and on good data."""
    folder = tmp_path_factory.mktemp("four_ranks")
    runs = {f"zero{stage}": folder / f"zero{stage}" for stage in range(4)}
    common = [*TRAIN, "train.micro_batch_size=2"]
    overrides = [
        workshop.overrides(
            "emoji", *common, f"data.latents={poisoned}", f"deepspeed={name}", run=run
        )
        for name, run in runs.items()
    ]
    walk(folder, 4, overrides, FAULT="slow 0.2")
    return runs


@pytest.mark.parametrize("stage", range(4))
def test_a_nan_on_one_of_four_ranks_skips_the_update_on_all_and_names_the_sample(
    stage: int, four_ranks: dict[str, Path], workshop: Workshop, poisoned: Path
):
    run = four_ranks[f"zero{stage}"]
    stream = plan_of(workshop, poisoned)
    visits = [step + 1 for step in range(STEPS) if BAD in stream.plan.rank_slice(step, 0, 1)[1]]
    assert visits
    found = lines(run / "incidents.jsonl")
    assert [line["step"] for line in found] == visits
    for line in found:
        assert not line["loss_finite"]
        named = [(sample["shard"], sample["key"]) for sample in line["samples"]]
        assert ("000000.tar", f"{BAD:09d}") in named
        assert len(named) == 2  # a micro batch of one rank
        assert len({sample["rank"] for sample in line["samples"]}) == 1
    curve = losses(run)
    assert sorted(curve) == list(range(1, STEPS + 1))
    assert [step for step, loss in curve.items() if np.isnan(loss)] == visits
    counted = [line.get("optim/skipped_steps", 0) for line in lines(run / "metrics.jsonl")]
    assert max(counted) == len(visits)
    one = losses(four_ranks["zero0"])
    assert all(abs(one[step] - curve[step]) < 1e-5 for step in one if step not in visits)


def test_a_slow_rank_is_named(four_ranks: dict[str, Path]):
    for line in lines(four_ranks["zero1"] / "metrics.jsonl"):
        if "time/slowest_rank" in line:
            assert line["time/slowest_rank"] == 1
            assert line["time/slowest_rank_ratio"] > 1.25
            assert line["time/forward_s"] > 0.05  # a fourth of the delay


def test_too_many_skipped_updates_in_a_row_end_the_run_and_name_the_samples(
    workshop: Workshop, poisoned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    options = [*TRAIN, f"data.latents={poisoned}", "guards.max_consecutive_skips=0"]
    with pytest.raises(SystemExit) as ended:
        fit(workshop.config("emoji", *options, run=tmp_path))
    assert ended.value.code == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert "guards.max_consecutive_skips=0" in line
    assert f"{BAD:09d} in 000000.tar" in line


SPIKE_STEP = 35
LONG = ["optim.schedule=constant", "checkpoint.every=10", "checkpoint.keep=9", "data.lanes=8"]
GUARDED = ["guards.spike_factor=20", "guards.spike_window=8"]


def test_a_spike_is_rewound_and_its_window_skipped_and_the_run_resumes_the_same(
    workshop: Workshop, tmp_path: Path
):
    latents = tmp_path / "latents"
    source = workshop.folder / "latents_4"
    rewrite_latents(source, tmp_path / "sound", {}, repeats=12)
    step = plan_of(workshop, tmp_path / "sound").plan.rank_slice(SPIKE_STEP, 0, 1)
    scale = np.array([300, 1]).reshape(2, 1, 1, 1)  # of the mean, not of the log-variance
    bad = {int(number): lambda moments: moments * scale for number in step[1]}
    rewrite_latents(source, latents, bad, repeats=12)

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = [*LONG, *GUARDED, f"data.latents={latents}"]
    assert fit(workshop.config("emoji", *options, "train.max_steps=45", run=whole)) == 0
    (incident,) = lines(whole / "incidents.jsonl")
    assert incident["step"] == SPIKE_STEP + 1
    assert "back to step 20, and on without steps 28 to 35" in incident["what"]
    curve = losses(whole)
    assert sorted(curve) == list(range(1, 46))

    # up to the window all is as in a run without a guard, and the spike itself never was
    plain = tmp_path / "plain"
    options_plain = [*LONG, f"data.latents={latents}", "train.max_steps=36"]
    assert fit(workshop.config("emoji", *options_plain, run=plain)) == 0
    unguarded = losses(plain)
    assert all(curve[step] == unguarded[step] for step in range(1, 29))
    assert unguarded[SPIKE_STEP + 1] > 20 * max(curve.values())

    assert fit(workshop.config("emoji", *options, "train.max_steps=40", run=cut)) == 0
    assert fit(workshop.config("emoji", *options, "train.max_steps=45", run=cut)) == 0
    assert losses(cut) == curve

    two = tmp_path / "two"
    walk(tmp_path, 2, [workshop.overrides("emoji", *options, "train.max_steps=45", run=two)])
    (same,) = lines(two / "incidents.jsonl")
    assert (same["step"], same["what"]) == (incident["step"], incident["what"])
    both = losses(two)
    assert both.keys() == curve.keys()
    assert max(abs(both[step] - curve[step]) for step in curve) < 1e-5


def test_a_hung_rank_leaves_every_stack_and_ends_the_job(workshop: Workshop, tmp_path: Path):
    run = tmp_path / "run"
    plan = tmp_path / "runs.json"
    options = [*TRAIN, "watchdog.step_timeout_s=8", "train.micro_batch_size=4"]
    plan.write_text(json.dumps([workshop.overrides("emoji", *options, run=run)]))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "tests.integration.walk", str(plan)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "FAULT": "hang 3"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode != 0
    assert f"exitcode  : {HANG_EXIT_CODE}" in done.stdout
    assert "training at step 3 took over" in done.stdout
    (folder,) = (run / "stacks").iterdir()
    stacks = {path.stem: path.read_text() for path in folder.iterdir()}
    assert sorted(stacks) == ["rank_00000", "rank_00001"]
    assert all("training, step 3" in stack for stack in stacks.values())
    assert "hang_for_ever" in stacks["rank_00001"]
    assert "hang_for_ever" not in stacks["rank_00000"]
    assert sorted(losses(run)) == [1, 2, 3]


def test_memory_that_does_not_suffice_is_found_before_the_first_step(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(DiffusionTask, "losses", full)
    options = ["train.max_steps=2", "checkpoint.every=5"]
    with pytest.raises(ValueError, match=r"preflight: rank 0 on ") as caught:
        fit(workshop.config("emoji", *options, run=tmp_path))
    line = str(caught.value)
    assert "lower train.micro_batch_size=4 or set unet.gradient_checkpointing=true" in line
    assert "\n" not in line


def test_a_shard_that_is_gone_and_a_full_disk_are_found_before_the_first_step(
    workshop: Workshop,
    poisoned: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    def refused(*options: str) -> str:
        with pytest.raises(SystemExit):
            fit(workshop.config("emoji", *TRAIN, *options, run=tmp_path / "run"))
        error = capsys.readouterr().err
        (line,) = [line for line in error.splitlines() if line.startswith("error: preflight")]
        return line

    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 2**20}))
    line = refused()
    assert "has 0.00 GiB free, but the 3 checkpoints of checkpoint.keep=2" in line
    monkeypatch.undo()

    latents = tmp_path / "latents"
    rewrite_latents(poisoned, latents, {})
    (latents / "000001.tar").unlink()
    (latents / "000000.tar").write_bytes(b"")
    line = refused(f"data.latents={latents}")
    assert "data.latents" in line
    assert "tar" in line


def test_what_is_tried_before_the_first_step_leaves_no_trace(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tried, untried = tmp_path / "tried", tmp_path / "untried"
    assert fit(workshop.config("emoji", *TRAIN, run=tried)) == 0
    monkeypatch.setattr("trainer.loop.preflight", lambda *_: 0.0)
    assert fit(load_config(workshop.overrides("emoji", *TRAIN, run=untried))) == 0
    assert losses(tried) == losses(untried)
