"""Improved precision and recall: how much of the samples is real, and of reality is sampled."""

import torch
from torch import Tensor

NEIGHBOURS = 3
BLOCK = 2048
"""Rows of a distance matrix that are in memory at once."""


def precision_recall(samples: Tensor, reference: Tensor) -> tuple[float, float]:
    """Precision and recall of manifolds (Kynkäänniemi et al. 2019, equations 1 and 2), k = 3.

    A set's manifold is the union of balls around its images, each reaching to the image's k-th
    neighbour in the set. Precision is the share of samples within the reference's manifold, recall
    the share of reference images within that of the samples.
    samples: [N, D]; reference: [M, D] float32. Raises ValueError for 3 images or fewer.
    """
    for rows in (samples, reference):
        if len(rows) <= NEIGHBOURS:
            raise ValueError(f"precision and recall need more than {NEIGHBOURS} images a set")
    return _share_inside(samples, reference), _share_inside(reference, samples)


def _share_inside(points: Tensor, centres: Tensor) -> float:
    """Share of points that lie within a ball around one of the centres."""
    # The nearest is the centre itself, at distance 0.
    radii = torch.cat(
        [
            torch.cdist(rows, centres).kthvalue(NEIGHBOURS + 1).values
            for rows in centres.split(BLOCK)
        ]
    )
    inside = [(torch.cdist(rows, centres) <= radii).any(1) for rows in points.split(BLOCK)]
    return float(torch.cat(inside).double().mean())
