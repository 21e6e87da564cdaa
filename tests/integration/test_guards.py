"""A run into which something goes wrong: bad samples, a leap of the loss, slow and hung ranks."""

import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from data.config import DataConfig
from data.order.batches import Share
from data.streams.latents import LatentStream
from data.streams.stream import Batch
from tests.support.faults import rewrite_latents
from tests.support.processes import torchrun, walk
from tests.support.workshop import Workshop, losses
from trainer.checkpoints.reader import latest_checkpoint, open_checkpoint
from trainer.checkpoints.writer import CheckpointWriter
from trainer.cli import load_config
from trainer.runs.paths import step_of
from trainer.runtime.launcher import HANG_EXIT_CODE
from trainer.train.denoiser import DenoisingTask
from trainer.train.loop import fit
from trainer.train.task import Loss, Turn
from trainer.train.watchdog import Watchdog

STEPS = 12
TRAIN = [f"train.max_steps={STEPS}", "checkpoint.every=5", "data.lanes=8"]
BAD = 7
"""The number of the sample with a NaN."""


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def plan_of(workshop: Workshop, latents: Path) -> LatentStream:
    """The stream of one rank: what is trained at which step."""
    config = workshop.config("emoji", *TRAIN, f"data.latents={latents}")
    options: DataConfig = config.data
    batch = config.train.global_batch_size
    share = Share(seed=config.run.seed, global_batch=batch, micro_batch=batch)
    return LatentStream.open(options, share)


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
) -> None:
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


def test_a_slow_rank_is_named(four_ranks: dict[str, Path]) -> None:
    logged = [line for line in lines(four_ranks["zero1"] / "metrics.jsonl") if "train/loss" in line]
    assert len(logged) == STEPS
    # other programs slow some rank in some steps, and do not choose the same one in most of them
    assert statistics.mode(line["time/slowest_rank"] for line in logged) == 1
    for line in logged:
        slowest_s = line["time/slowest_rank_ratio"] * line["time/forward_s"]
        assert slowest_s > 0.199  # no load makes the delay of rank 1 shorter


def test_too_many_skipped_updates_in_a_row_end_the_run_and_name_the_samples(
    workshop: Workshop, poisoned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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
) -> None:
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
    assert "back to step 20, and on without data steps 28 to 35" in incident["what"]
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


def scale_losses(patch: pytest.MonkeyPatch, factor: Callable[[int], float]) -> None:
    """Multiply each loss of optimizer step `step` by factor(step)."""
    sound = DenoisingTask.turns

    def turns(task: DenoisingTask, step: int) -> list[Turn]:
        return [scaled(turn, step) for turn in sound(task, step)]

    def scaled(turn: Turn, step: int) -> Turn:
        def loss(model: nn.Module, batch: Batch) -> Loss:
            found = turn.loss(model, batch)
            return replace(found, mean=factor(step) * found.mean)

        return replace(turn, loss=loss)

    patch.setattr(DenoisingTask, "turns", turns)


SOON = ["train.max_steps=12", "checkpoint.every=2", "checkpoint.keep=9", "data.lanes=8"]
GUARDED_SOON = ["guards.spike_factor=20", "guards.spike_window=2"]


@pytest.mark.parametrize("rewinds", [0, 2])
def test_a_loss_that_stays_bad_ends_the_run_after_the_permitted_rewinds(
    rewinds: int,
    workshop: Workshop,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("trainer.train.guards.MIN_LOSSES", 4)
    scale_losses(monkeypatch, lambda step: 1000.0 if step >= 6 else 1.0)
    options = [*SOON, *GUARDED_SOON, f"guards.max_rewinds={rewinds}"]
    with pytest.raises(SystemExit) as ended:
        fit(workshop.config("emoji", *options, run=tmp_path))
    assert ended.value.code == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    again = f"step 7: another loss spike after guards.max_rewinds={rewinds} rewinds"
    assert line.startswith(f"error: {again}, listed in {tmp_path / 'incidents.jsonl'}: ")
    assert "lower optim.lr" in line
    incidents = lines(tmp_path / "incidents.jsonl") if rewinds else []
    assert [incident["step"] for incident in incidents] == [7] * rewinds
    assert all("back to step 4" in incident["what"] for incident in incidents)
    assert sorted(losses(tmp_path)) == [1, 2, 3, 4, 5, 6]
    newest = latest_checkpoint(tmp_path / "checkpoints")
    assert newest is not None
    assert newest.step == 6


def test_snapshots_of_the_steps_that_a_rewind_gives_up_are_removed(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.train.guards.MIN_LOSSES", 4)
    spike, folder = iter([1000.0]), tmp_path / "ema" / "snapshots"
    seen: list[tuple[int, list[int]]] = []

    def factor(step: int) -> float:
        seen.append((step, sorted(step_of(path) for path in folder.glob("step_*"))))
        return next(spike, 1.0) if step == 8 else 1.0

    scale_losses(monkeypatch, factor)
    widths = ["ema.sigma_rels=[0.05,0.1]", "ema.snapshot_every=1", "ema.snapshot_precision=fp32"]
    config = workshop.config("emoji", *SOON, *GUARDED_SOON, *widths, run=tmp_path)
    assert fit(config) == 0
    (incident,) = lines(tmp_path / "incidents.jsonl")
    assert (incident["step"], incident["what"].split(",")[0]) == (
        9,
        "loss spike: back to step 6",
    )
    after = seen[[step for step, _ in seen].index(8) + 1 :]
    assert next(kept for step, kept in after if step == 6) == [1, 2, 3, 4, 5, 6]

    snapshots = [open_checkpoint(path) for path in sorted(folder.iterdir())]
    assert [snapshot.step for snapshot in snapshots] == list(range(1, 13))
    assert [snapshot.snapshot.updates for snapshot in snapshots] == list(range(1, 13))
    for snapshot in snapshots[1::2]:  # those of the course that was kept, like its checkpoints
        checkpoint = open_checkpoint(tmp_path / "checkpoints" / snapshot.path.name)
        for name in snapshot.state.averages:
            expected, found = (one.average(name)[1] for one in (checkpoint, snapshot))
            assert expected.keys() == found.keys()
            assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_a_hung_rank_leaves_every_stack_and_ends_the_job(
    workshop: Workshop, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    plan = tmp_path / "runs.json"
    options = [*TRAIN, "watchdog.step_timeout_s=8", "train.micro_batch_size=4"]
    plan.write_text(json.dumps([workshop.overrides("emoji", *options, run=run)]))
    done = torchrun("tests.support.walk", plan, ranks=2, FAULT="hang 3")
    assert done.code != 0
    assert f"exitcode  : {HANG_EXIT_CODE}" in done.said
    assert "training at step 3 took over" in done.said
    (folder,) = (run / "stacks").iterdir()
    stacks = {path.stem: path.read_text() for path in folder.iterdir()}
    assert sorted(stacks) == ["rank_00000", "rank_00001"]
    assert all("training, step 3" in stack for stack in stacks.values())
    assert "hang_for_ever" in stacks["rank_00001"]
    assert "hang_for_ever" not in stacks["rank_00000"]
    assert sorted(losses(run)) == [1, 2, 3]


def test_the_watchdog_is_told_of_each_phase_before_it_begins(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    def note(event: str) -> None:
        if events[-1:] != [event]:  # a step has several losses, an evaluation several batches
            events.append(event)

    def noted(function: Callable[..., Any], event: Callable[..., str]) -> Callable[..., Any]:
        def noting(*args: Any, **options: Any) -> Any:
            note(event(*args))
            return function(*args, **options)

        return noting

    for owner, name, event in (
        (Watchdog, "step", lambda _, step: f"time of training {step}"),
        (Watchdog, "pause", lambda _, phase, step: f"time of {phase} {step}"),
        (DenoisingTask, "evaluate", lambda *_: "evaluation"),
        (CheckpointWriter, "save", lambda *_: "saving"),
        (DenoisingTask, "turns", lambda *_: "training"),
    ):
        monkeypatch.setattr(owner, name, noted(getattr(owner, name), event))
    options = ["train.max_steps=2", "checkpoint.every=1", "eval.every=1"]
    assert fit(workshop.config("emoji", *options, run=tmp_path)) == 0
    assert events[events.index("time of training 0") :] == [
        *("time of training 0", "training"),
        *("time of evaluation 1", "evaluation", "time of evaluation 1"),
        *("time of saving 1", "saving"),
        *("time of training 1", "training"),
        *("time of evaluation 2", "evaluation", "time of evaluation 2"),
        *("time of saving 2", "saving"),
        "time of the end 2",
    ]


def test_memory_that_does_not_suffice_is_found_before_the_first_step(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(DenoisingTask, "turns", full)
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
) -> None:
    def refused(*options: str) -> str:
        with pytest.raises(SystemExit):
            fit(workshop.config("emoji", *TRAIN, *options, run=tmp_path / "run"))
        error = capsys.readouterr().err
        (line,) = [line for line in error.splitlines() if line.startswith("error: preflight")]
        return line

    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 2**10}))
    line = refused()
    assert f"{tmp_path / 'run'} has 1,024 bytes free, but a checkpoint needs " in line
    monkeypatch.undo()

    latents = tmp_path / "latents"
    rewrite_latents(poisoned, latents, {})
    (latents / "000001.tar").unlink()
    (latents / "000000.tar").write_bytes(b"")
    line = refused(f"data.latents={latents}")
    assert "data.latents" in line
    assert "tar" in line


def test_a_disk_with_room_for_one_checkpoint_only_is_warned_of(
    workshop: Workshop,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["train.max_steps=2", "checkpoint.every=1", "checkpoint.keep=9"]
    assert fit(workshop.config("emoji", *options, run=tmp_path / "run")) == 0
    assert "warning" not in capsys.readouterr().err
    tensors = (tmp_path / "run" / "checkpoints" / "step_00000002").glob("*.safetensors")
    size = sum(path.stat().st_size for path in tensors)
    usage = type("Usage", (), {"free": 2 * size})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    assert fit(workshop.config("emoji", *options, run=tmp_path / "other")) == 0
    error = capsys.readouterr().err
    (warning,) = [line for line in error.splitlines() if line.startswith("warning: ")]
    assert f"has {2 * size:,} bytes free, but this run needs " in warning
    assert "more for the 2 checkpoints of checkpoint.keep=9" in warning


def test_what_is_tried_before_the_first_step_leaves_no_trace(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried, untried = tmp_path / "tried", tmp_path / "untried"
    assert fit(workshop.config("emoji", *TRAIN, run=tried)) == 0
    monkeypatch.setattr("trainer.train.loop.preflight", lambda *_: 0.0)
    assert fit(load_config(workshop.overrides("emoji", *TRAIN, run=untried))) == 0
    assert losses(tried) == losses(untried)
