import math
from itertools import chain
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from trainer.runtime import rng
from trainer.runtime.rng import Purpose

WORD = st.integers(0, 2**40)
WORD_MASK = 2**64 - 1


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x64-10, written down from Salmon et al. 2011, section 3.4."""
    a, b, c, d = counter
    first, second = key
    for _ in range(10):
        one, two = 0xD2E7470EE14C6C93 * a, 0xCA5A826395121157 * c
        a, b = (two >> 64) ^ b ^ first, two & WORD_MASK
        c, d = (one >> 64) ^ d ^ second, one & WORD_MASK
        first = (first + 0x9E3779B97F4A7C15) & WORD_MASK
        second = (second + 0xBB67AE8584CAA73B) & WORD_MASK
    return [a, b, c, d]


def one(sample: int, epoch: int = 0) -> tuple[rng.Ids, rng.Ids]:
    return np.array([epoch]), np.array([sample])


def test_philox_here_gives_the_known_answers_of_its_authors() -> None:
    """kat_vectors of Random123, philox4x64 of 10 rounds."""
    assert philox([0] * 4, [0] * 2) == [
        *(0x16554D9ECA36314C, 0xDB20FE9D672D0FDC),
        *(0xD7E772CEE186176B, 0x7E68B68AEC7BA23B),
    ]
    assert philox([WORD_MASK] * 4, [WORD_MASK] * 2) == [
        *(0x87B092C3013FE90B, 0x438C3C67BE8D0224),
        *(0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0),
    ]


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**63 - 1), epoch=WORD, first=WORD, count=st.integers(1, 13))
def test_words_are_those_of_philox_by_seed_purpose_epoch_and_sample(
    seed: int, epoch: int, first: int, count: int
) -> None:
    samples = np.arange(first, first + 3)
    found = rng.words(seed, Purpose.noise, np.full(3, epoch), samples, count)
    for row, sample in zip(found.tolist(), samples.tolist(), strict=True):
        key = [seed, int(Purpose.noise)]
        blocks = [philox([1 + i, 0, epoch, sample], key) for i in range(-(-count // 4))]
        assert row == list(chain.from_iterable(blocks))[:count]


def test_golden_values() -> None:
    """Words, uniform draws and shuffles keep every bit; normal draws all but the last ones."""
    words = rng.words(7, Purpose.noise, *one(11, epoch=2), 3)
    assert words.tolist() == [[0x369F9C3B0475566F, 0x5F510F9C02A56D2F, 0xE505842A4B5E2953]]
    uniform = rng.uniform(7, Purpose.timestep, np.array([0, 2]), np.array([11, 5]))
    assert uniform.tolist() == [0.7419688321764626, 0.8824360023822759]
    assert rng.shuffled(7, Purpose.choice, 0, 0, 10).tolist() == [0, 4, 1, 3, 2, 6, 7, 8, 9, 5]
    normal = rng.normal(7, Purpose.noise, *one(11, epoch=2), (5,))
    expected = [1.7471642, 0.19194908, 1.4027197, 0.09123139, -0.12997207]
    np.testing.assert_allclose(normal, [expected], rtol=1e-6)


@settings(deadline=None, max_examples=30)
@given(seed=WORD, epoch=WORD, first=WORD, split=st.integers(0, 5))
def test_a_draw_belongs_to_its_sample_however_batches_are_cut(
    seed: int, epoch: int, first: int, split: int
) -> None:
    samples = np.arange(first, first + 5)
    epochs = np.full(5, epoch)
    whole = rng.normal(seed, Purpose.noise, epochs, samples, (3, 5))
    parts = [
        rng.normal(seed, Purpose.noise, epochs[part], samples[part], (3, 5))
        for part in (slice(0, split), slice(split, 5))
    ]
    assert np.array_equal(whole, np.concatenate(parts))


@pytest.mark.parametrize("count", [1, 2, 15, 16, 2 * rng.BLOCK + 1])
def test_a_longer_draw_begins_with_the_shorter_one(count: int) -> None:
    samples, epochs = np.arange(3), np.zeros(3, np.int64)
    long = rng.normal(1, Purpose.noise, epochs, samples, (4 * rng.BLOCK + 3,))
    short = rng.normal(1, Purpose.noise, epochs, samples, (count,))
    assert np.array_equal(short, long[:, :count])


def test_seed_purpose_epoch_and_sample_all_matter() -> None:
    def draw(seed: int, purpose: Purpose, epoch: int, sample: int) -> bytes:
        return rng.normal(seed, purpose, *one(sample, epoch), (4,)).tobytes()

    draws = [
        draw(0, Purpose.noise, 0, 0),
        draw(1, Purpose.noise, 0, 0),
        draw(0, Purpose.posterior, 0, 0),
        draw(0, Purpose.noise, 1, 0),
        draw(0, Purpose.noise, 0, 1),
    ]
    assert len(set(draws)) == len(draws)


def exact_box_muller(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Of [n] words: [n, 2], in double precision but for the rounding of the uniform number."""
    draws = []
    for word in words.tolist():
        upper, lower = word >> 32, word & (2**32 - 1)
        radius = math.sqrt(-2 * math.log(np.float32(upper + 0.5) / 2**32))
        turns = lower / 2**32 - (lower >= 2**31)
        draws.append([radius * f(2 * math.pi * turns) for f in (math.cos, math.sin)])
    return np.array(draws)


def test_normal_draws_agree_with_double_precision_to_the_ends_of_their_range() -> None:
    edges = np.array([0, 1, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1], np.uint64)
    corners = (edges[:, None] << np.uint64(32) | edges).ravel()
    words = np.concatenate([corners, np.random.Philox(key=0).random_raw(20_000)])
    found = rng.box_muller(words[None]).reshape(-1, 2)
    np.testing.assert_allclose(found, exact_box_muller(words), atol=1e-6, rtol=0)
    assert abs(found).max() == pytest.approx(6.7637056)


def test_a_million_draws_are_standard_normal() -> None:
    epochs, samples = np.divmod(np.arange(1000), 500)
    draws = rng.normal(3, Purpose.noise, epochs, samples, (10, 100)).astype(np.float64)
    flat = draws.ravel()
    assert stats.kstest(flat, "norm").pvalue > 0.01
    for power, moment, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        error = abs((flat**power).mean() - moment)
        assert error < 4 * math.sqrt(variance / flat.size), power
    assert stats.kstest((flat.reshape(-1, 2) ** 2).sum(1), stats.chi2(2).cdf).pvalue > 0.01
    expected = flat.size * math.erfc(4 / math.sqrt(2))
    assert abs((abs(flat) > 4).sum() - expected) < 4 * math.sqrt(expected)


def test_draws_of_a_word_of_neighbours_and_of_epochs_are_uncorrelated() -> None:
    epochs, samples = np.divmod(np.arange(1000), 500)
    draws = rng.normal(3, Purpose.noise, epochs, samples, (1000,)).astype(np.float64)
    pairs = {
        "word": (draws[:, 0::2], draws[:, 1::2]),
        "words": (draws[:, :-2], draws[:, 2:]),
        "samples": (draws[:-1], draws[1:]),
        "epochs": (draws[:500], draws[500:]),
    }
    for name, (first, second) in pairs.items():
        for power in (1, 2):
            correlation = np.corrcoef(first.ravel() ** power, second.ravel() ** power)[0, 1]
            assert abs(correlation) < 4 / math.sqrt(first.size), (name, power)


def test_several_draws_of_a_sample_are_uniform_and_independent() -> None:
    epochs, samples = np.zeros(20_000, np.int64), np.arange(20_000)
    draws = rng.uniforms(3, Purpose.crop, epochs, samples, 3)
    assert draws[:, 0].tolist() == rng.uniform(3, Purpose.crop, epochs, samples).tolist()
    for number in range(3):
        assert stats.kstest(draws[:, number], "uniform").pvalue > 0.01
    correlations = np.corrcoef(draws.T) - np.eye(3)
    assert np.abs(correlations).max() < 4 / len(draws) ** 0.5


def test_uniform_draws_are_uniform() -> None:
    draws = rng.uniform(3, Purpose.timestep, np.zeros(100_000, np.int64), np.arange(100_000))
    assert draws.dtype == np.float64
    assert draws.min() >= 0
    assert draws.max() < 1
    assert stats.kstest(draws, "uniform").pvalue > 0.01


@settings(deadline=None, max_examples=30)
@given(seed=WORD, size=st.integers(1, 100))
def test_a_shuffle_has_each_number_once(seed: int, size: int) -> None:
    order = rng.shuffled(seed, Purpose.choice, 0, 0, size)
    assert sorted(order.tolist()) == list(range(size))


@settings(deadline=None, max_examples=30)
@given(seed=WORD, size=st.integers(1, 100), data=st.data())
def test_a_choice_among_few_is_the_head_of_a_shuffle(
    seed: int, size: int, data: st.DataObject
) -> None:
    count = data.draw(st.integers(0, size))
    found = rng.chosen(seed, Purpose.choice, 0, 0, size, count)
    assert np.array_equal(found, rng.shuffled(seed, Purpose.choice, 0, 0, size)[:count])


@settings(deadline=None, max_examples=20)
@given(seed=WORD, size=st.integers(2, 40), data=st.data())
def test_a_choice_among_very_many_has_no_number_twice_and_begins_with_a_smaller_one(
    seed: int, size: int, data: st.DataObject
) -> None:
    most, fewer = size // 2, data.draw(st.integers(0, size // 2))
    with patch.object(rng, "MOST_SHUFFLED", 0):
        found = rng.chosen(seed, Purpose.choice, 0, 0, size, most)
        assert np.array_equal(rng.chosen(seed, Purpose.choice, 0, 0, size, fewer), found[:fewer])
    assert len(set(found.tolist())) == most
    assert all(0 <= number < size for number in found.tolist())


def test_a_choice_among_very_many_is_uniform_and_needs_no_memory_for_the_rest() -> None:
    size, count = 5_000_000_000, 50_000
    found = rng.chosen(0, Purpose.choice, 1, 0, size, count)
    assert stats.kstest(found / size, "uniform").pvalue > 0.01
    assert stats.kstest(found[: count // 2] / size, "uniform").pvalue > 0.01
