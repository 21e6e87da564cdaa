"""A network that tells reconstructions from images, patch by patch (Isola et al. 2017)."""

import math
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from models.config import DiscriminatorConfig, DiscriminatorNorm

MOST_WIDTH = 8
"""Channels stop growing at so many times the first layer's."""
SLOPE = 0.2
INITIAL_STD = 0.02


class Verdict(NamedTuple):
    """Logits [B, 1, h, w], one a patch; above 0 it looks real."""

    real: Tensor
    fake: Tensor


class PatchDiscriminator(nn.Module):
    """Strided convolutions; with three layers a logit sees 70x70 pixels."""

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

    def judge(self, images: Tensor) -> Tensor:
        """images: [B, 3, H, W] in [-1, 1] → logits [B, 1, h, w]."""
        return self.layers(images)

    def forward(self, images: Tensor, reconstructions: Tensor) -> Verdict:
        """Both [B, 3, H, W]; a batch norm sees one after the other."""
        return Verdict(self.judge(images), self.judge(reconstructions))


def _norm(norm: DiscriminatorNorm, channels: int) -> nn.Module:
    match norm:
        case DiscriminatorNorm.group:
            return nn.GroupNorm(math.gcd(32, channels), channels)
        case DiscriminatorNorm.batch:
            return nn.BatchNorm2d(channels)


def hinge_loss(verdict: Verdict) -> Tensor:
    """The discriminator's loss (Lim and Ye 2017, as in Esser et al. 2021), a scalar."""
    real, fake = F.relu(1.0 - verdict.real.float()), F.relu(1.0 + verdict.fake.float())
    return 0.5 * (real.mean() + fake.mean())


def adversarial_loss(logits: Tensor) -> Tensor:
    """What the first stage gains by convincing: the negative mean logit of reconstructions."""
    return -logits.float().mean()
