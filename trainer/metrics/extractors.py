"""Build feature extractors, and load the CLIP of evaluation."""

from collections.abc import Callable, Iterable

from models.conditioning.clip import Clip, load_clip
from models.config import ConditionerConfig
from models.config.targets import resolve
from trainer.config import Config
from trainer.config.choices import Features
from trainer.config.metrics import FEATURES
from trainer.metrics.features import FeatureExtractor


def load_eval_clip(config: Config) -> Clip:
    """Load eval.clip_model or, if it is empty, the CLIP of the conditioner.

    Raises: ValueError or FileNotFoundError that names the options of a CLIP that cannot be loaded.
    """
    own = config.eval
    if not own.clip_model:
        return load_clip(config.conditioner)
    chosen = ConditionerConfig(model=own.clip_model, pretrained=own.clip_pretrained)
    try:
        return load_clip(chosen)
    except (ValueError, FileNotFoundError) as error:  # it names the options of the conditioner
        raise type(error)(str(error).replace("conditioner.", "eval.clip_")) from error


def build_extractors(
    config: Config, names: Iterable[Features], load_clip: Callable[[], Clip] | None = None
) -> dict[Features, FeatureExtractor]:
    """Build each named extractor once, in host memory.

    load_clip: loads the CLIP of open_clip features; by default load_eval_clip.
    Raises: ValueError or FileNotFoundError if a package or weights are missing.
    """
    load = load_clip or (lambda: load_eval_clip(config))
    return {name: resolve(FEATURES[name].build)(config.eval, load) for name in dict.fromkeys(names)}
