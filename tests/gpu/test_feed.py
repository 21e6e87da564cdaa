"""Batches arrive on the GPU whole, though their memory is used again and again."""

import numpy as np
import pytest
import torch
from torch import Tensor

from data import read_ahead
from data.streams.buffers import Buffers
from data.streams.stream import Batch
from trainer.train.feed import Feed

pytestmark = pytest.mark.gpu

BATCHES, MICRO_BATCHES = 1000, 10
SHAPE = 32, 8192


def test_no_batch_is_overwritten_before_it_is_used(device: torch.device) -> None:
    buffers = Buffers(SHAPE, np.int64)
    weights = np.random.default_rng(0).integers(1, 2**40, SHAPE)
    expected: dict[int, int] = {}

    def make(number: int) -> Batch:
        """As a stream does: into memory that returns to a pool, then into page-locked memory."""
        array = buffers.take(SHAPE[0])
        array[:] = np.random.default_rng(number).integers(-(2**40), 2**40, SHAPE)
        expected[number] = int((array * weights).sum())
        batch = Batch(
            epoch=np.zeros(1, np.int64),
            index=np.array([number]),
            keys=[str(number)],
            captions=[""],
            arrays={"moments": torch.from_numpy(array)},
        )
        return batch.tensors(Tensor.pin_memory) if device.type == "cuda" else batch

    coming = read_ahead.with_thread(make, iter(range(BATCHES)), depth=MICRO_BATCHES)
    feed, on_device = Feed(device), torch.from_numpy(weights).to(device)
    load = torch.randn(2048, 2048, device=device)
    found: dict[int, Tensor] = {}
    for _ in range(BATCHES // MICRO_BATCHES):
        for batch in feed.copied([next(coming) for _ in range(MICRO_BATCHES)]):
            load = load @ load / load.norm()  # the device falls behind
            found[int(batch.index[0])] = (batch.arrays["moments"] * on_device).sum()
    coming.close()
    assert {number: int(sum_) for number, sum_ in found.items()} == expected
