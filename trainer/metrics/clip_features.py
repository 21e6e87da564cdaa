"""CLIP's image embeddings as features."""

from collections.abc import Callable

import torch
from torch import Tensor
from typing_extensions import override

from models.conditioning.clip import Clip
from trainer.config import EvalConfig
from trainer.config.choices import Features
from trainer.metrics.features import BICUBIC, FeatureExtractor, bicubic


def build(config: EvalConfig, load_clip: Callable[[], Clip]) -> "ClipFeatures":
    """Build the extractor from the CLIP of evaluation.

    load_clip: loads the CLIP of evaluation.
    Raises: FileNotFoundError or ValueError that names the options of a CLIP that cannot be loaded.
    """
    return ClipFeatures(load_clip())


class ClipFeatures(FeatureExtractor):
    """The image embedding of a CLIP (Radford et al. 2021), not normalised: embed_dim features."""

    mean: Tensor
    std: Tensor

    def __init__(self, clip: Clip) -> None:
        """clip: not changed; this extractor shares its visual tower."""
        resize = BICUBIC.format(size=clip.image_size)
        super().__init__(Features.open_clip, clip.embed_dim, clip.model.visual, resize=resize)
        self._size = clip.image_size
        self.register_buffer("mean", torch.tensor(clip.image_mean).view(3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(clip.image_std).view(3, 1, 1) * 255)

    @override
    def pooled(self, images: Tensor) -> Tensor:
        return self.network((bicubic(images, self._size) - self.mean) / self.std).float()
