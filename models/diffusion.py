"""The forward process, what the denoiser learns from it, and how its output is read.

Notation: x₀ latents, ε noise, x_t = α_t x₀ + σ_t ε with α_t² + σ_t² = 1 (Ho et al. 2020,
equation 4); ᾱ_t = α_t² is `alphas_cumprod`; the signal-to-noise ratio is α_t² / σ_t².
"""

import math

import torch
from torch import Tensor

from models.config import BetaSchedule, DiffusionConfig, LossWeight, PredictionType

COSINE_OFFSET = 0.008
MAX_BETA = 0.999


class Diffusion:
    """A noise schedule with its prediction type; tables of one value a timestep, in fp32.

    Raises ValueError when the schedule ends in pure noise and the prediction is the noise itself:
    it would say nothing about the latents there.
    """

    def __init__(self, config: DiffusionConfig) -> None:
        if config.zero_terminal_snr and config.prediction_type is PredictionType.epsilon:
            raise ValueError(
                "diffusion.zero_terminal_snr does not work with diffusion.prediction_type=epsilon: "
                "use v_prediction or sample"
            )
        self.config = config
        self.num_timesteps = config.num_timesteps
        alphas_cumprod = (1.0 - _betas(config)).cumprod(dim=0)
        if config.zero_terminal_snr:
            alphas_cumprod = _with_zero_terminal_snr(alphas_cumprod)
        self.alphas_cumprod = alphas_cumprod.float()
        self.signal = alphas_cumprod.sqrt().float()
        self.noise = (1.0 - alphas_cumprod).sqrt().float()

    def to(self, device: torch.device | str) -> "Diffusion":
        """Move the tables to where the timesteps will be; returns itself."""
        self.alphas_cumprod = self.alphas_cumprod.to(device)
        self.signal = self.signal.to(device)
        self.noise = self.noise.to(device)
        return self

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t (Ho et al. 2020, equation 4). latents, noise: [B, ...]; timesteps: [B] int64."""
        signal, sigma = self._levels(timesteps, latents)
        return signal * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the denoiser should return; v = α_t ε − σ_t x₀ (Salimans and Ho 2022, section 4).

        latents, noise: [B, ...]; timesteps: [B] int64 → [B, ...].
        """
        match self.config.prediction_type:
            case PredictionType.epsilon:
                return noise
            case PredictionType.sample:
                return latents
            case PredictionType.v_prediction:
                signal, sigma = self._levels(timesteps, latents)
                return signal * noise - sigma * latents

    def to_denoised_and_noise(
        self, model_output: Tensor, noisy: Tensor, timesteps: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The x₀ and the ε that the output stands for (Salimans and Ho 2022, section 4).

        model_output, noisy: [B, ...]; timesteps: [B] int64 → two of [B, ...].
        """
        signal, sigma = self._levels(timesteps, noisy)
        match self.config.prediction_type:
            case PredictionType.epsilon:
                return (noisy - sigma * model_output) / signal, model_output
            case PredictionType.sample:
                return model_output, (noisy - signal * model_output) / sigma
            case PredictionType.v_prediction:
                denoised = signal * noisy - sigma * model_output
                return denoised, sigma * noisy + signal * model_output

    def loss_weight(self, timesteps: Tensor) -> Tensor:
        """Weight of the squared error of `target` at each timestep: [B] int64 → [B].

        min_snr caps the weight that the error of x₀ gets at γ (Hang et al. 2023, equation 6), and
        converts it to the prediction type's error (section 3.4): the error of ε is SNR times that
        of x₀, the error of v is SNR + 1 times. With zero_terminal_snr the last timestep weighs 0.
        """
        if self.config.loss_weight is LossWeight.uniform:
            return torch.ones_like(timesteps, dtype=torch.float32)
        snr = (self.signal[timesteps] / self.noise[timesteps]).square()
        capped = snr.clamp(max=self.config.min_snr_gamma)
        match self.config.prediction_type:
            case PredictionType.epsilon:
                return capped / snr
            case PredictionType.sample:
                return capped
            case PredictionType.v_prediction:
                return capped / (snr + 1.0)

    def _levels(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        shape = (-1, *[1] * (like.ndim - 1))
        return self.signal[timesteps].view(shape), self.noise[timesteps].view(shape)


def _betas(config: DiffusionConfig) -> Tensor:
    start, end, steps = config.beta_start, config.beta_end, config.num_timesteps
    match config.schedule:
        case BetaSchedule.linear:
            return torch.linspace(start, end, steps, dtype=torch.float64)
        case BetaSchedule.scaled_linear:
            roots = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64)
            return roots.square()
        case BetaSchedule.cosine:
            # Nichol and Dhariwal 2021, equation 17.
            times = torch.linspace(0.0, 1.0, steps + 1, dtype=torch.float64)
            angles = (times + COSINE_OFFSET) / (1.0 + COSINE_OFFSET) * (math.pi / 2.0)
            alphas_cumprod = angles.cos().square()
            return (1.0 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(max=MAX_BETA)


def _with_zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Shift √ᾱ to end at 0, scale it to start as before (Lin et al. 2024, algorithm 1)."""
    roots = alphas_cumprod.sqrt()
    first, last = roots[0], roots[-1]
    return ((roots - last) * first / (first - last)).square()
