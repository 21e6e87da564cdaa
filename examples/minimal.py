"""Text to emoji in plain PyTorch: train a latent diffusion model, and draw with it.

    python -m trainer.pack +experiment=emoji        # pictures and captions → shards
    python -m trainer.precompute +experiment=emoji  # shards → latents
    python -m examples.minimal                      # latents → a U-Net, and runs/minimal.png

A latent diffusion model (Rombach et al. 2022) has three networks. An autoencoder turns a picture of
64×64 pixels into latents of 4×16×16, and back. A text encoder turns a caption into 24 tokens. Both
are trained already. This file trains the third, a U-Net that removes noise from latents, given the
tokens. Drawing starts from pure noise, and removes it in steps.
"""

import argparse
import copy
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR
from torchvision import utils

from data.config import DataConfig
from data.order.batches import Share
from data.streams.latents import LatentStream
from models import config
from models.condition import Condition
from models.conditioning.clip_text import ClipText
from models.diffusion.guidance import guided
from models.diffusion.process import Diffusion
from models.diffusion.samplers import sample
from models.first_stage.autoencoder import load_autoencoder, sample_posterior
from models.latent_diffusion import LatentDiffusion, LatentScale
from models.unet import UNet2DCondition

WORDS, LONGEST = {"face", "heart", "circle", "square"}, 3
"""Train on captions of up to three words with one of these; all emoji would take longer."""
STEPS, BATCH, LEARNING_RATE, EMA_DECAY = 600, 32, 2e-3, 0.99
DROPPED = 0.1
"""Share of the samples that are trained without a caption, for classifier-free guidance."""
AUTOENCODER = config.AutoencoderConfig(
    block_out_channels=[16, 32, 64],
    layers_per_block=1,
    norm_groups=8,
    mid_attention=False,
    weights="conf/autoencoder/emoji_f4.safetensors",
)
TEXT_ENCODER = config.ConditionerConfig(
    model="conf/clip/emoji.json", pretrained="conf/clip/emoji.safetensors", width=128
)
UNET = config.UNetConfig(
    block_out_channels=[32, 64, 128],
    attention=[False, True, True],
    heads=[1, 2, 4],
    layers_per_block=1,
    context_dim=128,
    norm_groups=16,
)
DIFFUSION = Diffusion(config.DiffusionConfig(zero_terminal_snr=True))
SAMPLER = config.SamplerConfig(steps=25, guidance_scale=3.0)
PROMPTS = [
    *("grinning face", "winking face", "crying face", "sleeping face", "clown face", "cat face"),
    *("red heart", "blue heart", "yellow heart", "green circle", "orange square", "green square"),
]
"""The last one is in the validation split: the training has no green square."""


def read(folder: Path) -> tuple[Tensor, list[str], LatentScale]:
    """Read the chosen emoji: moments [N, 2, 4, 16, 16] of latents, captions, and their scale."""
    data = DataConfig(dir=str(folder.parent), latents=str(folder), image_size=64)
    stream = LatentStream.open(data, Share(seed=0, global_batch=BATCH, micro_batch=BATCH))
    words = [caption.split() for caption in stream.captions(np.arange(stream.num_samples))]
    chosen = [n for n, found in enumerate(words) if WORDS & {*found} and len(found) <= LONGEST]
    batch, info = stream.read(np.array(chosen)), stream.manifest.latents
    assert info is not None
    return batch.arrays["moments"].float(), batch.captions, LatentScale(info.mean, info.std)


def train(
    moments: Tensor, captions: list[str], text: ClipText, scale: LatentScale, steps: int
) -> tuple[UNet2DCondition, list[float]]:
    """Train; return the U-Net with averaged weights, and the loss of every step."""
    tokens, null = text.encode(captions), text.encode([None])  # [N | 1, 24, 128]
    unet = UNet2DCondition(UNET)
    average = copy.deepcopy(unet).requires_grad_(False)
    optimizer = torch.optim.AdamW(unet.parameters(), LEARNING_RATE, fused=True)
    rates = OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, cycle_momentum=False)
    losses, start_s = list[float](), time.perf_counter()
    for step in range(1, steps + 1):
        # The autoencoder gave the mean and the log-variance of each picture's latents. Draw latents
        # from this Gaussian, and normalise their channels to the variance of the noise, 1.
        rows = torch.randint(len(moments), (BATCH,))
        noise = torch.randn_like(moments[rows, 0])
        latents = scale.normalise(sample_posterior(moments[rows], torch.randn_like(noise)))
        context = torch.where(torch.rand(BATCH, 1, 1) < DROPPED, null, tokens[rows])

        # Add noise to the latents: little at timestep 0; at timestep 999 only noise remains.
        timesteps = DIFFUSION.schedule.draw(torch.rand(BATCH, dtype=torch.float64))
        noisy = DIFFUSION.add_noise(latents, noise, timesteps)

        # The U-Net predicts v, a weighted difference of noise and latents.
        prediction = unet(noisy, timesteps, context)
        loss = (prediction - DIFFUSION.target(latents, noise, timesteps)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        rates.step()

        # Update the exponential moving average (EMA) of the weights, for drawing.
        decay = min(EMA_DECAY, step / (9 + step))
        for mean, weight in zip(average.parameters(), unet.parameters(), strict=True):
            mean.lerp_(weight.detach(), 1 - decay)
        losses.append(loss.item())
        if step % 50 == 0:
            seconds = time.perf_counter() - start_s
            print(f"step {step}: loss {np.mean(losses[-50:]):.3f}, {seconds:.0f} s", flush=True)
    return average, losses


def draw(unet: UNet2DCondition, text: ClipText, scale: LatentScale, shape: torch.Size) -> Tensor:
    """Draw latents [12, 4, 16, 16] of the prompts, and decode them: [12, 3, 64, 64] in [-1, 1]."""
    condition, null = (Condition(text.encode(p)) for p in (PROMPTS, [None] * len(PROMPTS)))
    predict = guided(LatentDiffusion(unet, None), condition, null, SAMPLER)
    latents = sample(predict, DIFFUSION, SAMPLER, torch.randn(len(PROMPTS), *shape))
    with torch.no_grad():
        return load_autoencoder(AUTOENCODER).decode(scale.denormalise(latents))


def main(latents: Path, out: Path, steps: int) -> list[float]:
    """Train, draw, and return the loss of every step."""
    torch.manual_seed(0)
    moments, captions, scale = read(latents)
    text = ClipText(TEXT_ENCODER)
    print(f"{len(captions)} emoji, such as {', '.join(captions[:3])}")
    unet, losses = train(moments, captions, text, scale, steps)
    images = draw(unet, text, scale, moments.shape[2:])
    out.parent.mkdir(parents=True, exist_ok=True)
    utils.save_image(images, out, nrow=6, normalize=True, value_range=(-1, 1))
    print(f"{out}: {', '.join(PROMPTS)}")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--latents", type=Path, default="datasets/emoji/latents")
    parser.add_argument("--out", type=Path, default="runs/minimal.png")
    parser.add_argument("--steps", type=int, default=STEPS)
    main(**vars(parser.parse_args()))
