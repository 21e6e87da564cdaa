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
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data.order.batches import Share
from data.storage.lease import NAME, take
from data.streams.images import ImageStream
from models.first_stage.autoencoder import build_autoencoder
from tests.support.conditions import FULL_SIZE, KINDS, TOKENS, with_conditions
from tests.support.paths import ROOT
from tests.support.processes import Command, run_command, start
from tests.support.workshop import Workshop, draw_pictures, losses
from trainer.checkpoints.reader import average_kind, latest_checkpoint, open_checkpoint
from trainer.config import Config
from trainer.pack.job import pack
from trainer.precompute.job import precompute
from trainer.train.loop import fit

STEPS = 12
TRAIN = ["train.max_steps=12", "checkpoint.every=5", "data.flip=false"]


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
    ended = start(workshop.overrides("emoji", *TRAIN, run=run)).finish()
    assert ended.code == 0, ended.said
    assert sorted(losses(run)) == list(range(1, STEPS + 1))
    return run


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_run_that_is_asked_to_stop_saves_and_goes_on_bit_equal(
    number: signal.Signals, workshop: Workshop, undisturbed: Path, tmp_path: Path
) -> None:
    overrides = workshop.overrides("emoji", *TRAIN, run=tmp_path)
    ended = run_command("tests.support.stop_at", "2", number.name, "trainer", *overrides)
    assert ended.code == 85, ended.said
    assert f"{number.name}: stopping after this step" in ended.out
    stopped = latest_checkpoint(tmp_path / "checkpoints")
    assert stopped is not None
    assert stopped.step == 2
    ended = start(overrides).finish()
    assert ended.code == 0, ended.said
    assert f"going on from {stopped.path}" in ended.said
    assert_same(tmp_path, undisturbed)


def test_a_warning_during_the_imports_is_heard_after_the_first_step(
    workshop: Workshop, tmp_path: Path
) -> None:
    # as slurm/rank.sh starts a rank: a signal that comes even earlier must not kill it
    ignoring = ["bash", "-c", 'trap "" USR1; exec "$@"', "rank", sys.executable, "-m", "trainer"]
    with subprocess.Popen(
        [*ignoring, *workshop.overrides("emoji", *TRAIN, run=tmp_path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        while not blocks(process.pid, signal.SIGUSR1):
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
        assert not tmp_path.joinpath("versions.json").exists()
        process.send_signal(signal.SIGUSR1)
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 85, output
    assert sorted(losses(tmp_path)) == [1]


def blocks(pid: int, number: signal.Signals) -> bool:
    (mask,) = re.findall(r"SigBlk:\t(\w+)", Path(f"/proc/{pid}/status").read_text())
    return bool(int(mask, 16) >> (number - 1) & 1)


def kill_after_a_save(overrides: list[str], run: Path, ranks: int = 1) -> None:
    """Kill a run in its step 8, with checkpoint 5 on the disk."""
    held = run / "held"
    words = ["7", str(held), "trainer", *overrides]
    process = Command("tests.support.hold_at", words, ranks)
    saved = run / "checkpoints" / "step_00000005"
    while not (held.exists() and saved.exists() and 7 in losses(run)):
        assert process.poll() is None, process.printed()
        time.sleep(0.005)
    process.kill()
    assert sorted(losses(run)) == [1, 2, 3, 4, 5, 6, 7]


def test_a_killed_run_goes_on_from_its_last_checkpoint_bit_equal(
    workshop: Workshop, undisturbed: Path, tmp_path: Path
) -> None:
    overrides = workshop.overrides("emoji", *TRAIN, run=tmp_path)
    kill_after_a_save(overrides, tmp_path)
    ended = start(overrides).finish()
    assert ended.code == 0, ended.said
    assert f"going on from {tmp_path / 'checkpoints' / 'step_00000005'}" in ended.said
    assert_same(tmp_path, undisturbed)


def test_a_checkpoint_of_two_ranks_goes_on_with_one_at_another_stage(
    workshop: Workshop, undisturbed: Path, tmp_path: Path
) -> None:
    first = workshop.overrides("emoji", *TRAIN, "deepspeed.stage=3", run=tmp_path)
    kill_after_a_save(first, tmp_path, ranks=2)
    ended = start(workshop.overrides("emoji", *TRAIN, run=tmp_path)).finish()
    assert ended.code == 0, ended.said
    assert f"going on from {tmp_path / 'checkpoints' / 'step_00000005'}" in ended.said
    one, mixed = losses(undisturbed), losses(tmp_path)
    assert one.keys() == mixed.keys()
    assert max(abs(one[step] - mixed[step]) for step in one) < 1e-5
    averages = [tensors(undisturbed), tensors(tmp_path)]
    for name, tensor in averages[0].items():
        if name.startswith("ema."):
            assert torch.allclose(tensor, averages[1][name], atol=1e-5), name


def test_a_second_start_in_the_folder_of_a_run_ends_in_a_line_and_writes_nothing(
    workshop: Workshop, tmp_path: Path
) -> None:
    with take(tmp_path / NAME, "wait"):
        for ranks in (1, 2):
            ended = start(workshop.overrides("emoji", *TRAIN, run=tmp_path), ranks).finish()
            assert ended.code == 1
            lines = [line for line in ended.err.splitlines() if line.startswith("error:")]
            assert len(lines) == 1
            assert lines[0].startswith(f"error: {tmp_path} is in use by ")
            assert f"(process {os.getpid()})" in lines[0]
            assert "choose another run.name" in lines[0]
        assert [path.name for path in tmp_path.iterdir()] == [NAME]


EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_tiny_version_of_every_experiment_trains_two_steps(
    experiment: str, workshop: Workshop, tmp_path: Path
) -> None:
    options = ["train.max_steps=2", "data.flip=false", "eval.every=2"]
    shop = workshop
    if experiment.startswith(("laion", "own")):
        options += [
            "conditioner=emoji_clip",
            "conditioner.features=penultimate",
            "unet.context_dim=128",
        ]
    if experiment == "text_256":
        options += TOKENS
    if experiment in KINDS:
        shop = with_conditions(workshop, tmp_path)
        options += [*KINDS[experiment], "eval.perceptual_features=efficientnet_lite0"]
    elif experiment in FULL_SIZE:
        shop = with_conditions(workshop, tmp_path, "ffhq_256")
        options += [*FULL_SIZE[experiment], "eval.perceptual_features=efficientnet_lite0"]
    elif experiment.startswith("scenes"):  # the pictures have one caption alone
        options += ["data.maps=false", "data.boxes=false", "data.captions=text"]
    if experiment == "imagenet_256":
        shop = Workshop(tmp_path)
        draw_pictures(tmp_path / "pictures", captions=[str(number) for number in range(48)])
        shutil.copy(workshop.folder / "first_stage_3.safetensors", tmp_path)
        pack(shop.config(experiment))
        precompute(shop.config(experiment, "data.flip=false"))
    assert fit(shop.config(experiment, *options, run=tmp_path)) == 0
    assert sorted(losses(tmp_path)) == [1, 2]
    assert (tmp_path / "samples" / "step_00000002.png").exists()


def test_bf16_trains_as_fp32_does(workshop: Workshop, tmp_path: Path) -> None:
    base = ["train.max_steps=8", "optim.lr=3e-3", "optim.schedule=constant", "data.flip=false"]
    runs = {"fp32": [], "bf16": ["train.precision=bf16"], "untrained": ["optim.lr=1e-12"]}
    curves = {}
    for name, more in runs.items():
        run = tmp_path / name
        assert fit(workshop.config("emoji", *base, *more, run=run)) == 0
        curves[name] = np.array(list(losses(run).values()))
    rounding = np.abs(curves["bf16"] - curves["fp32"])
    learned = np.abs(curves["untrained"] - curves["fp32"])
    assert rounding.any()
    assert rounding.sum() < learned.sum() / 4
    assert rounding.max() < 0.05


def chosen_codes(run: Path, config: Config, step: int) -> np.ndarray:
    """The nearest code of every latent pixel of the validation images, by averaged weights."""
    checkpoint = open_checkpoint(run / "checkpoints" / f"step_{step:08d}")
    (average,) = checkpoint.training.averages
    prefix = f"{average_kind(average)}/autoencoder."
    file = load_file(checkpoint.path / "rank_00000_000.safetensors")
    weights = {k.removeprefix(prefix): v for k, v in file.items() if k.startswith(prefix)}
    network = build_autoencoder(config.autoencoder)
    network.load_state_dict(weights)
    share = Share(seed=0, global_batch=8, micro_batch=8)
    stream = ImageStream.open(config.data, "val", share)
    images = stream.read(np.arange(stream.num_samples)).arrays["images"]
    with torch.no_grad():
        latents = network.encode(images)[:, 0].movedim(1, -1).flatten(0, -2)
    differences = latents[:, None] - weights["quantize.embedding.weight"]
    return differences.square().sum(-1).argmin(-1).numpy()


def test_a_vector_quantised_first_stage_trains_and_serves_the_diffusion_task(
    workshop: Workshop, tmp_path: Path
) -> None:
    kind = ["autoencoder.kind=vq", "autoencoder.num_embeddings=32"]
    stage = tmp_path / "stage"
    options = [*kind, "train.max_steps=4", "eval.every=4", "data.flip=false"]
    assert fit(workshop.config("emoji_autoencoder", *options, run=stage)) == 0
    lines = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    evaluated = lines[-1]
    config = workshop.config("emoji_autoencoder", *options)
    _, times = np.unique(chosen_codes(stage, config, step=4), return_counts=True)
    shares = times / times.sum()
    assert evaluated["eval/codebook_used_share"] == len(times) / 32
    perplexity = np.exp(-(shares * np.log(shares)).sum())
    assert evaluated["eval/codebook_perplexity"] == pytest.approx(perplexity)
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


def test_latents_of_another_autoencoder_are_refused(workshop: Workshop, tmp_path: Path) -> None:
    other = tmp_path / "other"
    run = workshop.config("emoji_autoencoder", "train.max_steps=1", "run.seed=1", run=other)
    assert fit(run) == 0
    weights = f"autoencoder.weights={other / 'autoencoder.safetensors'}"
    refused = r"data\.latents: .* another network than autoencoder\.weights.*trainer\.precompute"
    with pytest.raises(ValueError, match=refused):
        fit(workshop.config("emoji", weights, run=tmp_path / "run"))


def test_another_data_order_cannot_be_resumed(workshop: Workshop, tmp_path: Path) -> None:
    assert fit(workshop.config("emoji", "train.max_steps=1", run=tmp_path)) == 0
    changed = workshop.config("emoji", "train.max_steps=2", "data.lanes=4", run=tmp_path)
    with pytest.raises(ValueError, match="lanes"):
        fit(changed)


def test_wandb_offline_keeps_the_run_and_its_own_steps(workshop: Workshop, tmp_path: Path) -> None:
    overrides = workshop.overrides(
        "emoji", "train.max_steps=2", "logger.wandb.mode=offline", run=tmp_path
    )
    ended = start(overrides).finish()
    assert ended.code == 0, ended.said
    (record,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    checkpoint = latest_checkpoint(tmp_path / "checkpoints")
    assert checkpoint is not None
    assert record.stem == f"run-{checkpoint.training.wandb_id}"
    shown = subprocess.run(
        [Path(sys.executable).with_name("wandb"), "leet", "inspect", "--json", record],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "train/loss" in shown.stdout
    versions = json.loads((tmp_path / "versions.json").read_text())
    assert versions["torch"] == importlib.metadata.version("torch")
