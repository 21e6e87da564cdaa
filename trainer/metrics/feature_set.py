"""What is known of a set of images: the moments of their features, and features themselves."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.distributed import Ranks
from trainer.metrics.features import FeatureExtractor
from trainer.metrics.frechet import GaussianMoments


@dataclass(frozen=True, slots=True)
class FeatureSet:
    """Features of a set of images, on the CPU of rank 0."""

    moments: GaussianMoments
    """Of all images."""
    rows: Tensor
    """[N, D] float32, in the order of the images: of all of them, of some, or of none."""


class FeatureCollector:
    """Runs one extractor over images that ranks share, a round of batches at a time.

    The batches do not depend on the number of ranks, and rank 0 puts the rows of a round in the
    order of the ranks: so the rows are the same whatever that number.
    """

    def __init__(self, extractor: FeatureExtractor, ranks: Ranks, *, keeps_rows: bool) -> None:
        self._extractor, self._ranks, self._keeps_rows = extractor, ranks, keeps_rows
        self._moments = GaussianMoments(extractor.num_features, ranks.device)
        self._rows: list[Tensor] = [torch.zeros(0, extractor.num_features)]

    def update(self, images: Tensor | None, kept: Tensor | None = None) -> Tensor | None:
        """Adds this rank's batch of a round, or None where the round has none left; collective.

        images: [B, 3, H, W] uint8; kept: [B] bool, whose rows are kept, or None for all.
        Returns the features [B, D] float32.
        """
        features = None
        if images is not None:
            features = self._extractor(images.to(self._ranks.device, non_blocking=True))
            self._moments.update(features)
        if self._keeps_rows:
            rows = None
            if features is not None:
                rows = features.cpu() if kept is None else features.cpu()[kept]
            self._rows += [part for part in self._ranks.collect(rows) if part is not None]
        return features

    def finish(self) -> FeatureSet:
        """The whole set's; collective. Ranks but 0 get no rows."""
        self._ranks.sum_(self._moments.state())
        state = {name: total.cpu() for name, total in self._moments.state().items()}
        return FeatureSet(GaussianMoments.from_state(state), torch.cat(self._rows))


def batches(count: int, size: int, ranks: Ranks) -> Sequence[range]:
    """This rank's batch of each round over 0 … count-1; empty where a round has none for it."""
    starts = range(ranks.rank * size, count + ranks.rank * size, ranks.world_size * size)
    return [range(min(start, count), min(start + size, count)) for start in starts]
