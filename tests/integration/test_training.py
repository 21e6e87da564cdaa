"""A run in real processes: stopped in every way, on several ranks, for every experiment."""

import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import Workshop, draw_pictures, losses
from trainer.checkpoint import latest_checkpoint
from trainer.latents import precompute
from trainer.loop import fit
from trainer.packing import pack

ROOT = Path(__file__).parents[2]
STEPS = 12
TRAIN = ["train.max_steps=12", "checkpoint.every=5", "data.flip=false"]


def start(
    overrides: list[str], ranks: int = 1, before: Sequence[str] = ()
) -> subprocess.Popen[str]:
    launcher = [*before, sys.executable, "-m"]
    if ranks > 1:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    return subprocess.Popen(
        [*launcher, "trainer", *overrides],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def kill(process: subprocess.Popen[str]) -> None:
    """End every rank at once: torchrun's workers would outlive it."""
    for one in [*psutil.Process(process.pid).children(recursive=True), process]:
        one.kill()
    process.communicate(timeout=60)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def tensors(run: Path) -> dict[str, torch.Tensor]:
    path = run / "checkpoints" / f"step_{STEPS:08d}" / "rank_00000_000.safetensors"
    return load_file(path)


def assert_same(run: Path, other: Path) -> None:
    assert losses(run) == losses(other)
    mine, theirs = tensors(run), tensors(other)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.fixture(scope="module")
def undisturbed(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed")
    code, output = finish(start(workshop.overrides("emoji", *TRAIN, run=run)))
    assert code == 0, output
    assert sorted(losses(run)) == list(range(1, STEPS + 1))
    return run


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_run_that_is_asked_to_stop_saves_and_goes_on_bit_equal(
    number: signal.Signals, workshop: Workshop, undisturbed: Path, tmp_path: Path
):
    # intervals of 3 steps are cut in two by a stop at any other step
    overrides = workshop.overrides("emoji", *TRAIN, run=tmp_path)
    process = start(overrides)
    while not (tmp_path / "metrics.jsonl").exists() or len(losses(tmp_path)) < 2:
        assert process.poll() is None, finish(process)
        time.sleep(0.005)
    process.send_signal(number)
    code, output = finish(process)
    assert code == 85, output
    stopped = latest_checkpoint(tmp_path / "checkpoints")
    assert stopped is not None
    assert 2 <= stopped.step < STEPS
    code, output = finish(start(overrides))
    assert code == 0, output
    assert f"going on from {stopped.path}" in output
    assert_same(tmp_path, undisturbed)


def test_a_warning_during_the_imports_is_heard_after_the_first_step(
    workshop: Workshop, tmp_path: Path
):
    # as slurm/rank.sh starts a rank: a signal that comes even earlier must not kill it
    ignoring = ["bash", "-c", 'trap "" USR1; exec "$@"', "rank"]
    process = start(workshop.overrides("emoji", *TRAIN, run=tmp_path), before=ignoring)
    while not blocks(process.pid, signal.SIGUSR1):
        assert process.poll() is None, finish(process)
        time.sleep(0.005)
    assert not tmp_path.joinpath("versions.json").exists()
    process.send_signal(signal.SIGUSR1)
    code, output = finish(process)
    assert code == 85, output
    assert sorted(losses(tmp_path)) == [1]


def blocks(pid: int, number: signal.Signals) -> bool:
    (mask,) = re.findall(r"SigBlk:\t(\w+)", Path(f"/proc/{pid}/status").read_text())
    return bool(int(mask, 16) >> (number - 1) & 1)


def test_a_killed_run_goes_on_from_its_last_checkpoint_bit_equal(
    workshop: Workshop, undisturbed: Path, tmp_path: Path
):
    overrides = workshop.overrides("emoji", *TRAIN, run=tmp_path)
    process = start(overrides)
    while not (tmp_path / "checkpoints" / "step_00000005").exists():
        assert process.poll() is None, finish(process)
        time.sleep(0.005)
    kill(process)
    code, output = finish(start(overrides))
    assert code == 0, output
    assert "going on from" in output
    assert_same(tmp_path, undisturbed)


def test_a_checkpoint_of_two_ranks_goes_on_with_one_at_another_stage(
    workshop: Workshop, undisturbed: Path, tmp_path: Path
):
    first = workshop.overrides("emoji", *TRAIN, "deepspeed.stage=3", run=tmp_path)
    process = start(first, ranks=2)
    while not (tmp_path / "checkpoints" / "step_00000005").exists():
        assert process.poll() is None, finish(process)
        time.sleep(0.005)
    kill(process)
    code, output = finish(start(workshop.overrides("emoji", *TRAIN, run=tmp_path)))
    assert code == 0, output
    one, mixed = losses(undisturbed), losses(tmp_path)
    assert one.keys() == mixed.keys()
    assert max(abs(one[step] - mixed[step]) for step in one) < 1e-5
    averages = [tensors(undisturbed), tensors(tmp_path)]
    for name, tensor in averages[0].items():
        if name.startswith("ema."):
            assert torch.allclose(tensor, averages[1][name], atol=1e-5), name


EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_tiny_version_of_every_experiment_trains_two_steps(
    experiment: str, workshop: Workshop, tmp_path: Path
):
    options = ["train.max_steps=2", "data.flip=false"]
    shop = workshop
    if experiment.startswith("laion"):
        options += [
            "conditioner=emoji_clip",
            "conditioner.features=penultimate",
            "unet.context_dim=128",
        ]
    if experiment == "imagenet_256":
        shop = Workshop(tmp_path)
        draw_pictures(tmp_path / "pictures", captions=[str(number) for number in range(48)])
        shutil.copy(workshop.folder / "first_stage_3.safetensors", tmp_path)
        pack(shop.config(experiment))
        precompute(shop.config(experiment, "data.flip=false"))
    assert fit(shop.config(experiment, *options, run=tmp_path)) == 0
    assert sorted(losses(tmp_path)) == [1, 2]
    assert (tmp_path / "samples" / "step_00000002.png").exists()


def test_bf16_trains(workshop: Workshop, tmp_path: Path):
    whole, low = tmp_path / "whole", tmp_path / "bf16"
    assert fit(workshop.config("emoji", "train.max_steps=3", run=whole)) == 0
    assert fit(workshop.config("emoji", "train.max_steps=3", "train.precision=bf16", run=low)) == 0
    one = losses(whole)
    assert max(abs(one[step] - losses(low)[step]) for step in one) < 0.05


def test_a_vector_quantised_first_stage_trains_and_serves_the_diffusion_task(
    workshop: Workshop, tmp_path: Path
):
    kind = ["autoencoder.kind=vq", "autoencoder.num_embeddings=32"]
    stage = tmp_path / "stage"
    options = [*kind, "train.max_steps=4", "eval.every=4", "data.flip=false"]
    assert fit(workshop.config("emoji_autoencoder", *options, run=stage)) == 0
    lines = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    evaluated = lines[-1]
    assert 1 / 32 <= evaluated["eval/codebook_used_share"] <= 1
    assert 1 <= evaluated["eval/codebook_perplexity"] <= 32 * evaluated["eval/codebook_used_share"]
    assert all(line["train/codebook"] > 0 for line in lines if "train/loss" in line)
    own = [
        *kind,
        f"autoencoder.weights={stage / 'autoencoder.safetensors'}",
        f"data.latents={tmp_path / 'latents'}",
    ]
    precompute(workshop.config("emoji", *own))
    run = workshop.config("emoji", *own, "train.max_steps=2", run=tmp_path / "run")
    assert fit(run) == 0
    assert sorted(losses(tmp_path / "run")) == [1, 2]


def test_latents_of_another_autoencoder_are_refused(workshop: Workshop, tmp_path: Path):
    other = tmp_path / "other"
    run = workshop.config("emoji_autoencoder", "train.max_steps=1", "run.seed=1", run=other)
    assert fit(run) == 0
    weights = f"autoencoder.weights={other / 'autoencoder.safetensors'}"
    with pytest.raises(
        ValueError, match=r"data\.latents.*another autoencoder.*trainer\.precompute"
    ):
        fit(workshop.config("emoji", weights, run=tmp_path / "run"))


def test_another_data_order_cannot_be_resumed(workshop: Workshop, tmp_path: Path):
    assert fit(workshop.config("emoji", "train.max_steps=1", run=tmp_path)) == 0
    changed = workshop.config("emoji", "train.max_steps=2", "data.lanes=4", run=tmp_path)
    with pytest.raises(ValueError, match="lanes"):
        fit(changed)


def test_wandb_offline_keeps_the_run_and_its_own_steps(workshop: Workshop, tmp_path: Path):
    overrides = workshop.overrides(
        "emoji", "train.max_steps=2", "logger.wandb.mode=offline", run=tmp_path
    )
    code, output = finish(start(overrides))
    assert code == 0, output
    (record,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    checkpoint = latest_checkpoint(tmp_path / "checkpoints")
    assert checkpoint is not None
    assert record.stem == f"run-{checkpoint.state['wandb_id']}"
    shown = subprocess.run(
        [Path(sys.executable).with_name("wandb"), "leet", "inspect", "--json", record],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "train/loss" in shown.stdout
    versions = json.loads((tmp_path / "versions.json").read_text())
    assert versions["torch"] == importlib.metadata.version("torch")
