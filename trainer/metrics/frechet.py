"""Fréchet distance between Gaussians fitted to streamed features."""

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor


class GaussianMoments:
    """Sufficient statistics of a Gaussian: n, Σx and Σxxᵀ in float64, so that ranks just add."""

    def __init__(self, num_features: int, device: torch.device | str = "cpu") -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self._count = zeros()
        self._sum = zeros(num_features)
        self._outer = zeros(num_features, num_features)

    def update(self, features: Tensor) -> None:
        """Adds samples; features: [B, D], any float type."""
        samples = features.to(self._sum)
        self._count += len(samples)
        self._sum += samples.sum(0)
        self._outer.addmm_(samples.T, samples)

    def state(self) -> dict[str, Tensor]:
        """The live float64 sums: all-reducing them in place with SUM merges ranks."""
        return {"count": self._count, "sum": self._sum, "outer": self._outer}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Self:
        """Moments that hold the sums of state()."""
        moments = cls(len(state["sum"]), state["sum"].device)
        for name, total in moments.state().items():
            total.copy_(state[name])
        return moments

    @property
    def count(self) -> int:
        """Samples seen."""
        return int(self._count)

    @property
    def mean(self) -> Tensor:
        """[D] float64."""
        return self._sum / self._count

    @property
    def cov(self) -> Tensor:
        """Unbiased covariance [D, D] float64, divided by n - 1 as numpy.cov and torch-fidelity.

        Raises ValueError for fewer than two samples.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs two samples or more, not {self.count}")
        mean = self.mean
        return torch.addr(self._outer, mean, self._sum, alpha=-1) / (self._count - 1)


def frechet_distance(a: GaussianMoments, b: GaussianMoments) -> float:
    """Squared Fréchet distance |μa - μb|² + tr(Σa + Σb - 2 (Σa Σb)^½).

    Dowson and Landau 1982, equation 4; on Inception's features it is FID (Heusel et al. 2017).
    With Σ = F Fᵀ, the trace of (Σa Σb)^½ is the sum of the singular values of Faᵀ Fb: no square
    root of a product, so singular covariances (fewer samples than features) are as exact as others.
    Raises ValueError for features that are not finite or differ in number.
    """
    if len(a.mean) != len(b.mean):
        raise ValueError(f"cannot compare {len(a.mean)} features with {len(b.mean)}")
    cov_a, cov_b = a.cov.cpu(), b.cov.cpu()
    if not (cov_a.isfinite().all() and cov_b.isfinite().all()):
        raise ValueError("features hold NaN or infinity: the images are broken or the run diverged")
    mean_term = (a.mean.cpu() - b.mean.cpu()).square().sum()
    cross = torch.linalg.svdvals(_factor(cov_a).T @ _factor(cov_b)).sum()
    distance = mean_term + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(float(distance), 0.0)


def _factor(cov: Tensor) -> Tensor:
    """F [D, rank] with F Fᵀ = cov; drops the eigenvalues that are rounding errors of zero."""
    values, vectors = torch.linalg.eigh(cov)
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] * values[kept].sqrt()
