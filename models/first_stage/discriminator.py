"""A patch discriminator between images and reconstructions (Isola et al. 2017)."""

import math
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from models.config import DiscriminatorConfig, DiscriminatorNorm

MOST_WIDTH = 8
"""Largest number of channels, as a multiple of the first layer's."""
SLOPE = 0.2
INITIAL_STD = 0.02


class PatchLogits(NamedTuple):
    """Logits [B, 1, h, w] of images and of reconstructions: one a patch, above 0 for real."""

    real: Tensor
    fake: Tensor


class PatchDiscriminator(nn.Module):
    """Strided convolutions (Isola et al. 2017, appendix 6.1.2); 3 layers see 70x70 pixels."""

    def __init__(self, config: DiscriminatorConfig, in_channels: int = 3) -> None:
        super().__init__()
        width = config.channels
        layers: list[nn.Module] = [
            nn.Conv2d(in_channels, width, 4, stride=2, padding=1),
            nn.LeakyReLU(SLOPE),
        ]
        for layer in range(1, config.layers + 1):
            out = config.channels * min(2**layer, MOST_WIDTH)
            stride = 2 if layer < config.layers else 1
            layers += [
                nn.Conv2d(width, out, 4, stride=stride, padding=1, bias=False),
                _norm(config.norm, out),
                nn.LeakyReLU(SLOPE),
            ]
            width = out
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, INITIAL_STD)
            elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
                nn.init.normal_(module.weight, 1.0, INITIAL_STD)

    def classify(self, images: Tensor) -> Tensor:
        """Classify the patches of images [B, 3, H, W] in [-1, 1] → logits [B, 1, h, w]."""
        return self.layers(images)

    def forward(self, images: Tensor, reconstructions: Tensor) -> PatchLogits:
        """Classify both, [B, 3, H, W] in [-1, 1], in two passes: batch norm does not mix them."""
        return PatchLogits(self.classify(images), self.classify(reconstructions))


def _norm(norm: DiscriminatorNorm, channels: int) -> nn.Module:
    match norm:
        case DiscriminatorNorm.group:
            return nn.GroupNorm(math.gcd(32, channels), channels)
        case DiscriminatorNorm.batch:
            return nn.BatchNorm2d(channels)


def hinge_loss(logits: PatchLogits) -> Tensor:
    """Return the discriminator's hinge loss, a scalar in fp32 (Lim and Ye 2017)."""
    real, fake = F.relu(1.0 - logits.real.float()), F.relu(1.0 + logits.fake.float())
    return 0.5 * (real.mean() + fake.mean())


def adversarial_loss(logits: Tensor) -> Tensor:
    """Return the first stage's loss, −mean of [B, 1, h, w] logits, a scalar (Lim and Ye 2017)."""
    return -logits.float().mean()
