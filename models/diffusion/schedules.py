"""Noise schedules: the scales of signal and noise at each timestep.

Notation: x₀ latents, ε noise, x_t = α_t x₀ + σ_t ε with signal α and noise σ (Ho et al. 2020,
equation 4). A timestep is an input of the U-Net: int64 in a discrete schedule, floating point in
a continuous one.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from models.config import DiffusionConfig, NoiseSchedule

_special: Any = torch.special  # torch declares no types for it

COSINE_OFFSET = 0.008
MAX_BETA = 0.999
KARRAS_RHO = 7.0
SMALLEST_TAIL = 1e-12
"""Bound on probabilities: the normal distribution's quantiles at 0 and 1 are infinite."""


@dataclass(frozen=True, slots=True)
class NoiseLevel:
    """A timestep with its α (signal) and σ (noise): x = signal · x₀ + noise · ε."""

    timestep: float
    signal: float
    noise: float

    @property
    def half_log_snr(self) -> float:
        """λ = log(α / σ): −inf for pure noise, +inf for clean latents."""
        if self.signal == 0.0:
            return -math.inf
        return math.inf if self.noise == 0.0 else math.log(self.signal / self.noise)


CLEAN = NoiseLevel(timestep=0.0, signal=1.0, noise=0.0)
"""The level at which every sampler ends; no sampler evaluates the U-Net there."""


class Schedule(ABC):
    """The noise levels of a forward process, in training and in sampling."""

    @abstractmethod
    def levels(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Return α and σ at each timestep: [B] → two of [B], floating point."""

    @abstractmethod
    def draw(self, uniform: Tensor) -> Tensor:
        """Map uniform draws to training timesteps, by the inverse of their distribution function.

        uniform: [B] float64 in [0, 1) → [B], int64 or float32; a larger draw gives more noise.
        """

    @abstractmethod
    def sampling_timesteps(self, steps: int) -> Tensor:
        """Return [steps] timesteps, int64 or float64, from the noisiest to the least noisy."""

    def sampling_levels(self, steps: int) -> list[NoiseLevel]:
        """Return the levels of `sampling_timesteps`, then `CLEAN`: steps + 1 levels."""
        timesteps = self.sampling_timesteps(steps)
        columns = (timesteps, *self.levels(timesteps))
        rows = zip(*(column.numpy(force=True).tolist() for column in columns), strict=True)
        return [*(NoiseLevel(*row) for row in rows), CLEAN]

    def to(self, device: torch.device | str) -> Self:
        """Move the tables to the device of the timesteps; return the schedule."""
        return self


class DiscreteSchedule(Schedule):
    """`num_timesteps` levels with α² + σ² = 1 (Ho et al. 2020); ᾱ = α² is `alphas_cumprod`."""

    def __init__(self, config: DiffusionConfig) -> None:
        self.num_timesteps = config.num_timesteps
        alphas_cumprod = (1.0 - _betas(config)).cumprod(dim=0)
        if config.zero_terminal_snr:
            alphas_cumprod = _with_zero_terminal_snr(alphas_cumprod)
        self.alphas_cumprod = alphas_cumprod
        self._signal = alphas_cumprod.sqrt()
        self._noise = (1.0 - alphas_cumprod).sqrt()

    def levels(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Look up α = √ᾱ and σ = √(1 − ᾱ) (equation 4): [B] int64 → two of [B] float64."""
        return self._signal[timesteps], self._noise[timesteps]

    def draw(self, uniform: Tensor) -> Tensor:
        """Return ⌊u · T⌋ of T timesteps, uniform (Ho et al. 2020, algorithm 1): [B] → [B] int64."""
        return (uniform * self.num_timesteps).long()

    def sampling_timesteps(self, steps: int) -> Tensor:
        """Return evenly spaced timesteps from the last one down: [steps] int64.

        The timestep of step i is round(T (steps − i) / steps) − 1: the "trailing" spacing of Lin et
        al. 2024, table 2.
        """
        left = [self.num_timesteps * (steps - step) / steps for step in range(steps)]
        return torch.tensor([round(timestep) - 1 for timestep in left])

    def to(self, device: torch.device | str) -> Self:
        """Move the tables of α and σ; return the schedule."""
        self._signal, self._noise = self._signal.to(device), self._noise.to(device)
        return self


class EDMSchedule(Schedule):
    """Log-normal noise levels and the timestep log(s) / 4 (Karras et al. 2022, table 1).

    s = σ / α is the paper's noise level for σ_data = 1, the standard deviation of normalised
    latents. x_t is the paper's c_in · (x₀ + s ε), so α² + σ² = 1. The timestep is its c_noise. Its
    network F, preconditioned by c_skip and c_out, is −v of prediction_type=v_prediction.
    """

    def __init__(self, config: DiffusionConfig) -> None:
        self._config = config

    def levels(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Return α = 1 / √(1 + s²) and σ = s α, for s = e^(4 · timestep): [B] → two of [B]."""
        sigmas = (4.0 * timesteps).exp()
        signal = (1.0 + sigmas.square()).rsqrt()
        return signal, sigmas * signal

    def draw(self, uniform: Tensor) -> Tensor:
        """Return log(s) / 4 for a normal log(s) of mean P_mean, deviation P_std: [B] float32."""
        return (_log_sigmas(self._config, uniform) / 4.0).float()

    def sampling_timesteps(self, steps: int) -> Tensor:
        """Return timesteps from sigma_max to sigma_min, evenly spaced in s^(1/ρ): [steps] float64.

        Karras et al. 2022, equation 5, with ρ = 7.
        """
        first, last = (
            sigma ** (1.0 / KARRAS_RHO)
            for sigma in (self._config.sigma_max, self._config.sigma_min)
        )
        roots = torch.linspace(first, last, steps, dtype=torch.float64)
        return KARRAS_RHO * roots.log() / 4.0


class FlowSchedule(Schedule):
    """Rectified flow: straight paths x_t = (1 − t) x₀ + t ε (Liu et al. 2022, equation 1).

    The timestep is t · num_timesteps. flow_shift moves the times of training and of sampling
    towards noise (Esser et al. 2024, equation 23).
    """

    def __init__(self, config: DiffusionConfig) -> None:
        self._config = config

    def levels(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Return α = 1 − t and σ = t, for t = timestep / num_timesteps: [B] → two of [B]."""
        times = timesteps / self._config.num_timesteps
        return 1.0 - times, times

    def draw(self, uniform: Tensor) -> Tensor:
        """Return logit-normal times, shifted (Esser et al. 2024, equation 19): [B] float32."""
        return self._shifted(_log_sigmas(self._config, uniform).sigmoid()).float()

    def sampling_timesteps(self, steps: int) -> Tensor:
        """Return t = 1, 1 − 1/steps, …, 1/steps, shifted: [steps] float64."""
        return self._shifted(torch.arange(steps, 0, -1, dtype=torch.float64) / steps)

    def _shifted(self, times: Tensor) -> Tensor:
        shifted = self._config.flow_shift * times
        return self._config.num_timesteps * (shifted / (shifted + (1.0 - times)))


def build_schedule(config: DiffusionConfig) -> Schedule:
    """Build the schedule of the options."""
    match config.schedule:
        case NoiseSchedule.edm:
            return EDMSchedule(config)
        case NoiseSchedule.flow:
            return FlowSchedule(config)
        case _:
            return DiscreteSchedule(config)


def _betas(config: DiffusionConfig) -> Tensor:
    start, end, steps = config.beta_start, config.beta_end, config.num_timesteps
    if config.schedule is NoiseSchedule.cosine:
        # Nichol and Dhariwal 2021, equation 17.
        times = torch.linspace(0.0, 1.0, steps + 1, dtype=torch.float64)
        angles = (times + COSINE_OFFSET) / (1.0 + COSINE_OFFSET) * (math.pi / 2.0)
        alphas_cumprod = angles.cos().square()
        return (1.0 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(max=MAX_BETA)
    if config.schedule is NoiseSchedule.scaled_linear:
        return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64).square()
    return torch.linspace(start, end, steps, dtype=torch.float64)


def _with_zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Shift √ᾱ to 0 at the end, and scale it to its old start (Lin et al. 2024, algorithm 1)."""
    roots = alphas_cumprod.sqrt()
    first, last = roots[0], roots[-1]
    return ((roots - last) * first / (first - last)).square()


def _log_sigmas(config: DiffusionConfig, uniform: Tensor) -> Tensor:
    """Map uniform draws to normal log(σ / α), of log_sigma_mean and log_sigma_std: [B] → [B]."""
    normal: Tensor = _special.ndtri(uniform.clamp(SMALLEST_TAIL, 1.0 - SMALLEST_TAIL))
    return config.log_sigma_mean + config.log_sigma_std * normal
