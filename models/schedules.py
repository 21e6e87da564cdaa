"""Noise schedules: how much of the latents and how much noise there is at a timestep.

Notation: x₀ latents, ε noise, x_t = α_t x₀ + σ_t ε with signal α and noise σ (Ho et al. 2020,
equation 4). A timestep is the number that the U-Net is told: int64 in a discrete schedule,
floating point in a continuous one.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from models.config import DiffusionConfig, NoiseSchedule

COSINE_OFFSET = 0.008
MAX_BETA = 0.999
KARRAS_RHO = 7.0
SMALLEST_TAIL = 1e-12
"""The normal distribution's quantiles at 0 and 1 are infinite."""


@dataclass(frozen=True, slots=True)
class Level:
    """A timestep with its signal and noise: x = signal · x₀ + noise · ε."""

    timestep: float
    signal: float
    noise: float

    @property
    def half_log_snr(self) -> float:
        """λ = log(α / σ): −inf for pure noise, +inf for clean latents."""
        if self.signal == 0.0:
            return -math.inf
        return math.inf if self.noise == 0.0 else math.log(self.signal / self.noise)


CLEAN = Level(timestep=0.0, signal=1.0, noise=0.0)
"""Where every sampler ends; the U-Net is never asked there."""


class Schedule(ABC):
    """The noise levels of one forward process, in training and in sampling."""

    @abstractmethod
    def levels(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and noise: [B] → two of [B], floating point."""

    @abstractmethod
    def draw(self, uniform: Tensor) -> Tensor:
        """Timesteps to train on, growing with the noise: [B] float64 from [0, 1) → [B].

        The inverse of their distribution function, so that one draw a sample is enough.
        """

    @abstractmethod
    def sampling_timesteps(self, steps: int) -> Tensor:
        """[steps] int64 or float64, from the noisiest down; `CLEAN` comes after the last."""

    def sampling_levels(self, steps: int) -> list[Level]:
        """The levels of `sampling_timesteps` and, last, `CLEAN`."""
        timesteps = self.sampling_timesteps(steps)
        columns = (timesteps, *self.levels(timesteps))
        rows = zip(*(column.tolist() for column in columns), strict=True)
        return [*(Level(*row) for row in rows), CLEAN]

    def to(self, device: torch.device | str) -> Self:
        """Move tables to where the timesteps will be; returns itself."""
        return self


class DiscreteSchedule(Schedule):
    """`num_timesteps` levels with α² + σ² = 1, trained uniformly; ᾱ = α² is `alphas_cumprod`.

    Sampling takes evenly spaced timesteps from the last one down (Lin et al. 2024, table 2,
    "trailing").
    """

    def __init__(self, config: DiffusionConfig) -> None:
        self.num_timesteps = config.num_timesteps
        alphas_cumprod = (1.0 - _betas(config)).cumprod(dim=0)
        if config.zero_terminal_snr:
            alphas_cumprod = _with_zero_terminal_snr(alphas_cumprod)
        self.alphas_cumprod = alphas_cumprod
        self._signal = alphas_cumprod.sqrt()
        self._noise = (1.0 - alphas_cumprod).sqrt()

    def levels(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """See the base class."""
        return self._signal[timesteps], self._noise[timesteps]

    def draw(self, uniform: Tensor) -> Tensor:
        """See the base class."""
        return (uniform * self.num_timesteps).long()

    def sampling_timesteps(self, steps: int) -> Tensor:
        """See the base class."""
        left = [self.num_timesteps * (steps - step) / steps for step in range(steps)]
        return torch.tensor([round(timestep) - 1 for timestep in left])

    def to(self, device: torch.device | str) -> Self:
        """See the base class."""
        self._signal, self._noise = self._signal.to(device), self._noise.to(device)
        return self


class EDMSchedule(Schedule):
    """Log-normal noise levels and the timestep log(s) / 4 (Karras et al. 2022, table 1).

    s = σ / α is the paper's noise level for σ_data = 1, the deviation of normalised latents. Our
    x_t is the paper's c_in · (x₀ + s ε), so α² + σ² = 1; its network F, preconditioned by c_skip
    and c_out, is −v of prediction_type=v_prediction; and its c_noise is the timestep.
    """

    def __init__(self, config: DiffusionConfig) -> None:
        self._config = config

    def levels(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """See the base class."""
        sigmas = (4.0 * timesteps).exp()
        signal = (1.0 + sigmas.square()).rsqrt()
        return signal, sigmas * signal

    def draw(self, uniform: Tensor) -> Tensor:
        """See the base class."""
        return (_log_sigmas(self._config, uniform) / 4.0).float()

    def sampling_timesteps(self, steps: int) -> Tensor:
        """From sigma_max to sigma_min, evenly in s^(1/ρ) (Karras et al. 2022, equation 5)."""
        first, last = (
            sigma ** (1.0 / KARRAS_RHO)
            for sigma in (self._config.sigma_max, self._config.sigma_min)
        )
        roots = torch.linspace(first, last, steps, dtype=torch.float64)
        return KARRAS_RHO * roots.log() / 4.0


class FlowSchedule(Schedule):
    """Straight paths x_t = (1 − t) x₀ + t ε, told to the U-Net as t · num_timesteps.

    Rectified flow (Liu et al. 2022, equation 1) with logit-normal t in training (Esser et al.
    2024, equation 19). Sampling takes evenly spaced t from 1 down. Both are moved towards noise
    by the resolution's shift (equation 23 there).
    """

    def __init__(self, config: DiffusionConfig) -> None:
        self._config = config

    def levels(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """See the base class."""
        times = timesteps / self._config.num_timesteps
        return 1.0 - times, times

    def draw(self, uniform: Tensor) -> Tensor:
        """See the base class."""
        return self._shifted(_log_sigmas(self._config, uniform).sigmoid()).float()

    def sampling_timesteps(self, steps: int) -> Tensor:
        """See the base class."""
        return self._shifted(torch.arange(steps, 0, -1, dtype=torch.float64) / steps)

    def _shifted(self, times: Tensor) -> Tensor:
        shifted = self._config.flow_shift * times
        return self._config.num_timesteps * (shifted / (shifted + (1.0 - times)))


def build_schedule(config: DiffusionConfig) -> Schedule:
    """The schedule that the options describe."""
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
    """Shift √ᾱ to end at 0, scale it to start as before (Lin et al. 2024, algorithm 1)."""
    roots = alphas_cumprod.sqrt()
    first, last = roots[0], roots[-1]
    return ((roots - last) * first / (first - last)).square()


def _log_sigmas(config: DiffusionConfig, uniform: Tensor) -> Tensor:
    """log(σ / α), normal with the configured mean and deviation: [B] from [0, 1) → [B]."""
    normal = torch.special.ndtri(uniform.clamp(SMALLEST_TAIL, 1.0 - SMALLEST_TAIL))
    return config.log_sigma_mean + config.log_sigma_std * normal
