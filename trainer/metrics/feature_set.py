"""Features of a set of images: mean and covariance, and the features of each image."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.metrics.features import FeatureExtractor
from trainer.metrics.moments import GaussianMoments
from trainer.runtime.ranks import Ranks


@dataclass(frozen=True, slots=True)
class FeatureSet:
    """Features of a set of images, on the CPU of rank 0; other ranks have an empty set."""

    moments: GaussianMoments
    """Mean and covariance over all images."""
    rows: Tensor
    """[N, D] float32, in the order of the images: features of all images, of some, or of none."""


class FeatureCollector:
    """Extracts features of images in rounds; in a round each rank has one batch.

    The batches do not depend on the number of ranks, and rank 0 adds those of a round in the order
    of the ranks. Therefore the result is the same, bit for bit, on any number of ranks.
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        ranks: Ranks,
        *,
        keeps_rows: bool,
        start: FeatureSet | None = None,
    ) -> None:
        """keeps_rows: whether to keep the features of each image.

        start: the features of earlier images, on rank 0.
        """
        self._extractor, self._ranks, self._keeps_rows = extractor, ranks, keeps_rows
        self.width = extractor.num_features
        self._moments = GaussianMoments(self.width, ranks.device)
        self.rows = [torch.zeros(0, self.width)]
        """Features of each batch, [B, D] float32 each; on rank 0."""
        if start is not None:
            self._moments.load(start.moments.state())
            self.rows.append(start.rows)

    def update(self, images: Tensor | None, kept: Tensor | None = None) -> Tensor | None:
        """Add this rank's batch of a round; collective.

        images: [B, 3, H, W] uint8; None if this rank has no batch in the last round.
        kept: [B] bool: the images whose features are kept; None: all.
        Returns the features [B, D] float32 on the device of the rank; None without images.
        """
        features = None
        if images is not None:
            features = self._extractor(images.to(self._ranks.device, non_blocking=True))
        own = None if features is None else (features.cpu(), kept)
        for found in self._ranks.collect(own):
            if found is not None:
                self._add(*found)
        return features

    def _add(self, features: Tensor, kept: Tensor | None) -> None:
        self._moments.update(features)
        if self._keeps_rows:
            self.rows.append(features if kept is None else features[kept])

    def moments(self) -> dict[str, Tensor]:
        """Return the sums of `GaussianMoments.state`, copied to the CPU."""
        return {name: total.cpu() for name, total in self._moments.state().items()}

    def finish(self) -> FeatureSet:
        """Return the features of all ranks' images; empty on all ranks but 0."""
        return FeatureSet(GaussianMoments.from_state(self.moments()), torch.cat(self.rows))


def batches(count: int, size: int, ranks: Ranks, start: int = 0) -> Sequence[range]:
    """Split the numbers start … count-1 into batches; return this rank's batch of each round.

    A batch may be empty in the last round.
    """
    first = start + ranks.rank * size
    starts = range(first, count + ranks.rank * size, ranks.world_size * size)
    return [range(min(begin, count), min(begin + size, count)) for begin in starts]
