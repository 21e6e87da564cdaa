"""Guided DDIM sampling by our loop and by diffusers': `python -m tests.benchmarks.sampler`.

The emoji experiment's U-Net with the same random weights, noise and contexts; guidance by doubling
the batch; one thread, in turns. A ratio is the least processor time of theirs over the rounds ÷
ours, and `ratio_diffusers` the worst of the batch sizes.
"""

import json
from functools import partial
from typing import Any

import torch
from torch import Tensor

from models.condition import Condition
from models.diffusion.guidance import guided
from models.diffusion.process import Diffusion
from models.diffusion.samplers import sample
from models.latent_diffusion import LatentDiffusion
from models.unet import UNet2DCondition
from tests.benchmarks.turns import least_seconds
from tests.support.oracles import diffusers, diffusers_condition, load_both_ways
from trainer.cli import load_config
from trainer.config import Config

ROUNDS = 8
STEPS = 10
BATCHES = (1, 4, 16)
TOKENS = 24


def main() -> None:
    """One line a batch size, then the JSON."""
    torch.set_num_threads(1)
    config = load_config(["+experiment=emoji", "sampler=ddim", f"sampler.steps={STEPS}"])
    ours, theirs = UNet2DCondition(config.unet), diffusers_condition(config.unet).eval()
    load_both_ways(ours, theirs)
    module = LatentDiffusion(ours, None).eval()
    side = config.data.image_size // config.autoencoder.downsample_factor
    ratios = []
    for batch in BATCHES:
        noise = torch.randn(batch, config.unet.in_channels, side, side)
        context, null = (torch.randn(batch, TOKENS, config.unet.context_dim) for _ in range(2))
        our_call = partial(our_loop, config, module, noise, context, null)
        their_call = partial(their_loop, config, theirs, noise, context, null)
        torch.testing.assert_close(our_call(), their_call(), rtol=1e-3, atol=1e-3)
        our_s, their_s = least_seconds(our_call, their_call, rounds=ROUNDS)
        ratios.append(their_s / our_s)
        print(
            f"{batch} x {STEPS} steps  {our_s * 1e3:.0f} ms, theirs {their_s * 1e3:.0f}"
            f" ({ratios[-1]:.3f}x)",
            flush=True,
        )
    print(json.dumps({"ratio_diffusers": round(min(ratios), 3)}))


@torch.inference_mode()
def our_loop(
    config: Config, module: LatentDiffusion, noise: Tensor, context: Tensor, null: Tensor
) -> Tensor:
    """As `trainer.pipeline.Pipeline.draw`."""
    predict = guided(module, Condition(context), Condition(null), config.sampler)
    return sample(predict, Diffusion(config.diffusion), config.sampler, noise)


@torch.inference_mode()
def their_loop(config: Config, unet: Any, noise: Tensor, context: Tensor, null: Tensor) -> Tensor:
    """As `diffusers.StableDiffusionPipeline.__call__`."""
    scheduler = diffusers.DDIMScheduler(
        beta_start=config.diffusion.beta_start,
        beta_end=config.diffusion.beta_end,
        beta_schedule=str(config.diffusion.schedule),
        prediction_type=str(config.diffusion.prediction_type),
        rescale_betas_zero_snr=config.diffusion.zero_terminal_snr,
        timestep_spacing="trailing",
        clip_sample=False,
    )
    scheduler.set_timesteps(config.sampler.steps)
    both = torch.cat([null, context])
    latents = noise * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        doubled = scheduler.scale_model_input(torch.cat([latents] * 2), timestep)
        output = unet(doubled, timestep, encoder_hidden_states=both, return_dict=False)[0]
        negative, positive = output.chunk(2)
        output = negative + config.sampler.guidance_scale * (positive - negative)
        latents = scheduler.step(output, timestep, latents, return_dict=False)[0]
    return latents


if __name__ == "__main__":
    main()
