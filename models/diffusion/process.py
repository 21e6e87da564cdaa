"""The forward process: noisy latents, training targets, and x₀ and ε from the model output.

Notation: `models.diffusion.schedules`. The output of every prediction type is a sum a ε + b x₀ of
noise and latents. With x_t = α x₀ + σ ε, it determines both:

    x₀ = (a x_t − σ · output) / (a α − b σ)      ε = (α · output − b x_t) / (a α − b σ)
"""

from typing import Self, TypeVar

import torch
from torch import Tensor

from models.checks import diffusion_problems, refuse_first
from models.config import DiffusionConfig, DiffusionLoss, LossWeight, PredictionType
from models.diffusion.schedules import NoiseLevel, build_schedule

Scale = TypeVar("Scale", float, Tensor)


class Diffusion:
    """A noise schedule with a prediction type and a weight of the loss.

    Raises: ValueError naming the options that contradict each other.
    """

    def __init__(self, config: DiffusionConfig) -> None:
        refuse_first(diffusion_problems(config))
        self.config = config
        self.schedule = build_schedule(config)

    def to(self, device: torch.device | str) -> Self:
        """Move the schedule's tables to the device of the timesteps; return the process."""
        self.schedule.to(device)
        return self

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return x_t = α x₀ + σ ε (Ho et al. 2020, equation 4).

        latents, noise: [B, ...]; timesteps: [B] → [B, ...] in the latents' dtype.
        """
        signal, sigma = self._levels(timesteps, latents)
        return signal * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the training target a ε + b x₀ of the denoiser.

        latents, noise: [B, ...]; timesteps: [B] → [B, ...] in the latents' dtype.
        """
        of_noise, of_latents = self._mixture(*self._levels(timesteps, latents))
        return of_noise * noise + of_latents * latents

    def to_denoised_and_noise(
        self, model_output: Tensor, noisy: Tensor, level: NoiseLevel
    ) -> tuple[Tensor, Tensor]:
        """Convert the model output at one level to x₀ and ε, by the equations of this module.

        model_output, noisy: [B, ...] → two of [B, ...].
        """
        of_noise, of_latents = self._mixture(level.signal, level.noise)
        scale = of_noise * level.signal - of_latents * level.noise
        denoised = (of_noise * noisy - level.noise * model_output) / scale
        epsilon = (level.signal * model_output - of_latents * noisy) / scale
        return denoised, epsilon

    def errors(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the mean error of each sample's output, squared (l2) or absolute (l1).

        output, target: [B, ...] → [B] in the target's dtype.
        """
        difference = output.to(target.dtype) - target
        if self.config.loss is DiffusionLoss.l1:
            return difference.abs().flatten(1).mean(1)
        return difference.square().flatten(1).mean(1)

    def loss_weight(self, timesteps: Tensor) -> Tensor:
        """Return the weight of `errors`: timesteps [B] → [B] float32.

        With SNR = α² / σ², min_snr weighs the squared error of x₀ by min(SNR, γ) (Hang et al. 2023,
        equation 6), and edm by 1 + SNR (Karras et al. 2022, table 1, for σ_data = 1). The error of
        the output is g = (a α − b σ) / σ times the error of x₀: both weights are divided by g².
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
        """Return a and b of the prediction type, whose output is a ε + b x₀."""
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
