"""Contradictions between the options of a model, found without torch."""

from collections.abc import Iterator

from models.config import (
    AutoencoderConfig,
    ConditionerConfig,
    ConditionerKind,
    DiffusionConfig,
    NoiseSchedule,
    PredictionType,
    SamplerConfig,
    SamplerName,
    TextFeatures,
)

CONTINUOUS = (NoiseSchedule.edm, NoiseSchedule.flow)


def conditioner_problems(config: ConditionerConfig) -> Iterator[str]:
    """One line for each, with the path of the option and what to do."""
    if config.kind is ConditionerKind.class_label and config.num_classes < 1:
        yield f"conditioner.num_classes={config.num_classes}: set it to the data set's classes"
    if config.kind is ConditionerKind.transformers:
        if config.features is TextFeatures.penultimate:
            yield "conditioner.features=penultimate is of conditioner.kind=text; use last or pooled"
        if config.context_length < 1:
            yield f"conditioner.context_length={config.context_length} must be positive"


def first_stage_problems(config: AutoencoderConfig, image_size: int) -> Iterator[str]:
    """Of training one, a line for each, with the path of the option and what to do."""
    loss, discriminator = config.loss, config.loss.discriminator
    if config.codebook_decay and config.weights:
        yield (
            "autoencoder.weights has no counts for autoencoder.codebook_decay to go on with: let "
            "the codes learn by gradient (autoencoder.codebook_decay=0), or train from scratch"
        )
    if config.codebook_revival and not config.codebook_decay:
        yield "autoencoder.codebook_revival needs autoencoder.codebook_decay, such as 0.99"
    if min(discriminator.channels, discriminator.layers) < 1:
        yield "autoencoder.loss.discriminator needs at least 1 channel and 1 layer"
    elif loss.gan_weight and image_size < 3 * 2**discriminator.layers:
        yield (
            f"autoencoder.loss.discriminator.layers={discriminator.layers} leaves nothing of "
            f"data.image_size={image_size}: take fewer layers"
        )


def diffusion_problems(config: DiffusionConfig) -> Iterator[str]:
    """One line for each, with the path of the option and what to do."""
    discrete = config.schedule not in CONTINUOUS
    if config.num_timesteps < 1:
        yield f"diffusion.num_timesteps={config.num_timesteps} must be positive"
    if config.zero_terminal_snr and not discrete:
        yield (
            f"diffusion.zero_terminal_snr rescales betas, and diffusion.schedule={config.schedule} "
            "has none: set it to false"
        )
    if config.prediction_type is PredictionType.epsilon:
        if config.zero_terminal_snr:
            yield (
                "diffusion.zero_terminal_snr: the last timestep is pure noise, from which "
                "diffusion.prediction_type=epsilon learns nothing; use v_prediction"
            )
        if config.schedule is NoiseSchedule.flow:
            yield (
                "diffusion.schedule=flow starts from pure noise, from which "
                "diffusion.prediction_type=epsilon learns nothing; use flow"
            )
    if config.schedule in (NoiseSchedule.linear, NoiseSchedule.scaled_linear) and not (
        0 < config.beta_start <= config.beta_end < 1
    ):
        yield "diffusion needs 0 < beta_start <= beta_end < 1"
    if config.schedule is NoiseSchedule.edm and not 0 < config.sigma_min < config.sigma_max:
        yield "diffusion needs 0 < sigma_min < sigma_max"
    for name in ("log_sigma_std", "flow_shift", "min_snr_gamma"):
        if getattr(config, name) <= 0:
            yield f"diffusion.{name}={getattr(config, name)} must be positive"
    if config.offset_noise < 0:
        yield f"diffusion.offset_noise={config.offset_noise} must not be negative; 0 is none"


def sampler_problems(config: SamplerConfig, diffusion: DiffusionConfig) -> Iterator[str]:
    """One line for each, with the path of the option and what to do."""
    if config.steps < 1:
        yield f"sampler.steps={config.steps} must be positive"
    if diffusion.schedule not in CONTINUOUS and config.steps > diffusion.num_timesteps:
        yield (
            f"sampler.steps={config.steps}: there are only "
            f"diffusion.num_timesteps={diffusion.num_timesteps}"
        )
    if not 0 <= config.eta <= 1:
        yield f"sampler.eta={config.eta} must lie in [0, 1]"
    if config.eta > 0 and config.name is not SamplerName.ddim:
        yield f"sampler.eta={config.eta} needs sampler.name=ddim: set it to 0"
    if not 0 <= config.guidance_rescale <= 1:
        yield f"sampler.guidance_rescale={config.guidance_rescale} must lie in [0, 1]"
    interval = config.guidance_interval
    if len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1:
        yield f"sampler.guidance_interval={interval} must be [low, high] with 0 <= low < high <= 1"
