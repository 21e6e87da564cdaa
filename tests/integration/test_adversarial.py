"""A first stage and its discriminator, each under an engine: resumed, cut up, and on ranks."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.support.processes import run_command
from tests.support.workshop import Workshop, losses
from trainer.checkpoints.reader import latest_checkpoint
from trainer.train.loop import fit

LOSS = "autoencoder.loss"
GAN = [
    f"{LOSS}.perceptual_weight=0.1",
    f"{LOSS}.perceptual_features=efficientnet_lite0",
    f"{LOSS}.learn_log_variance=true",
    f"{LOSS}.gan_weight=0.5",
    f"{LOSS}.gan_start_step=3",
    f"{LOSS}.discriminator.channels=8",
    f"{LOSS}.discriminator.layers=2",
    "train.max_steps=6",
    "train.micro_batch_size=8",
    "data.flip=false",
]
VQ = [
    "autoencoder.kind=vq",
    "autoencoder.num_embeddings=32",
    "autoencoder.codebook_decay=0.9",
    "autoencoder.codebook_revival=0.5",
]


def trained(workshop: Workshop, run: Path, *options: str) -> dict[str, list[float]]:
    """Metrics by name, one a step, of a run in this process."""
    assert fit(workshop.config("emoji_autoencoder", *GAN, *options, run=run)) == 0
    return curves(run)


def curves(run: Path) -> dict[str, list[float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    shared = ("train/", "optim/grad_norm")
    found: dict[str, list[float]] = {}
    for line in lines:
        for name, value in line.items():
            if name.startswith(shared):
                found.setdefault(name, []).append(value)
    return found


def assert_close(one: dict[str, list[float]], other: dict[str, list[float]]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), name


def test_both_modules_go_on_from_a_checkpoint_bit_equal(workshop: Workshop, tmp_path: Path) -> None:
    """With a batch norm, whose running statistics are in the checkpoint, too."""
    options = [f"{LOSS}.discriminator.norm=batch", "checkpoint.every=4", *VQ]
    whole = trained(workshop, tmp_path, *options)
    assert [len(whole[f"train/{name}"]) for name in ("loss", "loss_discriminator")] == [6, 4]
    assert whole["train/adversarial_weight"][0] == 0
    assert all(weight > 0 for weight in whole["train/adversarial_weight"][1:])
    last = tmp_path / "checkpoints" / "step_00000006"
    saved = latest_checkpoint(last.parent)
    assert saved is not None
    kinds = ["weight", "exp_avg", "ema.decay_0.999", "buffer"]
    kinds += [f"discriminator.{kind}" for kind in ("weight", "exp_avg", "exp_avg_sq", "buffer")]
    before = saved.tensors(*kinds)
    assert all(before.values())
    assert any("running_mean" in name for name in before["discriminator.buffer"])
    assert saved.training.adam_steps["discriminator"] == 4
    shutil.rmtree(last)
    assert trained(workshop, tmp_path, *options) == whole
    resumed = latest_checkpoint(last.parent)
    assert resumed is not None
    assert resumed.state.task == saved.state.task
    after = resumed.tensors(*kinds)
    for kind, tensors in before.items():
        assert tensors.keys() == after[kind].keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, after[kind][name]), f"{kind}/{name}"


def test_ranks_and_micro_batches_do_not_change_the_curves(
    workshop: Workshop, tmp_path: Path
) -> None:
    # the kinks of a pretrained network make large differences of rounding errors within six steps
    plain = f"{LOSS}.perceptual_weight=0"
    one = trained(workshop, tmp_path / "one", plain)
    assert_close(trained(workshop, tmp_path / "cut", "train.micro_batch_size=2", plain), one)
    alone = losses(tmp_path / "one")
    for stage, micro_batch in ((1, 2), (2, 4)):
        run = tmp_path / f"stage_{stage}"
        options = [plain, f"deepspeed.stage={stage}", f"train.micro_batch_size={micro_batch}"]
        overrides = workshop.overrides("emoji_autoencoder", *GAN, *options, run=run)
        ended = run_command("trainer", *overrides, ranks=2)
        assert ended.code == 0, ended.said
        assert_close(curves(run), one)
        assert max(abs(losses(run)[step] - alone[step]) for step in alone) < 1e-5
