"""Mean and covariance of streamed features."""

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor


class GaussianMoments:
    """Mean and covariance from n, Σx and Σxxᵀ in float64; the sums of ranks can be added."""

    def __init__(self, num_features: int, device: torch.device | str = "cpu") -> None:
        """num_features: D of the features [B, D]. device: of the sums."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self._count = zeros()
        self._sum = zeros(num_features)
        self._outer = zeros(num_features, num_features)

    def update(self, features: Tensor) -> None:
        """Add samples; features: [B, D], any float type, any device."""
        samples = features.to(self._sum)
        self._count += len(samples)
        self._sum += samples.sum(0)
        self._outer.addmm_(samples.T, samples)

    def state(self) -> dict[str, Tensor]:
        """Return the float64 sums themselves, no copies: count [], sum [D], outer [D, D]."""
        return {"count": self._count, "sum": self._sum, "outer": self._outer}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Self:
        """Make moments with the sums of `state`, on their device."""
        moments = cls(len(state["sum"]), state["sum"].device)
        moments.load(state)
        return moments

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Replace the sums by copies of those of `state`, from any device."""
        for name, total in self.state().items():
            total.copy_(state[name])

    @property
    def count(self) -> int:
        """Number of samples."""
        return int(self._count)

    @property
    def mean(self) -> Tensor:
        """Mean [D] float64."""
        return self._sum / self._count

    @property
    def cov(self) -> Tensor:
        """Unbiased covariance [D, D] float64, with the divisor n - 1 of numpy.cov.

        Raises: ValueError for fewer than two samples.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs two samples or more, not {self.count}")
        mean = self.mean
        return torch.addr(self._outer, mean, self._sum, alpha=-1) / (self._count - 1)
