"""Memory is lent again once nobody can see it any more, and never before."""

from random import Random
from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.streams.buffers import Buffers

SHAPE = (4, 3)


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def bytes_of(view: Any) -> bytes:
    return np.asarray(view).tobytes()


HOLDS = {
    "the array": lambda array: array,
    "a row": lambda array: array[1],
    "a view of a view": lambda array: array.reshape(2, 6)[1:].T.view(np.uint8),
    "a tensor": torch.from_numpy,
    "a tensor's row": lambda array: torch.from_numpy(array)[2],
    "an array of a tensor's row": lambda array: torch.from_numpy(array)[3:].numpy(),
    "a memoryview": lambda array: array.data[1:],
}


@given(st.lists(st.sampled_from([None, *HOLDS]), max_size=12), st.randoms())
def test_what_is_held_is_not_lent_and_all_else_is(steps: list[str | None], random: Random) -> None:
    buffers = Buffers(SHAPE, np.float16)
    held, most = {}, 0
    for number, how in enumerate(steps):
        if how is None and held:
            del held[random.choice(sorted(held))]
        elif how is not None:
            array = buffers.take(SHAPE[0])
            assert (array.shape, array.dtype, array.flags.writeable) == (SHAPE, np.float16, True)
            array[:] = number
            view = HOLDS[how](array)
            held[number] = view, bytes_of(view)
            del array, view
        most = max(most, len(held))
        assert all(bytes_of(view) == content for view, content in held.values())
        assert len(buffers._free) == most - len(held)


def test_memory_of_another_size_is_not_kept() -> None:
    buffers = Buffers(SHAPE, np.float16)
    assert buffers.take(2).shape == (2, 3)
    assert buffers.take(9).shape == (9, 3)
    assert buffers._free == []


def test_the_memory_of_a_batch_is_that_of_an_earlier_one() -> None:
    buffers = Buffers(SHAPE, np.float16)
    first = buffers.take(4)
    place = address(first)
    del first
    again = torch.from_numpy(buffers.take(4))
    assert again.data_ptr() == place
    assert address(buffers.take(4)) != place
