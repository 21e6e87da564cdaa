"""Reuse the memory of batches.

One thread fills a batch of a few megabytes, and another thread frees it. The C library tends to
return such memory to the system, and to ask for new memory. The system clears every new page. This
can cost as much time as reading the samples.
"""

import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray


class Buffers:
    """A pool of arrays of one shape; memory returns to it when its last view or tensor is deleted.

    shape: of each array. dtype: data type of each array.
    """

    def __init__(self, shape: Sequence[int], dtype: DTypeLike) -> None:
        self._shape, self._dtype = tuple(shape), np.dtype(dtype)
        self._free: list[memoryview] = []

    def take(self, rows: int) -> NDArray[Any]:
        """Return an uninitialised array that no one else uses: [rows, *shape[1:]].

        Only arrays of shape[0] rows come from the pool.
        """
        if rows != self._shape[0]:
            return np.empty((rows, *self._shape[1:]), self._dtype)
        memory = None
        with suppress(IndexError):
            memory = self._free.pop()
        if memory is None:
            memory = np.empty(self._shape, self._dtype).reshape(-1).view(np.uint8).data
        # every view of an array made from a memoryview refers to that array itself
        array = np.frombuffer(memory, self._dtype)
        weakref.finalize(array, self._free.append, memory).atexit = False
        return array.reshape(self._shape)
