"""Solvers, which turn noise into latents: stateless functions over a denoiser.

A solver takes the noise levels of a schedule (`Schedule.sampling_levels`) and yields, after each
step, the latents at the next level and the predicted x₀. `models.config.sampling` has the table of
samplers. Notation: `models.diffusion.schedules`, and λ = log(α / σ).

Order of the error in the step size over the levels with noise, and evaluations of the denoiser:

    ddim             1   steps           Euler's method in σ / α where eta is 0
    euler            1   steps           ddim with eta = 0
    euler_ancestral  –   steps           ddim with eta = 1: fresh noise after each step
    heun             2   2 · steps − 1   from pure noise 2 · steps − 2
    plms             2   steps + 1       from pure noise steps
    dpmpp_2m         2   steps
    unipc            3   steps

The last step, to clean latents, is of first order in all of them.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from models.checks import refuse_first, sampler_problems
from models.config import SamplerConfig
from models.config.sampling import SAMPLERS
from models.config.targets import resolve
from models.diffusion.process import Diffusion
from models.diffusion.schedules import NoiseLevel

Predict = Callable[[Tensor, NoiseLevel], Tensor]
"""(latents [B, ...], their noise level) → model output [B, ...]."""
Estimate = Callable[[Tensor, NoiseLevel], tuple[Tensor, Tensor]]
"""(latents [B, ...], their noise level) → predicted x₀ and ε, two of [B, ...]."""
StepNoise = Callable[[int], Tensor]
"""Index of a step → fresh standard normal noise [B, ...]."""
Trajectory = Iterator[tuple[Tensor, Tensor]]
"""For each step: latents at its end, and x₀ predicted at its beginning, two of [B, ...]."""

ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
"""Weights of the newest 1 to 4 slopes, newest first (Liu et al. 2022, equation 12)."""


class FreshNoise(NamedTuple):
    """The noise that a sampler may add after a step."""

    eta: float
    """Share of DDPM's fresh noise, in [0, 1]: sampler.eta."""
    draw: StepNoise | None
    """None: the caller gives no noise."""


Solver = Callable[[Estimate, Sequence[NoiseLevel], Tensor, FreshNoise], Trajectory]
"""(estimate, n + 1 levels, latents [B, ...], fresh noise) → n pairs of latents and predicted x₀.

The levels go from the noisiest to `CLEAN`; the latents are at the first level. A solver evaluates
`estimate` at the first n levels. Only ddim and euler_ancestral use the fresh noise.
"""


class Start(NamedTuple):
    """Latents from which sampling starts (SDEdit: Meng et al. 2022, section 3)."""

    latents: Tensor
    """[B, ...], clean; `sample` adds noise up to the level of the first step that it takes."""
    strength: float
    """Share of the steps that `sample` takes, in (0, 1]: the last ones."""


@torch.no_grad()
def sample(
    predict: Predict,
    diffusion: Diffusion,
    config: SamplerConfig,
    noise: Tensor,
    *,
    start: Start | None = None,
    step_noise: StepNoise | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Draw latents in `config.steps` steps.

    noise: [B, ...] standard normal. step_noise: for samplers that add fresh noise. on_step: called
    after each step with its index and its predicted x₀, [B, ...]. Returns latents [B, ...].

    Raises: ValueError for options that contradict each other, and if a sampler adds fresh noise and
    step_noise is missing.
    """
    refuse_first(sampler_problems(config, diffusion.config))
    levels = diffusion.schedule.sampling_levels(config.steps)
    latents = noise
    if start is not None:
        levels = levels[config.steps - num_steps(config, start.strength) :]
        latents = levels[0].signal * start.latents + levels[0].noise * noise

    def estimate(latents: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        output = predict(latents, level).to(noise.dtype)
        return diffusion.to_denoised_and_noise(output, latents, level)

    solver: Solver = resolve(SAMPLERS[config.name].solver)
    trajectory = solver(estimate, levels, latents, FreshNoise(config.eta, step_noise))
    for step, (reached, denoised) in enumerate(trajectory):
        latents = reached
        if on_step:
            on_step(step, denoised)
    return latents


def num_steps(config: SamplerConfig, strength: float) -> int:
    """Count the steps of `sample` from a `Start` of this strength."""
    return max(1, round(config.steps * strength))


def ddim(
    estimate: Estimate, levels: Sequence[NoiseLevel], latents: Tensor, fresh: FreshNoise
) -> Trajectory:
    """Solve by DDIM with a share eta of DDPM's fresh noise (Song et al. 2021, equation 12).

    Euler's method in σ / α at eta = 0 (section 4.3 there), k-diffusion's ancestral sampler at 1.
    Yields, after each step, latents and predicted x₀, two of [B, ...] (`Solver`).

    Raises: ValueError if eta > 0 and `fresh` has no noise.
    """
    if fresh.eta > 0.0 and fresh.draw is None:
        raise ValueError("this sampler adds fresh noise: give step_noise")
    for step, (now, after) in enumerate(pairwise(levels)):
        denoised, epsilon = estimate(latents, now)
        deviation = fresh.eta * ddpm_deviation(now, after)
        kept = math.sqrt(max(after.noise**2 - deviation**2, 0.0))
        latents = after.signal * denoised + kept * epsilon
        if fresh.draw and deviation > 0.0:
            latents = latents + deviation * fresh.draw(step)
        yield latents, denoised


def euler(
    estimate: Estimate, levels: Sequence[NoiseLevel], latents: Tensor, fresh: FreshNoise
) -> Trajectory:
    """Solve by Euler's method in σ / α: `ddim` with eta = 0 (Song et al. 2021, section 4.3).

    Yields, after each step, latents and predicted x₀, two of [B, ...] (`Solver`).
    """
    return ddim(estimate, levels, latents, fresh._replace(eta=0.0))


def euler_ancestral(
    estimate: Estimate, levels: Sequence[NoiseLevel], latents: Tensor, fresh: FreshNoise
) -> Trajectory:
    """Solve by ancestral sampling: `ddim` with eta = 1, DDPM's fresh noise (Ho et al. 2020).

    Yields, after each step, latents and predicted x₀, two of [B, ...] (`Solver`).

    Raises: ValueError if `fresh` has no noise.
    """
    return ddim(estimate, levels, latents, fresh._replace(eta=1.0))


def ddpm_deviation(now: NoiseLevel, after: NoiseLevel) -> float:
    """Return the standard deviation of DDPM's fresh noise (Song et al. 2021, equation 16, η = 1).

    In terms of σ / α, which holds for every schedule.
    """
    ratio = (after.noise / after.signal) * (now.signal / now.noise)
    return after.noise * math.sqrt(1.0 - ratio * ratio)


def heun(
    estimate: Estimate, levels: Sequence[NoiseLevel], latents: Tensor, fresh: FreshNoise
) -> Trajectory:
    """Solve by Heun's method in σ / α (Karras et al. 2022, algorithm 1).

    A step from pure noise, where σ / α is infinite, and the step to clean latents are Euler steps.
    Yields, after each step, latents and predicted x₀, two of [B, ...] (`Solver`).
    """
    for now, after in pairwise(levels):
        denoised, epsilon = estimate(latents, now)
        reached = after.signal * denoised + after.noise * epsilon
        if now.signal > 0.0 and after.noise > 0.0:
            _, epsilon_reached = estimate(reached, after)
            reached = _along(latents, 0.5 * (epsilon + epsilon_reached), now, after)
        latents = reached
        yield latents, denoised


def plms(
    estimate: Estimate, levels: Sequence[NoiseLevel], latents: Tensor, fresh: FreshNoise
) -> Trajectory:
    """Solve by pseudo linear multistep, PLMS (Liu et al. 2022, equation 12 and section 3.4).

    The first step is a Heun step; a step from pure noise is an Euler step.
    Yields, after each step, latents and predicted x₀, two of [B, ...] (`Solver`).
    """
    slopes: list[Tensor] = []
    for step, (now, after) in enumerate(pairwise(levels)):
        denoised, epsilon = estimate(latents, now)
        slopes = [epsilon, *slopes[:3]]
        if now.signal == 0.0:
            latents = after.signal * denoised + after.noise * epsilon
        elif step == 0 and after.noise > 0.0:
            reached = _along(latents, epsilon, now, after)
            _, epsilon_reached = estimate(reached, after)
            latents = _along(latents, 0.5 * (epsilon + epsilon_reached), now, after)
        else:
            weights = ADAMS_BASHFORTH[len(slopes) - 1]
            slope = torch.stack([w * s for w, s in zip(weights, slopes, strict=True)]).sum(0)
            latents = _along(latents, slope, now, after)
        yield latents, denoised


def dpmpp_2m(
    estimate: Estimate, levels: Sequence[NoiseLevel], latents: Tensor, fresh: FreshNoise
) -> Trajectory:
    """Solve by DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2).

    Yields, after each step, latents and predicted x₀, two of [B, ...] (`Solver`).
    """
    before: tuple[NoiseLevel, Tensor] | None = None
    for now, after in pairwise(levels):
        denoised, _ = estimate(latents, now)
        latents = _dpmpp_2m_step(latents, denoised, now, after, before)
        before = now, denoised
        yield latents, denoised


def unipc(
    estimate: Estimate, levels: Sequence[NoiseLevel], latents: Tensor, fresh: FreshNoise
) -> Trajectory:
    """Solve by UniPC of order 2 with B(h) = e^h − 1 (Zhao et al. 2023, algorithm 1).

    The predictor UniP-2 is a step of DPM-Solver++(2M); the corrector UniC-2 adds an order.
    Yields, after each step, latents and predicted x₀, two of [B, ...] (`Solver`).
    """
    corrected: Tensor | None = None
    history: list[tuple[NoiseLevel, Tensor]] = []
    for now, after in pairwise(levels):
        denoised, _ = estimate(latents, now)
        if corrected is not None:
            latents = _unic_step(corrected, denoised, now, history)
        corrected = latents
        before = history[0] if history else None
        latents = _dpmpp_2m_step(latents, denoised, now, after, before)
        history = [(now, denoised), *history[:1]]
        yield latents, denoised


def _along(latents: Tensor, epsilon: Tensor, now: NoiseLevel, after: NoiseLevel) -> Tensor:
    """Change x / α by ε times the change of σ / α (Song et al. 2021, equation 13)."""
    ratio = after.signal / now.signal
    return ratio * latents + (after.noise - ratio * now.noise) * epsilon


def _dpmpp_2m_step(
    latents: Tensor,
    denoised: Tensor,
    now: NoiseLevel,
    after: NoiseLevel,
    before: tuple[NoiseLevel, Tensor] | None,
) -> Tensor:
    """Take one step; before: level and predicted x₀ of the previous step.

    The first step, and the step to clean latents, where λ is infinite, are of first order.
    """
    if after.noise == 0.0:
        return after.signal * denoised
    if before is not None:
        level_before, denoised_before = before
        # 0 after a step from pure noise, where λ is −∞
        ratio = _width(now, after) / _width(level_before, now)
        denoised = torch.lerp(denoised, denoised_before, -0.5 * ratio)
    return _exponential_step(latents, denoised, now, after)


def _unic_step(
    latents: Tensor, denoised: Tensor, now: NoiseLevel, history: list[tuple[NoiseLevel, Tensor]]
) -> Tensor:
    """Repeat the step to `now` with x₀ predicted at `now` (Zhao et al. 2023, equation 9).

    latents: corrected, at the beginning of that step; denoised: x₀ predicted at `now`; history: the
    previous levels and their predicted x₀, newest first.
    """
    level, previous = history[0]
    h = _width(level, now)
    change = 0.5 * (denoised - previous)
    if len(history) > 1:
        level_before, before = history[1]
        r = -_width(level_before, level) / h
        # ρ₁ + ρ₂ = b₁ and r ρ₁ + ρ₂ = b₂ (equation 10 there, of order 2).
        whole = -1.0 / math.expm1(-h)
        b_1 = whole - 1.0 / h
        b_2 = whole - 2.0 * b_1 / h
        rho_1 = (b_1 - b_2) / (1.0 - r)
        change = (rho_1 / r) * (before - previous) + (b_1 - rho_1) * (denoised - previous)
    return _exponential_step(latents, previous + change, level, now)


def _exponential_step(
    latents: Tensor, denoised: Tensor, now: NoiseLevel, after: NoiseLevel
) -> Tensor:
    """Take a step that is exact for a constant predicted x₀ (Lu et al. 2022b, equation 8)."""
    shrink = after.noise / now.noise
    return shrink * latents - after.signal * math.expm1(-_width(now, after)) * denoised


def _width(now: NoiseLevel, after: NoiseLevel) -> float:
    return after.half_log_snr - now.half_log_snr
