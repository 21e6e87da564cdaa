"""What the denoiser learns from a noise schedule, and how its output is read.

Notation as in `models.schedules`. Every prediction type is a mixture a ε + b x₀ of noise and
latents, so with x_t = α x₀ + σ ε the output determines both:

    x₀ = (a x_t − σ · output) / (a α − b σ)      ε = (α · output − b x_t) / (a α − b σ)
"""

from typing import Self, TypeVar

import torch
from torch import Tensor

from models.checks import diffusion_problems
from models.config import DiffusionConfig, LossWeight, PredictionType
from models.schedules import Level, build_schedule

Scale = TypeVar("Scale", float, Tensor)


class Diffusion:
    """A noise schedule with what is predicted and how errors are weighted.

    Raises ValueError, naming the options, where they contradict each other.
    """

    def __init__(self, config: DiffusionConfig) -> None:
        for problem in diffusion_problems(config):
            raise ValueError(problem)
        self.config = config
        self.schedule = build_schedule(config)

    def to(self, device: torch.device | str) -> Self:
        """Move the schedule's tables to where the timesteps will be; returns itself."""
        self.schedule.to(device)
        return self

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t (Ho et al. 2020, equation 4). latents, noise: [B, ...]; timesteps: [B]."""
        signal, sigma = self._levels(timesteps, latents)
        return signal * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the denoiser should return.

        latents, noise: [B, ...]; timesteps: [B] → [B, ...].
        """
        of_noise, of_latents = self._mixture(*self._levels(timesteps, latents))
        return of_noise * noise + of_latents * latents

    def to_denoised_and_noise(
        self, model_output: Tensor, noisy: Tensor, level: Level
    ) -> tuple[Tensor, Tensor]:
        """The x₀ and the ε that the output stands for at one level; see the module.

        model_output, noisy: [B, ...] → two of [B, ...].
        """
        of_noise, of_latents = self._mixture(level.signal, level.noise)
        scale = of_noise * level.signal - of_latents * level.noise
        denoised = (of_noise * noisy - level.noise * model_output) / scale
        epsilon = (level.signal * model_output - of_latents * noisy) / scale
        return denoised, epsilon

    def loss_weight(self, timesteps: Tensor) -> Tensor:
        """Weight of the squared error of `target` at each timestep: [B] → [B] float32.

        min_snr weighs the squared error of x₀ by min(SNR, γ) (Hang et al. 2023, equation 6), edm
        by 1 + SNR (Karras et al. 2022, table 1, for σ_data = 1), where SNR = α² / σ². Both are
        converted to the error of the output, which is (a α − b σ) / σ times that of x₀.
        """
        if self.config.loss_weight is LossWeight.uniform:
            return torch.ones_like(timesteps, dtype=torch.float32)
        signal, sigma = self.schedule.levels(timesteps)
        snr = (signal / sigma).square()
        if self.config.loss_weight is LossWeight.min_snr:
            weight = snr.clamp(max=self.config.min_snr_gamma)
        else:
            weight = 1.0 + snr
        of_noise, of_latents = self._mixture(signal, sigma)
        gain = sigma / (of_noise * signal - of_latents * sigma)
        return (weight * gain.square()).float()

    def _mixture(self, signal: Scale, sigma: Scale) -> tuple[Scale | float, Scale | float]:
        """The a and b of the prediction type: its output is a ε + b x₀."""
        match self.config.prediction_type:
            case PredictionType.epsilon:
                return 1.0, 0.0
            case PredictionType.sample:
                return 0.0, 1.0
            case PredictionType.v_prediction:  # Salimans and Ho 2022, section 4
                return signal, -sigma
            case PredictionType.flow:  # Liu et al. 2022, equation 1, with time reversed
                return 1.0, -1.0

    def _levels(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        shape = (-1, *[1] * (like.ndim - 1))
        signal, sigma = self.schedule.levels(timesteps)
        return signal.to(like.dtype).view(shape), sigma.to(like.dtype).view(shape)
