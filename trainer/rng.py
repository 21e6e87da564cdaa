"""Randomness as a function of (seed, purpose, epoch, sample): never of rank, worker or history.

Every draw owns a Philox counter block (Salmon et al. 2011), so a sample sees the same noise on any
number of ranks, and a resumed run needs no saved generator state.
"""

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


class Purpose(IntEnum):
    """What a draw is for; draws of different purposes are independent."""

    flip = 0
    posterior = 1
    timestep = 2
    noise = 3
    condition_dropout = 4
    sampling = 5
    sampler_step = 6
    choice = 7
    offset_noise = 8
    caption = 9


def generator(seed: int, purpose: Purpose, epoch: int, sample: int) -> np.random.Generator:
    """The generator of one sample's draw; its counter block is 2^64 draws long."""
    return np.random.Generator(
        np.random.Philox(key=[seed, int(purpose)], counter=[0, 0, epoch, sample])
    )


def uniform(seed: int, purpose: Purpose, epochs: Ids, samples: Ids) -> NDArray[np.float64]:
    """One draw from [0, 1) for each sample: [B] float64."""
    return np.array(
        [
            generator(seed, purpose, int(epoch), int(sample)).random()
            for epoch, sample in zip(epochs, samples, strict=True)
        ]
    )


def normal(
    seed: int, purpose: Purpose, epochs: Ids, samples: Ids, shape: Sequence[int]
) -> NDArray[np.float32]:
    """Standard normal draws for each sample: [B, *shape] float32."""
    out = np.empty((len(samples), *shape), np.float32)
    for row, epoch, sample in zip(out, epochs, samples, strict=True):
        generator(seed, purpose, int(epoch), int(sample)).standard_normal(out=row, dtype=np.float32)
    return out
