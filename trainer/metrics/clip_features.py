"""open_clip's image embeddings as features."""

import torch
from torch import Tensor

from models.clip import Clip
from trainer.config import Features
from trainer.metrics.features import BICUBIC, FeatureExtractor, bicubic


class ClipFeatures(FeatureExtractor):
    """The image embedding of a CLIP (Radford et al. 2021), not normalised."""

    mean: Tensor
    std: Tensor

    def __init__(self, clip: Clip) -> None:
        """clip stays whole: its visual tower is shared with whatever else holds it."""
        resize = BICUBIC.format(size=clip.image_size)
        super().__init__(Features.open_clip, clip.embed_dim, clip.model.visual, resize=resize)
        self._size = clip.image_size
        self.register_buffer("mean", torch.tensor(clip.image_mean).view(3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(clip.image_std).view(3, 1, 1) * 255)

    def pooled(self, images: Tensor) -> Tensor:
        """images: [B, 3, H, W] uint8; returns [B, width] float32."""
        return self.network((bicubic(images, self._size) - self.mean) / self.std).float()
