"""Fréchet distance of Gaussians that are fitted to features; on Inception's features: FID."""

from typing import Any

import torch
from torch import Tensor

from trainer.config import EvalConfig
from trainer.metrics.feature_set import FeatureSet
from trainer.metrics.features import FeatureExtractor
from trainer.metrics.moments import GaussianMoments

_linalg: Any = torch.linalg  # torch declares no types for it


def compute(
    samples: FeatureSet, reference: FeatureSet, extractor: FeatureExtractor, config: EvalConfig
) -> dict[str, float]:
    """Compute `fd`, the metric `frechet`."""
    return {"fd": frechet_distance(samples.moments, reference.moments)}


def frechet_distance(a: GaussianMoments, b: GaussianMoments) -> float:
    """Compute the squared Fréchet distance |μa - μb|² + tr(Σa + Σb - 2 (Σa Σb)^½).

    Dowson and Landau 1982, equation 4; FID on Inception's features (Heusel et al. 2017, equation
    6). a, b: moments of D features each. The unit is that of the features, squared; 0 is best.
    With Σ = F Fᵀ, the trace of (Σa Σb)^½ is the sum of the singular values of Faᵀ Fb. This needs
    no square root of a matrix, so it is exact for singular covariances (fewer samples than D), too.
    Raises: ValueError for features that are not finite, for other numbers of features, or for
    fewer than two samples.
    """
    if len(a.mean) != len(b.mean):
        raise ValueError(f"cannot compare {len(a.mean)} features with {len(b.mean)}")
    cov_a, cov_b = a.cov.cpu(), b.cov.cpu()
    if not (cov_a.isfinite().all() and cov_b.isfinite().all()):
        raise ValueError("features hold NaN or infinity: the images are broken or the run diverged")
    mean_term = (a.mean.cpu() - b.mean.cpu()).square().sum()
    cross: Tensor = _linalg.svdvals(_factor(cov_a).T @ _factor(cov_b)).sum()
    distance = mean_term + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(float(distance), 0.0)


def _factor(cov: Tensor) -> Tensor:
    """Factor a covariance [D, D] into F Fᵀ, F: [D, rank]; drop eigenvalues that are 0 but for
    rounding.
    """
    values: Tensor
    vectors: Tensor
    values, vectors = _linalg.eigh(cov)
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] * values[kept].sqrt()
