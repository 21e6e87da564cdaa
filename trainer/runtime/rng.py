"""Random draws as functions of (seed, purpose, epoch, sample).

Every draw has its own block of Philox counters (Salmon et al. 2011). A sample therefore gets the
same noise on any number of ranks, and a resumed run needs no saved generator state. Numpy
guarantees the words of Philox across versions, but not the draws of `np.random.Generator`. This
module turns the words into draws.
"""

import math
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from data.order.lanes import permutation
from data.shards.manifest import Ids

NORMAL_STREAM = "philox, box-muller"
"""Name of the draws of `normal`. Change it with them: figures from other draws differ."""
CHOICE_STREAM = "philox, sorted"
"""Name of the draws of `chosen`. Change it with them."""

MOST_SHUFFLED = 2**24
"""Largest size of a range that `chosen` shuffles whole: 128 MiB of words."""
BLOCK = 2**13
"""Words that `box_muller` transforms at once: their arrays fit into a core's cache."""


class Purpose(IntEnum):
    """Purpose of a draw; draws for different purposes are independent."""

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
    crop = 10
    condition = 11
    condition_noise = 12


def seed_torch(seed: int) -> None:
    """Seed torch's global generators, which draw the initial weights of networks."""
    torch.manual_seed(seed)


def words(seed: int, purpose: Purpose, epochs: Ids, samples: Ids, count: int) -> NDArray[np.uint64]:
    """Return the first `count` of the 2^130 words of each sample's draw: [B, count] uint64."""
    philox = np.random.Philox(key=[seed, int(purpose)])
    start = philox.state
    out = np.empty((len(samples), count), np.uint64)
    for row, epoch, sample in zip(out, epochs.tolist(), samples.tolist(), strict=True):
        start["state"]["counter"][2:] = epoch, sample
        philox.state = start  # costs a sixth of a new Philox
        row[:] = philox.random_raw(count)
    return out


def uniform(seed: int, purpose: Purpose, epochs: Ids, samples: Ids) -> NDArray[np.float64]:
    """Draw from [0, 1) for each sample, in multiples of 2^-53: [B] float64."""
    return uniforms(seed, purpose, epochs, samples, 1)[:, 0]


def uniforms(
    seed: int, purpose: Purpose, epochs: Ids, samples: Ids, count: int
) -> NDArray[np.float64]:
    """Draw several numbers for each sample, the first of them as in `uniform`: [B, count]."""
    found = words(seed, purpose, epochs, samples, count)
    return (found >> np.uint64(11)) * np.float64(2**-53)


def shuffled(seed: int, purpose: Purpose, epoch: int, sample: int, size: int) -> Ids:
    """Shuffle the numbers 0 to size - 1: [size] int64."""
    return permutation(words(seed, purpose, np.array([epoch]), np.array([sample]), size)[0])


def chosen(seed: int, purpose: Purpose, epoch: int, sample: int, size: int, count: int) -> Ids:
    """Choose count <= size different numbers from 0 to size - 1, in random order: [count] int64.

    Above MOST_SHUFFLED, a few numbers are drawn one by one, and repeated ones are dropped: a
    shuffle of a web-scale data set would take gigabytes.
    """
    if size <= MOST_SHUFFLED or 2 * count > size:
        return shuffled(seed, purpose, epoch, sample, size)[:count]
    drawn, length = np.empty(0, np.int64), count
    while len(drawn) < count:
        length *= 2
        found = words(seed, purpose, np.array([epoch]), np.array([sample]), length)[0]
        # the bias of the modulus is below 2^-30
        numbers = (found % np.uint64(size)).astype(np.int64)
        _, places = np.unique(numbers, return_index=True)  # of each number's first draw
        drawn = numbers[np.sort(places)]
    return drawn[:count]


def normal(
    seed: int, purpose: Purpose, epochs: Ids, samples: Ids, shape: Sequence[int]
) -> NDArray[np.float32]:
    """Draw standard normal values for each sample: [B, *shape] float32.

    A sample's draws do not depend on other samples. In row-major order, a draw does not depend on
    the number of later ones. Numpy computes logarithm, sine and cosine with the CPU's instructions,
    so the last bits of a draw can differ between CPUs.
    """
    count = math.prod(shape)
    draws = box_muller(words(seed, purpose, epochs, samples, -(-count // 2)))
    return draws[:, :count].reshape(len(samples), *shape)


class ConditionDraws(NamedTuple):
    """The random choices of conditions: `models.conditioning.given.Draws`."""

    seed: int
    epochs: Ids
    """[B], visit to each sample."""
    samples: Ids
    """[B], number of each sample."""

    def uniform(self, count: int) -> NDArray[np.float64]:
        """Draw from [0, 1): [B, count]."""
        return uniforms(self.seed, Purpose.condition, self.epochs, self.samples, count)

    def normal(self, shape: Sequence[int]) -> NDArray[np.float32]:
        """Draw standard normal values: [B, *shape]."""
        return normal(self.seed, Purpose.condition_noise, self.epochs, self.samples, shape)


def box_muller(words: NDArray[np.uint64]) -> NDArray[np.float32]:
    """Turn each word into two standard normal draws, side by side: [B, n] to [B, 2n] float32.

    The upper half of a word gives the radius, the lower half the angle (Box and Muller 1958). No
    draw exceeds 6.76; a normal variable does so with probability 1.4e-11. Radii below 2.4e-4, which
    have probability 3e-8, are rounded to 0.
    """
    out = np.empty((words.size, 2), np.float32)
    for start in range(0, words.size, BLOCK):
        block = words.reshape(-1)[start : start + BLOCK]
        half = np.float32(0.5)  # avoids the logarithm of 0
        uniform = ((block >> np.uint64(32)).astype(np.float32) + half) * np.float32(2**-32)
        radius = np.sqrt(np.float32(-2) * np.log(uniform))
        angle = block.astype(np.int32).astype(np.float32) * np.float32(math.pi * 2**-31)
        draws = out[start : start + BLOCK]
        np.multiply(radius, np.cos(angle), out=draws[:, 0])
        np.multiply(radius, np.sin(angle), out=draws[:, 1])
    return out.reshape(len(words), 2 * words.shape[1])
