import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer import rng
from trainer.rng import Purpose

WORD = st.integers(0, 2**40)


@settings(deadline=None, max_examples=30)
@given(seed=WORD, epoch=WORD, first=WORD, split=st.integers(0, 5))
def test_a_draw_belongs_to_its_sample_however_batches_are_cut(
    seed: int, epoch: int, first: int, split: int
):
    samples = np.arange(first, first + 5)
    epochs = np.full(5, epoch)
    whole = rng.normal(seed, Purpose.noise, epochs, samples, (2, 3))
    parts = [
        rng.normal(seed, Purpose.noise, epochs[part], samples[part], (2, 3))
        for part in (slice(0, split), slice(split, 5))
    ]
    assert np.array_equal(whole, np.concatenate(parts))


def test_seed_purpose_epoch_and_sample_all_matter():
    def draw(seed: int, purpose: Purpose, epoch: int, sample: int) -> bytes:
        ids = np.array([epoch]), np.array([sample])
        return rng.normal(seed, purpose, *ids, (4,)).tobytes()

    draws = [
        draw(0, Purpose.noise, 0, 0),
        draw(1, Purpose.noise, 0, 0),
        draw(0, Purpose.posterior, 0, 0),
        draw(0, Purpose.noise, 1, 0),
        draw(0, Purpose.noise, 0, 1),
    ]
    assert len(set(draws)) == len(draws)


def test_draws_are_standard_normal_and_uniform():
    samples, epochs = np.arange(2000), np.zeros(2000, np.int64)
    normal = rng.normal(3, Purpose.noise, epochs, samples, (50,))
    assert abs(normal.mean()) < 0.02
    assert abs(normal.std() - 1) < 0.02
    uniform = rng.uniform(3, Purpose.timestep, epochs, samples)
    counts = np.histogram(uniform, bins=4, range=(0, 1))[0]
    assert counts.min() > 400
