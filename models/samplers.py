"""Solvers that turn noise into latents: stateless functions over a denoiser.

A solver walks down the levels of a schedule (`Schedule.sampling_levels`) and yields, after each
step, the latents and the clean latents guessed there. Notation as in `models.schedules`;
λ = log(α / σ). Orders of the error in the size of a step, over the levels with noise; the last
step, to clean latents, is of first order in all of them:

    ddim             1   Euler's method in σ / α where eta is 0 (Song et al. 2021, section 4.3)
    euler            1   ddim with eta = 0
    euler_ancestral      ddim with eta = 1: fresh noise each step
    heun             2   asks the denoiser 2 · steps − 1 times
    plms             2   asks steps + 1 times
    dpmpp_2m         2
    unipc            3

From pure noise, heun and plms ask once less.
"""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

from models.checks import sampler_problems
from models.config import SamplerConfig, SamplerName
from models.diffusion import Diffusion
from models.schedules import Level

Predict = Callable[[Tensor, Level], Tensor]
"""(latents [B, ...], their level) → model output [B, ...]."""
Estimate = Callable[[Tensor, Level], tuple[Tensor, Tensor]]
"""(latents [B, ...], their level) → the x₀ and the ε guessed there, two of [B, ...]."""
StepNoise = Callable[[int], Tensor]
"""Step → fresh standard normal noise [B, ...]."""
Walk = Iterator[tuple[Tensor, Tensor]]
"""After each step: latents and the clean latents guessed there, two of [B, ...]."""

ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
"""Weights of the newest 1 to 4 slopes, newest first (Liu et al. 2022, equation 12)."""


@torch.no_grad()
def sample(
    predict: Predict,
    diffusion: Diffusion,
    config: SamplerConfig,
    noise: Tensor,
    *,
    start: Tensor | None = None,
    strength: float = 1.0,
    step_noise: StepNoise | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Draw latents in `config.steps` steps.

    noise: [B, ...] standard normal. start: latents [B, ...] to begin with instead of pure noise;
    they are noised to the level where the last `strength`, in (0, 1], of the steps begins
    (SDEdit: Meng et al. 2022, section 3). step_noise: what euler_ancestral, and ddim with eta, add.
    on_step: called after each step with its index and the clean latents guessed there, [B, ...].
    Returns latents [B, ...]. Raises ValueError for options that contradict each other.
    """
    for problem in sampler_problems(config, diffusion.config):
        raise ValueError(problem)
    levels = diffusion.schedule.sampling_levels(config.steps)
    latents = noise
    if start is not None:
        levels = levels[config.steps - num_steps(config, strength) :]
        latents = levels[0].signal * start + levels[0].noise * noise

    def estimate(latents: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        output = predict(latents, level).to(noise.dtype)
        return diffusion.to_denoised_and_noise(output, latents, level)

    walk = _walk(config, estimate, levels, latents, step_noise)
    for step, (reached, denoised) in enumerate(walk):
        latents = reached
        if on_step:
            on_step(step, denoised)
    return latents


def num_steps(config: SamplerConfig, strength: float) -> int:
    """Steps that `sample` takes when it starts from latents with this strength."""
    return max(1, round(config.steps * strength))


def _walk(
    config: SamplerConfig,
    estimate: Estimate,
    levels: list[Level],
    latents: Tensor,
    step_noise: StepNoise | None,
) -> Walk:
    match config.name:
        case SamplerName.ddim:
            return ddim(estimate, levels, latents, config.eta, step_noise)
        case SamplerName.euler:
            return ddim(estimate, levels, latents)
        case SamplerName.euler_ancestral:
            return ddim(estimate, levels, latents, 1.0, step_noise)
        case SamplerName.heun:
            return heun(estimate, levels, latents)
        case SamplerName.plms:
            return plms(estimate, levels, latents)
        case SamplerName.dpmpp_2m:
            return dpmpp_2m(estimate, levels, latents)
        case SamplerName.unipc:
            return unipc(estimate, levels, latents)


def ddim(
    estimate: Estimate,
    levels: list[Level],
    latents: Tensor,
    eta: float = 0.0,
    step_noise: StepNoise | None = None,
) -> Walk:
    """DDIM (Song et al. 2021, equation 12) with a share eta of DDPM's fresh noise.

    Without fresh noise it is Euler's method in σ / α (section 4.3 there); with all of it, the
    ancestral sampler of k-diffusion. Raises ValueError where fresh noise is needed and missing.
    """
    if eta > 0.0 and step_noise is None:
        raise ValueError("this sampler adds fresh noise: give step_noise")
    for step, (now, after) in enumerate(pairwise(levels)):
        denoised, epsilon = estimate(latents, now)
        fresh = eta * ddpm_deviation(now, after)
        kept = math.sqrt(max(after.noise**2 - fresh**2, 0.0))
        latents = after.signal * denoised + kept * epsilon
        if step_noise and fresh > 0.0:
            latents = latents + fresh * step_noise(step)
        yield latents, denoised


def ddpm_deviation(now: Level, after: Level) -> float:
    """Standard deviation of the fresh noise at η = 1 (Song et al. 2021, equation 16).

    Written with ratios σ / α, which makes it hold for every schedule.
    """
    ratio = (after.noise / after.signal) * (now.signal / now.noise)
    return after.noise * math.sqrt(1.0 - ratio * ratio)


def heun(estimate: Estimate, levels: list[Level], latents: Tensor) -> Walk:
    """Heun's method in σ / α (Karras et al. 2022, algorithm 1).

    Steps from pure noise, where σ / α is infinite, and to clean latents are Euler's.
    """
    for now, after in pairwise(levels):
        denoised, epsilon = estimate(latents, now)
        reached = after.signal * denoised + after.noise * epsilon
        if now.signal > 0.0 and after.noise > 0.0:
            _, epsilon_reached = estimate(reached, after)
            reached = _along(latents, 0.5 * (epsilon + epsilon_reached), now, after)
        latents = reached
        yield latents, denoised


def plms(estimate: Estimate, levels: list[Level], latents: Tensor) -> Walk:
    """Pseudo linear multistep (Liu et al. 2022, equation 12 and section 3.4), started by Heun's.

    A step from pure noise is Euler's.
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


def dpmpp_2m(estimate: Estimate, levels: list[Level], latents: Tensor) -> Walk:
    """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2)."""
    before: tuple[Level, Tensor] | None = None
    for now, after in pairwise(levels):
        denoised, _ = estimate(latents, now)
        latents = _dpmpp_2m_step(latents, denoised, now, after, before)
        before = now, denoised
        yield latents, denoised


def unipc(estimate: Estimate, levels: list[Level], latents: Tensor) -> Walk:
    """UniPC of order 2 with B(h) = e^h − 1 (Zhao et al. 2023, algorithm 1).

    Its predictor UniP-2 is DPM-Solver++(2M)'s step; its corrector UniC-2 adds an order.
    """
    corrected: Tensor | None = None
    history: list[tuple[Level, Tensor]] = []
    for now, after in pairwise(levels):
        denoised, _ = estimate(latents, now)
        if corrected is not None:
            latents = _unic_step(corrected, denoised, now, history)
        corrected = latents
        before = history[0] if history else None
        latents = _dpmpp_2m_step(latents, denoised, now, after, before)
        history = [(now, denoised), *history[:1]]
        yield latents, denoised


def _along(latents: Tensor, epsilon: Tensor, now: Level, after: Level) -> Tensor:
    """x / α moves by ε times the change of σ / α (Song et al. 2021, equation 13)."""
    ratio = after.signal / now.signal
    return ratio * latents + (after.noise - ratio * now.noise) * epsilon


def _dpmpp_2m_step(
    latents: Tensor,
    denoised: Tensor,
    now: Level,
    after: Level,
    before: tuple[Level, Tensor] | None,
) -> Tensor:
    """One step from `now`; before: level and guess of the step before.

    The first step is of first order, and so is the one to clean latents, whose λ is infinite.
    """
    if after.noise == 0.0:
        return after.signal * denoised
    if before is not None:
        level_before, denoised_before = before
        # 0 when the step before came from pure noise, infinitely far away in λ.
        ratio = _width(now, after) / _width(level_before, now)
        denoised = torch.lerp(denoised, denoised_before, -0.5 * ratio)
    return _exponential_step(latents, denoised, now, after)


def _unic_step(
    latents: Tensor, denoised: Tensor, now: Level, history: list[tuple[Level, Tensor]]
) -> Tensor:
    """The step to `now` again, knowing what is guessed there (Zhao et al. 2023, equation 9).

    latents: corrected, before that step; denoised: guessed at `now`; history: levels and guesses
    before it, newest first.
    """
    level, guess = history[0]
    h = _width(level, now)
    change = 0.5 * (denoised - guess)
    if len(history) > 1:
        level_before, guess_before = history[1]
        r = -_width(level_before, level) / h
        # ρ₁ + ρ₂ = b₁ and r ρ₁ + ρ₂ = b₂ (equation 10 there, of order 2).
        whole = -1.0 / math.expm1(-h)
        b_1 = whole - 1.0 / h
        b_2 = whole - 2.0 * b_1 / h
        rho_1 = (b_1 - b_2) / (1.0 - r)
        change = (rho_1 / r) * (guess_before - guess) + (b_1 - rho_1) * (denoised - guess)
    return _exponential_step(latents, guess + change, level, now)


def _exponential_step(latents: Tensor, denoised: Tensor, now: Level, after: Level) -> Tensor:
    """Exact where the guess stays as it is (Lu et al. 2022b, equation 8)."""
    shrink = after.noise / now.noise
    return shrink * latents - after.signal * math.expm1(-_width(now, after)) * denoised


def _width(now: Level, after: Level) -> float:
    return after.half_log_snr - now.half_log_snr
