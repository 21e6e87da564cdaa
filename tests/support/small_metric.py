"""A metric and a feature extractor as small as docs/extending.md shows them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from models.conditioning.clip import Clip
from tests.support.enums import add_member
from trainer.config import EvalConfig
from trainer.config.choices import Features
from trainer.config.metrics import FEATURES, FeaturesEntry
from trainer.metrics.feature_set import FeatureSet
from trainer.metrics.features import FeatureExtractor


def compute(
    samples: FeatureSet, reference: FeatureSet, extractor: FeatureExtractor, config: EvalConfig
) -> dict[str, float]:
    """Compute `agreement`: 1 where both sets have the same mean features, else less."""
    gap = (samples.moments.mean - reference.moments.mean).norm()
    return {"agreement": float(torch.exp(-gap))}


class MeanColour(FeatureExtractor):
    """The mean of each channel."""

    def __init__(self, name: Features) -> None:
        """name: under which it stands in for a larger network."""
        network = torch.nn.Conv2d(3, 3, 1, bias=False)
        torch.nn.init.dirac_(network.weight)
        super().__init__(name, 3, network, resize="none")

    def pooled(self, images: Tensor) -> Tensor:
        """images: [B, 3, H, W] uint8; returns [B, 3] float32."""
        return self.network(images.float() / 255).mean((2, 3))


def build(config: EvalConfig, load_clip: Callable[[], Clip]) -> MeanColour:
    """Build the extractor; it has no options."""
    return MeanColour(Features["mean_colour"])


def add_mean_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let eval.features accept mean_colour until the test ends."""
    features = add_member(monkeypatch, Features, "mean_colour")
    entry = FeaturesEntry(title="mean colour", build="tests.support.small_metric:build")
    monkeypatch.setitem(FEATURES, features, entry)
