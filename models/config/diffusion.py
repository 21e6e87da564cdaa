"""Options of the forward process and of the training target."""

from dataclasses import dataclass

from models.config.choices import (
    DiffusionLoss,
    LatentScaling,
    LossWeight,
    NoiseSchedule,
    PredictionType,
)


@dataclass(slots=True, kw_only=True)
class DiffusionConfig:
    """The forward process and the training target."""

    latent_scale: LatentScaling = LatentScaling.auto
    """Scale of the latents; sampling and exports take that of the training."""
    scaling_factor: float = 1.0
    """[1, > 0, ≤ 10^6] latent_scale=factor: number that multiplies the latents, such as Stable
    Diffusion's 0.18215."""
    schedule: NoiseSchedule = NoiseSchedule.scaled_linear
    """Noise schedule."""
    num_timesteps: int = 1000
    """[timesteps, ≥ 1, ≤ 10^6] Levels of a discrete schedule. flow: the U-Net's timestep is the
    time in [0, 1] times this."""
    beta_start: float = 0.00085
    """[1, > 0, < 1] linear and scaled_linear: variance of the noise added by the first timestep."""
    beta_end: float = 0.012
    """[1, > 0, < 1] linear and scaled_linear: variance of the noise added by the last timestep."""
    zero_terminal_snr: bool = False
    """Rescale betas to end in pure noise (Lin et al. 2024, algorithm 1)."""
    log_sigma_mean: float = 0.0
    """[1, ≥ -100, ≤ 100] edm and flow: mean of log(noise / signal) in training (P_mean and m in the
    papers)."""
    log_sigma_std: float = 1.0
    """[1, > 0, ≤ 100] edm and flow: standard deviation of log(noise / signal) in training (P_std
    and s)."""
    sigma_min: float = 0.004
    """[deviations of the latents, > 0, ≤ 10^6] edm: noise / signal at the last sampling step."""
    sigma_max: float = 160.0
    """[deviations of the latents, > 0, ≤ 10^6] edm: noise / signal at the first sampling step."""
    flow_shift: float = 1.0
    """[1, > 0, ≤ 1000] flow: values over 1 move times towards noise, for large images (Esser et al.
    2024, equation 23)."""
    prediction_type: PredictionType = PredictionType.v_prediction
    """Target of the U-Net's output."""
    loss: DiffusionLoss = DiffusionLoss.l2
    """Error of the U-Net's output in training."""
    loss_weight: LossWeight = LossWeight.uniform
    """Weight of the loss by timestep; with loss=l1, uniform."""
    min_snr_gamma: float = 5.0
    """[1, > 0, ≤ 10^6] Cap of the signal-to-noise ratio in the min_snr weight (Hang et al. 2023,
    equation 6)."""
    offset_noise: float = 0.0
    """[deviations of the noise, ≥ 0, ≤ 100] Extra noise, one value a channel, for very dark and
    bright images; 0: none."""
