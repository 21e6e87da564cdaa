"""The split by the content of the images."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.shards.splits import draws

IMAGES = 200_000


@pytest.mark.parametrize("share", [0.001, 0.01, 0.1, 0.5])
@pytest.mark.parametrize("crcs", ["random", "consecutive"])
def test_the_share_is_that_of_a_binomial(share: float, crcs: str) -> None:
    numbers = np.arange(IMAGES)
    found = np.random.default_rng(0).integers(0, 2**32, IMAGES) if crcs == "random" else numbers
    chosen = int((draws(np.full(IMAGES, 5000), found) < share).sum())
    assert abs(chosen - share * IMAGES) < 3 * math.sqrt(IMAGES * share * (1 - share))


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_equal_images_have_equal_draws(size: int, crc: int) -> None:
    many = draws([size, 1, size], [crc, 2, crc])
    assert many[0] == many[2] == draws([size], [crc]).item()
    assert ((many >= 0) & (many < 1)).all()


def test_the_split_stays_what_it_is() -> None:
    """A change would move samples of packed sets from training to validation."""
    assert draws([1000, 2000], [1, 2**32 - 1]).tolist() == [
        0.4383517903045715,
        0.9635132558238895,
    ]
