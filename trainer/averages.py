"""Averages of the weights over training: exponential ones, and power functions of any width.

A power-function average (Karras et al. 2024, "Analyzing and Improving the Training Dynamics of
Diffusion Models", section 3.1) weighs the weights of time τ by τ^γ: its profile stretches with the
training, and its width is a constant share σ_rel of the time trained. Of snapshots of two such
averages an average of any other width can be made afterwards (section 3.2): the linear combination
whose profile is nearest to the one wanted.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from trainer.config import EmaConfig

WIDEST = 0.28
"""Widths from 1/√12 on would need γ below 0: a profile that weighs early weights most."""


class Average(Protocol):
    """How one average moves."""

    @property
    def name(self) -> str:
        """What checkpoints, metrics and ema.use call it."""
        ...

    def weight(self, update: int) -> float:
        """Share of the new weights after applied update `update` (from 1), in [0, 1]."""
        ...


@dataclass(frozen=True, slots=True)
class Exponential:
    """An exponential moving average, shorter while the training is young."""

    decay: float

    @property
    def name(self) -> str:
        """See Average."""
        return f"decay_{self.decay:g}"

    def weight(self, update: int) -> float:
        """See Average."""
        return 1 - min(self.decay, update / (9 + update))


@dataclass(frozen=True, slots=True)
class PowerFunction:
    """An average of a constant relative width σ_rel."""

    sigma_rel: float

    @property
    def name(self) -> str:
        """See Average."""
        return f"sigma_rel_{self.sigma_rel:g}"

    def weight(self, update: int) -> float:
        """1 - β_γ(t) (equation 2); see Average."""
        return 1 - (1 - 1 / update) ** (gamma(self.sigma_rel) + 1)


def averages(config: EmaConfig) -> tuple[Average, ...]:
    """The averages that a run keeps, in the order of the config."""
    return (
        *(Exponential(decay) for decay in config.decays),
        *(PowerFunction(sigma_rel) for sigma_rel in config.sigma_rels),
    )


def average_kind(name: str) -> str:
    """The kind of the tensors of an average, in the optimizer's state and in checkpoints."""
    return f"ema.{name}"


@cache
def gamma(sigma_rel: float) -> float:
    """The exponent γ of the profile of this relative width, in (0, WIDEST].

    σ_rel² = (γ+1) / ((γ+2)² (γ+3)) (equation 3) is a cubic equation; its largest root is the one
    whose profile grows with time.
    """
    inverse = sigma_rel**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return float(roots.real.max())


@dataclass(frozen=True, slots=True)
class Profile:
    """The profile of a power-function average after `updates` applied updates."""

    updates: int
    sigma_rel: float


def combination(stored: Sequence[Profile], wanted: Profile) -> NDArray[np.float64]:
    """Factors of the stored averages whose sum is nearest to the wanted one: [len(stored)].

    The least squares between profiles as functions of time (appendix C.2): their inner products
    have a closed form, so that nothing is sampled. Unlike the paper's, the factors are held to a
    sum of 1: weights that stand still are then met exactly, and others 3 to 30 times closer from 8
    to 16 snapshots.
    """
    products = _inner_products(stored, stored)
    target = _inner_products(stored, [wanted])[:, 0]
    # profiles are normalised first: their norms differ by orders of magnitude
    scale = 1 / np.sqrt(np.diagonal(products))
    right = np.stack([target * scale, scale], axis=1)
    solved = np.linalg.lstsq(products * scale[:, None] * scale, right, rcond=None)[0]
    factors, along = (solved * scale[:, None]).T
    return factors + along * (1 - factors.sum()) / along.sum()


def _inner_products(rows: Sequence[Profile], columns: Sequence[Profile]) -> NDArray[np.float64]:
    """∫ p_i(τ) p_j(τ) dτ of profiles p(τ) = (γ+1) τ^γ / t^(γ+1) on [0, t]."""
    times, gammas = _times_and_gammas(rows)
    other_times, other_gammas = _times_and_gammas(columns)
    t_i, g_i = times[:, None], gammas[:, None]
    t_j, g_j = other_times[None], other_gammas[None]
    # powers of ratios at most 1: t^γ itself overflows
    shorter = np.minimum(t_i, t_j)
    overlap = (shorter / t_i) ** g_i * (shorter / t_j) ** g_j * shorter / (t_i * t_j)
    return (g_i + 1) * (g_j + 1) / (g_i + g_j + 1) * overlap


def _times_and_gammas(
    profiles: Sequence[Profile],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    times = np.array([profile.updates for profile in profiles], np.float64)
    return times, np.array([gamma(profile.sigma_rel) for profile in profiles])


def relative_error(stored: Sequence[Profile], wanted: Profile) -> float:
    """Distance of the combination's profile from the wanted one, as a share of its norm."""
    factors = combination(stored, wanted)
    squared = (
        _inner_products([wanted], [wanted])[0, 0]
        - 2 * factors @ _inner_products(stored, [wanted])[:, 0]
        + factors @ _inner_products(stored, stored) @ factors
    )
    return math.sqrt(max(0.0, squared / _inner_products([wanted], [wanted])[0, 0]))
