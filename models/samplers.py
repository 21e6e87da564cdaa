"""Solvers that turn noise into latents.

They hold no state and know a network only as a function `predict(latents, timesteps)`. Notation
as in `models.diffusion`; λ = log(α / σ) is half the log signal-to-noise ratio.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from models.config import SamplerConfig, SamplerName
from models.diffusion import Diffusion

Predict = Callable[[Tensor, Tensor], Tensor]
"""(latents [B, ...], timesteps [B] int64) → model output [B, ...]."""
Denoiser = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(latents [B, C, h, w], timesteps [B], context [B, M, D] or None) → model output."""


@dataclass(frozen=True, slots=True)
class Level:
    """A point of the schedule: x = signal · x₀ + noise · ε."""

    signal: float
    noise: float

    @property
    def half_log_snr(self) -> float:
        """λ: −inf for pure noise, +inf for clean latents."""
        if self.signal == 0.0:
            return -math.inf
        return math.inf if self.noise == 0.0 else math.log(self.signal / self.noise)


CLEAN = Level(signal=1.0, noise=0.0)


@torch.no_grad()
def sample(
    predict: Predict,
    diffusion: Diffusion,
    config: SamplerConfig,
    noise: Tensor,
    *,
    step_noise: Callable[[int], Tensor] | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Draw latents in `config.steps` evaluations of `predict`.

    noise: [B, ...] standard normal, where the schedule starts. step_noise: step index → fresh
    noise [B, ...], which ddim needs when eta > 0. on_step: called after each step with its index
    and the clean latents guessed there, [B, ...]. Returns latents [B, ...].
    Raises ValueError for a number of steps or an eta that the solver cannot do.
    """
    _check(config, diffusion, step_noise)
    timesteps = trailing_timesteps(diffusion.num_timesteps, config.steps)
    levels = [*_levels(diffusion, timesteps), CLEAN]
    latents = noise
    before: tuple[Level, Tensor] | None = None
    for step, timestep in enumerate(timesteps):
        now, after = levels[step], levels[step + 1]
        batch = torch.full(noise.shape[:1], timestep, device=noise.device)
        output = predict(latents, batch).to(noise.dtype)
        denoised, epsilon = diffusion.to_denoised_and_noise(output, latents, batch)
        match config.name:
            case SamplerName.ddim:
                spread = config.eta * ddim_sigma(now, after)
                fresh = step_noise(step) if step_noise and spread > 0.0 else None
                latents = ddim_step(denoised, epsilon, after, spread, fresh)
            case SamplerName.dpmpp_2m:
                latents = dpmpp_2m_step(latents, denoised, now, after, before)
                before = now, denoised
        if on_step:
            on_step(step, denoised)
    return latents


def guided(
    unet: Denoiser, context: Tensor | None, null_context: Tensor | None, guidance_scale: float
) -> Predict:
    """Classifier-free guidance, null + w (conditional − null), in one batch of 2B.

    Ho and Salimans 2022, equation 6, where w is 1 + its w. context, null_context: [B, M, D]; at a
    scale of 1, and without a context, the null pass is skipped.
    """
    if context is None or null_context is None or guidance_scale == 1.0:
        return lambda latents, timesteps: unet(latents, timesteps, context)
    both = torch.cat([null_context, context])

    def predict(latents: Tensor, timesteps: Tensor) -> Tensor:
        outputs = unet(torch.cat([latents, latents]), torch.cat([timesteps, timesteps]), both)
        null, conditional = outputs.chunk(2)
        return torch.lerp(null, conditional, guidance_scale)

    return predict


def trailing_timesteps(num_timesteps: int, steps: int) -> list[int]:
    """Evenly spaced timesteps from the last one down (Lin et al. 2024, table 2, "trailing")."""
    return [round(num_timesteps * (steps - step) / steps) - 1 for step in range(steps)]


def ddim_sigma(now: Level, after: Level) -> float:
    """Standard deviation of DDIM's fresh noise at η = 1 (Song et al. 2021, equation 16)."""
    kept = now.signal / after.signal
    return after.noise / now.noise * math.sqrt(1.0 - kept * kept)


def ddim_step(
    denoised: Tensor, epsilon: Tensor, after: Level, spread: float, fresh: Tensor | None
) -> Tensor:
    """One step of DDIM to `after` (Song et al. 2021, equation 12).

    denoised, epsilon: [B, ...]; fresh: [B, ...] noise, added with standard deviation `spread`.
    """
    direction = math.sqrt(max(after.noise**2 - spread**2, 0.0))
    latents = after.signal * denoised + direction * epsilon
    return latents if fresh is None else latents + spread * fresh


def dpmpp_2m_step(
    latents: Tensor,
    denoised: Tensor,
    now: Level,
    after: Level,
    before: tuple[Level, Tensor] | None,
) -> Tensor:
    """One step of DPM-Solver++(2M) to `after` (Lu et al. 2022b, algorithm 2).

    latents, denoised: [B, ...] at `now`; before: level and denoised [B, ...] of the step before.
    The first step is of first order, and so is the one to clean latents, whose λ is infinite.
    """
    if after.noise == 0.0:
        return after.signal * denoised
    width = after.half_log_snr - now.half_log_snr
    if before is not None:
        level_before, denoised_before = before
        # 0 when the step before came from pure noise, infinitely far away in λ.
        ratio = width / (now.half_log_snr - level_before.half_log_snr)
        denoised = torch.lerp(denoised, denoised_before, -0.5 * ratio)
    shrink = after.noise / now.noise
    return shrink * latents - after.signal * math.expm1(-width) * denoised


def _levels(diffusion: Diffusion, timesteps: list[int]) -> list[Level]:
    signal, noise = diffusion.signal[timesteps], diffusion.noise[timesteps]
    return [Level(*pair) for pair in zip(signal.tolist(), noise.tolist(), strict=True)]


def _check(
    config: SamplerConfig, diffusion: Diffusion, step_noise: Callable[[int], Tensor] | None
) -> None:
    if not 1 <= config.steps <= diffusion.num_timesteps:
        raise ValueError(
            f"sampler.steps = {config.steps}: choose 1 to diffusion.num_timesteps = "
            f"{diffusion.num_timesteps}"
        )
    if config.eta > 0.0 and config.name is not SamplerName.ddim:
        raise ValueError(f"sampler.eta = {config.eta} needs sampler.name=ddim: set it to 0")
    if config.eta > 0.0 and step_noise is None:
        raise ValueError(f"sampler.eta = {config.eta} needs step_noise: it adds fresh noise")
