"""Memory that is used again once nobody holds it.

A batch is a few megabytes, filled by one thread and dropped by another. The C library tends to
give such memory back to the system and to take it anew, which clears every page before a sample
is copied there: at times that costs as much as reading the sample.
"""

import weakref
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
from numpy.typing import DTypeLike, NDArray


class Buffers:
    """Arrays of one shape, whose memory comes back when the last view or tensor of it is gone.

    Args:
        shape: Shape of each array.
        dtype: Data type of each array.
    """

    def __init__(self, shape: Sequence[int], dtype: DTypeLike) -> None:
        self._shape, self._dtype = tuple(shape), np.dtype(dtype)
        self._free: list[memoryview] = []

    def take(self, rows: int) -> NDArray:
        """Return an array of any content that nobody else holds: [rows, *shape[1:]].

        Only the memory of whole arrays, of shape[0] rows, is kept.
        """
        if rows != self._shape[0]:
            return np.empty((rows, *self._shape[1:]), self._dtype)
        memory = None
        with suppress(IndexError):
            memory = self._free.pop()
        if memory is None:
            memory = np.empty(self._shape, self._dtype).reshape(-1).view(np.uint8).data
        # all views of an array on a memoryview hold that array, not only what is below it
        array = np.frombuffer(memory, self._dtype)
        weakref.finalize(array, self._free.append, memory).atexit = False
        return array.reshape(self._shape)
