"""Averages against their definitions; widths made afterwards against the paths they stand for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config import EmaConfig
from trainer.engine.averages import (
    Profile,
    averages,
    combination,
    exponential,
    gamma,
    power_function,
    relative_error,
)

UPDATES = 4096
SIZE = 30


def path() -> np.ndarray:
    """Weights over a training: a drift that slows down, a random walk, and noise of steps."""
    draws = np.random.default_rng(0)
    drift = np.log1p(np.arange(UPDATES))[:, None] * draws.normal(size=SIZE)
    walk = np.cumsum(draws.normal(size=(UPDATES, SIZE)), 0) / UPDATES**0.5
    return drift + walk + 0.3 * draws.normal(size=(UPDATES, SIZE))


def exact(weights: np.ndarray, updates: int, sigma_rel: float) -> np.ndarray:
    """The definition: the profile, integrated over the time in which each weight stood."""
    edges = (np.arange(updates + 1) / updates) ** (gamma(sigma_rel) + 1)
    return np.diff(edges) @ weights[:updates]


def test_gamma_is_the_papers() -> None:
    # section 3.1 names these two
    assert gamma(0.10) == pytest.approx(6.94, abs=0.005)
    assert gamma(0.05) == pytest.approx(16.97, abs=0.005)


@given(sigma_rel=st.floats(0.005, 0.28))
def test_gamma_gives_the_width_back(sigma_rel: float) -> None:
    exponent = gamma(sigma_rel)
    assert exponent > 0
    width = (exponent + 1) ** 0.5 / (exponent + 2) / (exponent + 3) ** 0.5
    assert width == pytest.approx(sigma_rel, rel=1e-6)


@pytest.mark.parametrize("sigma_rel", [0.02, 0.05, 0.1, 0.25])
def test_a_running_average_is_the_definition(sigma_rel: float) -> None:
    weights, mean = path(), np.zeros(SIZE)
    for update, value in enumerate(weights, 1):
        mean += power_function(sigma_rel).weight(update) * (value - mean)
    np.testing.assert_allclose(mean, exact(weights, UPDATES, sigma_rel), rtol=1e-9)


def test_an_exponential_average_starts_short() -> None:
    average = exponential(0.999)
    assert average.weight(1) == 1 - 1 / 10
    assert average.weight(10**6) == pytest.approx(0.001)


@pytest.mark.parametrize(
    ("sigma_rel", "tolerance"),
    [(0.03, 1e-4), (0.05, 1e-9), (0.07, 1e-5), (0.1, 1e-9), (0.15, 1e-5), (0.2, 2e-4)],
)
def test_snapshots_of_two_widths_give_any_other(sigma_rel: float, tolerance: float) -> None:
    weights = path()
    stored = [
        Profile(updates, width)
        for width in (0.05, 0.1)
        for updates in range(UPDATES // 32, UPDATES + 1, UPDATES // 32)
    ]
    snapshots = np.stack([exact(weights, one.updates, one.sigma_rel) for one in stored])
    wanted = Profile(UPDATES, sigma_rel)
    found = combination(stored, wanted) @ snapshots
    true = exact(weights, UPDATES, sigma_rel)
    assert np.linalg.norm(found - true) < tolerance * np.linalg.norm(true)
    if sigma_rel not in (0.05, 0.1):
        # the stored widths themselves are further from it than the combination, by far
        nearest = min(np.linalg.norm(exact(weights, UPDATES, w) - true) for w in (0.05, 0.1))
        assert np.linalg.norm(found - true) < 0.1 * nearest


@settings(deadline=None, max_examples=20)
@given(
    times=st.lists(st.integers(500, 4000), min_size=2, max_size=6, unique=True),
    sigma_rel=st.floats(0.05, 0.25),
)
def test_the_combination_is_the_least_squares_of_sampled_profiles(
    times: list[int], sigma_rel: float
) -> None:
    stored = [Profile(time, width) for width in (0.05, 0.1) for time in times]
    wanted = Profile(max(times), sigma_rel)
    middles = (np.arange(200_000) + 0.5) / 200_000 * wanted.updates

    def sampled(profile: Profile) -> np.ndarray:
        exponent = gamma(profile.sigma_rel)
        density = (middles / profile.updates) ** exponent * (exponent + 1) / profile.updates
        return np.where(middles <= profile.updates, density, 0.0)

    columns, target = np.stack([sampled(one) for one in stored], 1), sampled(wanted)
    # the sum of 1 is put in: the last factor is what the others leave
    rest, shifted = columns[:, :-1] - columns[:, -1:], target - columns[:, -1]
    best = np.linalg.lstsq(rest, shifted, rcond=None)[0]
    best = np.append(best, 1 - best.sum())
    residual = np.linalg.norm(columns @ best - target) / np.linalg.norm(target)
    assert relative_error(stored, wanted) == pytest.approx(residual, abs=2e-3)
    ours = np.linalg.norm(columns @ combination(stored, wanted) - target) / np.linalg.norm(target)
    assert ours == pytest.approx(residual, abs=2e-3)


def test_names_are_those_of_the_config_in_its_order() -> None:
    config = EmaConfig(decays=[0.999, 0.9999], sigma_rels=[0.05])
    names = [average.name for average in averages(config)]
    assert names == ["decay_0.999", "decay_0.9999", "sigma_rel_0.05"]
