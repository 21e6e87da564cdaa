"""Options of the networks. No page imports torch, so an error in an option shows at once."""

from models.config.choices import (
    AttentionBackend,
    AutoencoderKind,
    ConditionerKind,
    Degradation,
    DiffusionLoss,
    DiscriminatorNorm,
    LatentScaling,
    LossWeight,
    NoiseSchedule,
    PerceptualFeatures,
    PredictionType,
    SamplerName,
    TextFeatures,
)
from models.config.conditioning import ConditionerConfig
from models.config.diffusion import DiffusionConfig
from models.config.first_stage import AutoencoderConfig, DiscriminatorConfig, FirstStageLossConfig
from models.config.sampling import SamplerConfig
from models.config.unet import UNetConfig

__all__ = [
    "AttentionBackend",
    "AutoencoderConfig",
    "AutoencoderKind",
    "ConditionerConfig",
    "ConditionerKind",
    "Degradation",
    "DiffusionConfig",
    "DiffusionLoss",
    "DiscriminatorConfig",
    "DiscriminatorNorm",
    "FirstStageLossConfig",
    "LatentScaling",
    "LossWeight",
    "NoiseSchedule",
    "PerceptualFeatures",
    "PredictionType",
    "SamplerConfig",
    "SamplerName",
    "TextFeatures",
    "UNetConfig",
]
