"""Split samples into training and validation by a hash of their images."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data.shards.codecs import IMAGE_EXTENSIONS

_MULTIPLIERS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)


def draws(sizes: ArrayLike, crcs: ArrayLike) -> NDArray[np.float64]:
    """Map images to numbers in [0, 1), uniform over images, the same for equal images: [N].

    sizes, crcs: [N], bytes and CRC-32 of the encoded images. A sample below data.source.val_share
    is for validation. Its name and its place do not matter, so that a set that is packed again,
    with other names or more samples, keeps its split. The mixing is that of SplitMix64 (Steele et
    al. 2014, "Fast Splittable Pseudorandom Number Generators", figure 15).
    """
    bits = np.asarray(sizes, np.uint64) << np.uint64(32) | np.asarray(crcs, np.uint64)
    bits = (bits ^ bits >> _SHIFTS[0]) * _MULTIPLIERS[0]
    bits = (bits ^ bits >> _SHIFTS[1]) * _MULTIPLIERS[1]
    bits ^= bits >> _SHIFTS[2]
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def draws_of(index: NDArray[np.void]) -> NDArray[np.float64]:
    """Return the draws of the samples in the index of a shard of images: [N]."""
    sizes, crcs = np.zeros(len(index), np.uint64), np.zeros(len(index), np.uint64)
    for extension in reversed(IMAGE_EXTENSIONS):  # the first of several is the one that is read
        if extension in (index.dtype.names or ()):
            there = index[extension]["offset"] > 0
            sizes[there] = index[extension]["size"][there]
            crcs[there] = index[extension]["crc"][there]
    return draws(sizes, crcs)
