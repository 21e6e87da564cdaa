"""What every first stage does, and the one that does nothing: pixels are the latents.

Moments are the mean and the log-variance of the posterior over latents, one tensor as in the code
of latent diffusion.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from models.config import AutoencoderConfig

LOG_VARIANCE_RANGE = (-30.0, 20.0)


class Reconstruction(NamedTuple):
    """Outputs of a first stage in training."""

    images: Tensor
    """[B, 3, H, W]."""
    penalty: Tensor
    """Scalar: the posterior's KL divergence from N(0, I) (kl), or the codebook loss (vq)."""
    codes: Tensor | None
    """[B, h, w] int64: indices of the codes (vq)."""


class FirstStage(nn.Module, ABC):
    """Encodes images to moments of latents, and decodes latents to images."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights; fp32 without weights."""
        return next((one.dtype for one in self.parameters()), torch.float32)

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Encode images [B, 3, H, W] in [-1, 1] → moments [B, 2, C, h, w]."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents [B, C, h, w] → images [B, 3, H, W], about in [-1, 1]."""


def deterministic(latents: Tensor) -> Tensor:
    """Return the moments of an encoder without noise: [B, C, h, w] → [B, 2, C, h, w].

    Its constant log-variance of −30, a deviation of 3e-7, is stored like any other.
    """
    return torch.stack([latents, torch.full_like(latents, LOG_VARIANCE_RANGE[0])], dim=1)


class Identity(FirstStage):
    """Leaves images as they are: LDM-1, the baseline in pixels (Rombach et al. 2022, 4.1)."""

    @override
    def encode(self, images: Tensor) -> Tensor:
        return deterministic(images)

    @override
    def decode(self, latents: Tensor) -> Tensor:
        return latents
