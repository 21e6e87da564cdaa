"""Improved precision and recall: shares of realistic samples, and of real images covered."""

from collections.abc import Iterator

import torch
from torch import Tensor

from trainer.config import EvalConfig
from trainer.metrics.feature_set import FeatureSet
from trainer.metrics.features import FeatureExtractor

NEIGHBOURS = 3
BLOCK = 2048
"""Most rows of a distance matrix that are in memory at once."""


def compute(
    samples: FeatureSet, reference: FeatureSet, extractor: FeatureExtractor, config: EvalConfig
) -> dict[str, float]:
    """Compute `precision` and `recall`, the metric `precision_recall`."""
    device = extractor.device
    precision, recall = precision_recall(samples.rows.to(device), reference.rows.to(device))
    return {"precision": precision, "recall": recall}


def precision_recall(samples: Tensor, reference: Tensor) -> tuple[float, float]:
    """Compute improved precision and recall (Kynkäänniemi et al. 2019, equations 1 and 2), k = 3.

    The manifold of a set is a union of balls, one around the features of each image; its radius is
    the distance to the k-th nearest neighbour in the set. Precision is the share of samples within
    the manifold of the reference. Recall is the share of reference images within the manifold of
    the samples. Both lie in [0, 1].
    samples: [N, D]; reference: [M, D] float32. Raises: ValueError for 3 images or fewer.
    """
    for rows in (samples, reference):
        if len(rows) <= NEIGHBOURS:
            raise ValueError(f"precision and recall need more than {NEIGHBOURS} images a set")
    return _share_inside(samples, reference), _share_inside(reference, samples)


def _share_inside(points: Tensor, centres: Tensor) -> float:
    """Return the share of points, [N, D], within a ball around one of the centres, [M, D]."""
    # NEIGHBOURS + 1, because each centre is its own nearest neighbour, at distance 0
    radii = torch.cat(
        [distances.kthvalue(NEIGHBOURS + 1).values for distances in _distances(centres, centres)]
    )
    inside = [(distances <= radii).any(1) for distances in _distances(points, centres)]
    return float(torch.cat(inside).double().mean())


def _distances(points: Tensor, centres: Tensor) -> Iterator[Tensor]:
    """Yield the distances of BLOCK points at a time: [B, M]."""
    for start in range(0, len(points), BLOCK):
        yield torch.cdist(points[start : start + BLOCK], centres)
