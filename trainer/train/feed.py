"""Micro batches on the device, copied there while the device works."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from data.streams.stream import Batch


class Feed:
    """Copies micro batches to a GPU, each while the one before is used; a CPU needs no copies.

    The GPU copies on a stream of its own, from page-locked memory (`Stream.pinned`). An event lets
    its other stream wait for the copy; this process waits for neither. Memory that a copy reads or
    writes is used anew only after an event that torch records: in `CachingHostAllocator` for the
    page-locked memory, by `record_stream` for the GPU's.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copied(self, batches: Sequence[Batch]) -> Iterator[Batch]:
        """Yield the batches with their tensors on the device."""
        if self._stream is None:
            yield from batches
            return
        coming = self._copy(batches[0], self._stream)
        for number in range(1, len(batches) + 1):
            batch, copied = coming
            if number < len(batches):
                coming = self._copy(batches[number], self._stream)
            working = torch.cuda.current_stream(self._device)
            working.wait_event(copied)
            yield batch.tensors(lambda tensor, working=working: _lent(tensor, working))

    def _copy(self, batch: Batch, stream: torch.cuda.Stream) -> tuple[Batch, torch.cuda.Event]:
        """Begin to copy; the event passes when all tensors are there."""
        copied = torch.cuda.Event()
        with torch.cuda.stream(stream):
            begun = batch.tensors(lambda tensor: tensor.to(self._device, non_blocking=True))
            copied.record(stream)
        return begun, copied


def _lent(tensor: Tensor, stream: torch.cuda.Stream) -> Tensor:
    """Let a stream use a tensor that another stream wrote."""
    tensor.record_stream(stream)
    return tensor
