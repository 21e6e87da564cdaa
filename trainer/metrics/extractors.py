"""The registry of feature extractors."""

from collections.abc import Callable

from models.clip import Clip, load_clip
from models.config import ConditionerConfig
from trainer.config import Config, EvalConfig, Features
from trainer.metrics.clip_features import ClipFeatures
from trainer.metrics.dinov2 import Dinov2
from trainer.metrics.efficientnet import EfficientNetLite0
from trainer.metrics.features import FeatureExtractor
from trainer.metrics.inception import InceptionV3


def load_eval_clip(config: Config) -> Clip:
    """The CLIP of evaluation, eval.clip_model's, or else the conditioner's.

    Raises ValueError or FileNotFoundError naming the options of the one that cannot be loaded.
    """
    own = config.eval
    if not own.clip_model:
        return load_clip(config.conditioner)
    chosen = ConditionerConfig(model=own.clip_model, pretrained=own.clip_pretrained)
    try:
        return load_clip(chosen)
    except (ValueError, FileNotFoundError) as error:  # which name the conditioner's options
        raise type(error)(str(error).replace("conditioner.", "eval.clip_")) from error


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
