"""Training on real latents with every kind of schedule, from noise to the last checkpoint."""

import math
from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from models.diffusion.process import Diffusion
from models.layers.attention import padded_sdpa_attention, reference_attention
from models.layers.blocks import Attention
from tests.support.workshop import Workshop, losses
from trainer.runtime.ranks import ALONE
from trainer.train.denoiser import build_denoising
from trainer.train.loop import fit

SCHEDULES = {
    "stable_diffusion": [],
    "edm": ["diffusion.loss_weight=edm"],
    "flow": ["diffusion.prediction_type=flow", "sampler=unipc"],
}

NO_RESCALING = "diffusion.zero_terminal_snr=false"


def options_of(schedule: str) -> list[str]:
    return [f"diffusion={schedule}", NO_RESCALING, *SCHEDULES[schedule]]


class Listener(nn.Module):
    """Stands in for the network: keeps what it is asked, answers zero."""

    def forward(self, latents: Tensor, timesteps: Tensor, condition: object) -> Tensor:
        self.latents, self.timesteps = latents, timesteps
        return torch.zeros_like(latents)


def first_batch(workshop: Workshop, *options: str) -> tuple[Listener, Diffusion, float]:
    """What the network is asked for the first batch, with the schedule and the loss."""
    config = workshop.config("emoji", *options)
    task, listener = build_denoising(config, ALONE), Listener()
    with closing(task.stream.steps(0)) as batches:
        loss = task.turns(0)[0].loss(listener, next(batches)[0])
    assert all(f"train/loss_by_timestep/{quarter}" in loss.sums for quarter in range(4))
    return listener, Diffusion(config.diffusion), loss.mean.item()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_offset_noise_moves_whole_channels(schedule: str, workshop: Workshop) -> None:
    plain, diffusion, _ = first_batch(workshop, *options_of(schedule))
    offset, _, _ = first_batch(workshop, *options_of(schedule), "diffusion.offset_noise=0.5")
    assert torch.equal(plain.timesteps, offset.timesteps)
    _, noise = diffusion.schedule.levels(plain.timesteps)
    moved = (offset.latents - plain.latents) / (0.5 * noise.float()[:, None, None, None])
    draws = moved.mean(dim=(2, 3))
    torch.testing.assert_close(
        moved, draws[:, :, None, None].expand_as(moved), rtol=1e-3, atol=1e-3
    )
    assert 0.3 < draws.std() < 3.0
    assert len(set(draws.flatten().tolist())) == draws.numel()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_an_untrained_network_loses_the_variance_of_its_target(
    schedule: str, workshop: Workshop
) -> None:
    """Latents and noise have variance 1, so the target's is known for an answer of zero."""
    expected = {"stable_diffusion": 1.0, "edm": 1.0, "flow": 2.0}[schedule]
    _, _, loss = first_batch(
        workshop, *options_of(schedule), "train.global_batch_size=32", "train.micro_batch_size=32"
    )
    assert loss == pytest.approx(expected, rel=0.15)


def test_an_untrained_network_loses_the_mean_of_absolute_noise(workshop: Workshop) -> None:
    more = ["train.global_batch_size=32", "train.micro_batch_size=32"]
    _, _, loss = first_batch(workshop, "diffusion=ldm", NO_RESCALING, "diffusion.loss=l1", *more)
    assert loss == pytest.approx((2 / math.pi) ** 0.5, rel=0.02)  # of a standard normal number


@pytest.mark.parametrize("schedule", ["edm", "flow"])
def test_a_run_trains_and_draws(schedule: str, workshop: Workshop, tmp_path: Path) -> None:
    options = [*options_of(schedule), "diffusion.offset_noise=0.1", "train.max_steps=3"]
    options += ["eval.every=3"]
    assert fit(workshop.config("emoji", *options, run=tmp_path)) == 0
    assert sorted(losses(tmp_path)) == [1, 2, 3]
    assert all(0.0 < loss < 10.0 for loss in losses(tmp_path).values())
    assert list((tmp_path / "samples").glob("*.png"))


def test_channels_last_changes_the_layout_alone(workshop: Workshop) -> None:
    plain, _, loss = first_batch(workshop, "train.channels_last=false")
    last, _, same_loss = first_batch(workshop, "train.channels_last=true")
    assert plain.latents.is_contiguous()
    assert last.latents.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(plain.latents, last.latents)
    assert loss == same_loss


def test_tasks_of_one_process_keep_their_own_attention(workshop: Workshop) -> None:
    chosen = {}
    for backend in ("reference", "sdpa"):
        config = workshop.config("emoji", f"unet.attention_backend={backend}")
        chosen[backend] = build_denoising(config, ALONE).trained
    found = {
        backend: {
            layer.backend
            for layer in modules["denoiser"].module.modules()
            if isinstance(layer, Attention)
        }
        for backend, modules in chosen.items()
    }
    assert found == {"reference": {reference_attention}, "sdpa": {padded_sdpa_attention}}
