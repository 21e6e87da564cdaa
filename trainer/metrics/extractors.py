"""The registry of feature extractors."""

from collections.abc import Callable

from models.clip import Clip
from trainer.config import EvalConfig, Features
from trainer.metrics.clip_features import ClipFeatures
from trainer.metrics.dinov2 import Dinov2
from trainer.metrics.efficientnet import EfficientNetLite0
from trainer.metrics.features import FeatureExtractor
from trainer.metrics.inception import InceptionV3


def build_feature_extractor(
    name: Features, config: EvalConfig, clip: Callable[[], Clip] | None = None
) -> FeatureExtractor:
    """The extractor called name, on the CPU; clip gives the CLIP of open_clip features.

    Raises ValueError or FileNotFoundError where its package or its weights cannot be had.
    """
    match name:
        case Features.efficientnet_lite0:
            return EfficientNetLite0()
        case Features.inception:
            return InceptionV3(config.inception_weights, config.inception_resize)
        case Features.dinov2:
            return Dinov2(config.dinov2_size, config.dinov2_weights)
        case Features.open_clip:
            if clip is None:
                raise ValueError("eval.features: open_clip needs eval.clip_model here")
            return ClipFeatures(clip())
