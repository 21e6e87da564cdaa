"""Contradictions between the options of a model; without torch."""

from collections.abc import Iterable, Iterator

from models.config import (
    AutoencoderConfig,
    AutoencoderKind,
    ConditionerConfig,
    DiffusionConfig,
    DiffusionLoss,
    LatentScaling,
    LossWeight,
    NoiseSchedule,
    PredictionType,
    SamplerConfig,
)
from models.config.conditioning import CONDITIONERS
from models.config.domains import outside
from models.config.sampling import SAMPLERS

CONTINUOUS = (NoiseSchedule.edm, NoiseSchedule.flow)


def refuse_first(problems: Iterable[str]) -> None:
    """Raise ValueError with the first problem, if there is one."""
    problem = next(iter(problems), None)
    if problem is not None:
        raise ValueError(problem)


def conditioner_problems(config: ConditionerConfig) -> Iterator[str]:
    """Yield a line for each wrong value or contradiction: path of the option, and the fix."""
    yield from outside(config, "conditioner")
    yield from CONDITIONERS[config.kind].problems(config)


def first_stage_problems(config: AutoencoderConfig, image_size: int) -> Iterator[str]:
    """Yield a line for each contradiction in the training of a first stage."""
    loss, discriminator = config.loss, config.loss.discriminator
    if config.codebook_decay and config.weights:
        yield (
            "autoencoder.weights has no counts for autoencoder.codebook_decay to go on with: let "
            "the codes learn by gradient (autoencoder.codebook_decay=0), or train from scratch"
        )
    if config.codebook_revival and not config.codebook_decay:
        yield "autoencoder.codebook_revival needs autoencoder.codebook_decay, such as 0.99"
    if loss.gan_weight and image_size < 3 * 2**discriminator.layers:
        yield (
            f"autoencoder.loss.discriminator.layers={discriminator.layers} leaves nothing of "
            f"data.image_size={image_size}: take fewer layers"
        )


def identity_problems(config: AutoencoderConfig) -> Iterator[str]:
    """Yield a line for each option that an identity first stage cannot have."""
    if config.kind is not AutoencoderKind.identity:
        return
    if config.latent_channels != config.in_channels:
        yield (
            f"autoencoder.latent_channels={config.latent_channels}: autoencoder.kind=identity "
            f"leaves images as they are, so it has autoencoder.in_channels={config.in_channels}"
        )
    if config.weights:
        yield "autoencoder.weights: autoencoder.kind=identity has none, so leave it empty"


def diffusion_problems(config: DiffusionConfig) -> Iterator[str]:
    """Yield a line for each wrong value or contradiction: path of the option, and the fix."""
    yield from outside(config, "diffusion")
    if config.scaling_factor != 1 and config.latent_scale is not LatentScaling.factor:
        yield (
            f"diffusion.scaling_factor={config.scaling_factor} is not read with "
            f"diffusion.latent_scale={config.latent_scale}: take latent_scale=factor, or leave it "
            "at 1"
        )
    discrete = config.schedule not in CONTINUOUS
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
    if config.schedule in (NoiseSchedule.linear, NoiseSchedule.scaled_linear) and (
        config.beta_start > config.beta_end
    ):
        yield f"diffusion.beta_start={config.beta_start} is over beta_end={config.beta_end}"
    if config.schedule is NoiseSchedule.edm and config.sigma_min >= config.sigma_max:
        yield f"diffusion.sigma_min={config.sigma_min} is not below sigma_max={config.sigma_max}"
    if config.loss is DiffusionLoss.l1 and config.loss_weight is not LossWeight.uniform:
        yield (
            f"diffusion.loss_weight={config.loss_weight} is a weight of squared errors: take "
            "uniform, or diffusion.loss=l2"
        )


def sampler_problems(config: SamplerConfig, diffusion: DiffusionConfig) -> Iterator[str]:
    """Yield a line for each wrong value or contradiction: path of the option, and the fix."""
    yield from outside(config, "sampler")
    if diffusion.schedule not in CONTINUOUS and config.steps > diffusion.num_timesteps:
        yield (
            f"sampler.steps={config.steps}: there are only "
            f"diffusion.num_timesteps={diffusion.num_timesteps}"
        )
    if config.eta > 0 and not SAMPLERS[config.name].uses_eta:
        names = " or ".join(name for name, entry in SAMPLERS.items() if entry.uses_eta)
        yield f"sampler.eta={config.eta} needs sampler.name={names}: set it to 0"
    interval = config.guidance_interval
    if interval != sorted(set(interval)):
        yield f"sampler.guidance_interval={interval} must be [low, high]: low < high"
