"""Classifier-free guidance: two predictions of a denoiser combined to one."""

from collections.abc import Callable

import torch
from torch import Tensor

from models.condition import Condition, join_conditions
from models.config import SamplerConfig
from models.diffusion.samplers import Predict
from models.diffusion.schedules import NoiseLevel

Denoiser = Callable[[Tensor, Tensor, Condition], Tensor]
"""(latents [B, C, h, w], timesteps [B], condition of B) → model output [B, C, h, w]."""


def guided(unet: Denoiser, condition: Condition, null: Condition, config: SamplerConfig) -> Predict:
    """Return a function that predicts null + w (conditional − null), with w = guidance_scale.

    Ho and Salimans 2022, equation 6; w here is 1 + w there. condition, null: of B samples each.
    The function maps latents [B, C, h, w] and their level to [B, C, h, w]; the U-Net gets both
    conditions in one batch of 2B. It predicts with `condition` alone at a scale of 1, for an empty
    condition, and outside guidance_interval (Kynkäänniemi et al. 2024, equation 5).

    Raises: ValueError if one of the two conditions has a part that the other lacks.
    """

    def conditional(latents: Tensor, level: NoiseLevel) -> Tensor:
        return unet(latents, _timesteps(latents, level), condition)

    if condition.is_empty or config.guidance_scale == 1.0:
        return conditional
    both = join_conditions(null, condition)
    low, high = config.guidance_interval

    def predict(latents: Tensor, level: NoiseLevel) -> Tensor:
        if not low < level.noise <= high:
            return conditional(latents, level)
        twice = torch.cat([latents, latents])
        negative, positive = unet(twice, _timesteps(twice, level), both).chunk(2)
        output = torch.lerp(negative, positive, config.guidance_scale)
        return _rescaled(output, positive, config.guidance_rescale)

    return predict


def _rescaled(output: Tensor, positive: Tensor, share: float) -> Tensor:
    """Scale the deviation of a guided output [B, ...] back to that of `positive`, by a share.

    Lin et al. 2024, equations 14 to 16; the share is φ there.
    """
    if share == 0.0:
        return output
    axes = tuple(range(1, output.ndim))
    ratio = positive.std(axes, keepdim=True) / output.std(axes, keepdim=True)
    return torch.lerp(output, output * ratio, share)


def _timesteps(latents: Tensor, level: NoiseLevel) -> Tensor:
    return torch.full(latents.shape[:1], level.timestep, device=latents.device)
