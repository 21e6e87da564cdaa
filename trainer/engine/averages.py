"""Averages of the weights over training: exponential ones, and power functions of any width.

A power-function average (Karras et al. 2024, "Analyzing and Improving the Training Dynamics of
Diffusion Models", section 3.1) multiplies the weights at time τ by τ^γ. This profile stretches with
the training, so its width is a constant share σ_rel of the time trained. After the training,
snapshots of two such averages give an average of any other width (section 3.2): the linear
combination whose profile is nearest to the wanted one.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from trainer.config import EmaConfig


@dataclass(frozen=True, slots=True)
class Average:
    """A moving average of the weights."""

    name: str
    """Name in checkpoints, in metrics and in ema.use."""
    weight: Callable[[int], float]
    """Maps the number of an applied update (from 1) to the share of the new weights, in [0, 1]."""


def exponential(decay: float) -> Average:
    """Make an exponential moving average, whose window is shorter early in the training."""
    return Average(f"decay_{decay:g}", lambda update: 1 - min(decay, update / (9 + update)))


def power_function(sigma_rel: float) -> Average:
    """Make an average of constant relative width σ_rel, with weights 1 - β_γ(t) (equation 2)."""
    exponent = gamma(sigma_rel) + 1
    return Average(f"sigma_rel_{sigma_rel:g}", lambda update: 1 - (1 - 1 / update) ** exponent)


def averages(config: EmaConfig) -> tuple[Average, ...]:
    """Return the averages that a run keeps, in the order of the config."""
    return (
        *map(exponential, config.decays),
        *map(power_function, config.sigma_rels),
    )


@cache
def gamma(sigma_rel: float) -> float:
    """Return the exponent γ of the profile of relative width sigma_rel, in (0, 0.28].

    σ_rel² = (γ+1) / ((γ+2)² (γ+3)) (equation 3) is a cubic equation. Its largest root belongs to
    the profile that grows with time; from σ_rel = 1/√12 = 0.289 on there is none (γ ≤ 0).
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
    """Fit factors by which the stored averages add up to the wanted one: [len(stored)] float64.

    This is a least squares fit of profiles, which are functions of time (appendix C.2); their inner
    products have a closed form. Unlike the paper's factors, these sum to 1. Constant weights are
    then reproduced exactly, and other weights with 3 to 30 times less error from 8 to 16 snapshots.
    """
    products = _inner_products(stored, stored)
    target = _inner_products(stored, [wanted])[:, 0]
    # the norms of profiles differ by orders of magnitude
    scale = 1 / np.sqrt(np.diagonal(products))
    right = np.stack([target * scale, scale], axis=1)
    solved = np.linalg.lstsq(products * scale[:, None] * scale, right, rcond=None)[0]
    factors, along = (solved * scale[:, None]).T
    return factors + along * (1 - factors.sum()) / along.sum()


def _inner_products(rows: Sequence[Profile], columns: Sequence[Profile]) -> NDArray[np.float64]:
    """Compute ∫ p_i(τ) p_j(τ) dτ of profiles p(τ) = (γ+1) τ^γ / t^(γ+1) on [0, t]."""
    times, gammas = _times_and_gammas(rows)
    other_times, other_gammas = _times_and_gammas(columns)
    t_i, g_i = times[:, None], gammas[:, None]
    t_j, g_j = other_times[None], other_gammas[None]
    # powers of ratios up to 1, because t^γ overflows
    shorter = np.minimum(t_i, t_j)
    overlap = (shorter / t_i) ** g_i * (shorter / t_j) ** g_j * shorter / (t_i * t_j)
    return (g_i + 1) * (g_j + 1) / (g_i + g_j + 1) * overlap


def _times_and_gammas(
    profiles: Sequence[Profile],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    times = np.array([profile.updates for profile in profiles], np.float64)
    return times, np.array([gamma(profile.sigma_rel) for profile in profiles])


def relative_error(stored: Sequence[Profile], wanted: Profile) -> float:
    """Return the relative L2 error of the profile of `combination`."""
    factors = combination(stored, wanted)
    squared = (
        _inner_products([wanted], [wanted])[0, 0]
        - 2 * factors @ _inner_products(stored, [wanted])[:, 0]
        + factors @ _inner_products(stored, stored) @ factors
    )
    return math.sqrt(max(0.0, squared / _inner_products([wanted], [wanted])[0, 0]))
