"""Classifier-free guidance: a denoiser with and without its condition as one prediction."""

from collections.abc import Callable

import torch
from torch import Tensor

from models.attention import Context
from models.config import SamplerConfig
from models.samplers import Predict
from models.schedules import Level

Denoiser = Callable[[Tensor, Tensor, Context | None], Tensor]
"""(latents [B, C, h, w], timesteps [B], context of B or None) → model output."""


def guided(
    unet: Denoiser, context: Context | None, null_context: Context | None, config: SamplerConfig
) -> Predict:
    """null + w (conditional − null) with w = guidance_scale, in one batch of 2B.

    Ho and Salimans 2022, equation 6, where w is 1 + its w. context, null_context: of B; the null
    pass is skipped at a scale of 1, without a context, and outside of guidance_interval
    (Kynkäänniemi et al. 2024, equation 5).
    """

    def conditional(latents: Tensor, level: Level) -> Tensor:
        return unet(latents, _timesteps(latents, level), context)

    if context is None or null_context is None or config.guidance_scale == 1.0:
        return conditional
    both = _together(null_context, context)
    low, high = config.guidance_interval

    def predict(latents: Tensor, level: Level) -> Tensor:
        if not low < level.noise <= high:
            return conditional(latents, level)
        twice = torch.cat([latents, latents])
        null, positive = unet(twice, _timesteps(twice, level), both).chunk(2)
        output = torch.lerp(null, positive, config.guidance_scale)
        return _rescaled(output, positive, config.guidance_rescale)

    return predict


def _together(first: Context, second: Context) -> Context:
    masks = [context.mask for context in (first, second) if context.mask is not None]
    tokens = torch.cat([first.tokens, second.tokens])
    return Context(tokens, torch.cat(masks) if masks else None)


def _rescaled(output: Tensor, positive: Tensor, share: float) -> Tensor:
    """Give back a share of the deviation that guidance adds (Lin et al. 2024, equations 14-16)."""
    if share == 0.0:
        return output
    axes = tuple(range(1, output.ndim))
    ratio = positive.std(axes, keepdim=True) / output.std(axes, keepdim=True)
    return torch.lerp(output, output * ratio, share)


def _timesteps(latents: Tensor, level: Level) -> Tensor:
    return torch.full(latents.shape[:1], level.timestep, device=latents.device)
