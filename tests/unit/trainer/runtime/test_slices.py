"""Sizes of slices, and TF32, on a GPU that is made up."""

from typing import Any

import pytest
import torch

from trainer.runtime.products import fp32_products
from trainer.runtime.slices import MOST_BYTES, slice_size

GIB = 2**30


@pytest.mark.parametrize(("each", "size"), [(GIB, 4), (1.5 * GIB, 2), (9 * GIB, 1), (GIB / 8, 32)])
def test_a_slice_on_a_cpu_has_a_fixed_bound(each: float, size: int) -> None:
    assert slice_size(each, torch.device("cpu")) == size
    assert MOST_BYTES == 4 * GIB


@pytest.mark.parametrize(
    ("free", "reserved", "allocated", "size"),
    [
        (70, 5, 4, 8),  # much is free: the bound decides
        (3, 0, 0, 3),  # half of what is free
        (1, 6, 4, 3),  # what torch keeps and does not use is free, too
        (0, 2, 2, 1),  # nothing is free: one sample, and the error of the GPU
    ],
)
def test_a_slice_takes_half_of_a_gpu_that_is_short_of_memory(
    free: int, reserved: int, allocated: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated * GIB)
    assert slice_size(GIB / 2, torch.device("cuda")) == size


def precisions() -> tuple[str, str]:
    backends: Any = torch.backends  # torch declares a part of them
    return backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision


def test_products_are_exact_or_tf32_within_and_as_before_after_an_error() -> None:
    before = precisions()
    with pytest.raises(InterruptedError), fp32_products(tf32=True):
        assert precisions() == ("tf32", "tf32")
        with fp32_products(tf32=False):
            assert precisions() == ("ieee", "ieee")
        assert precisions() == ("tf32", "tf32")
        raise InterruptedError
    assert precisions() == before
