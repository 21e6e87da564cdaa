"""Work in slices of samples that fit into memory."""

import torch

GIB = 2**30
MOST_BYTES = 4 * GIB
"""Largest temporary memory of a slice, also on a CPU. Larger slices are no faster."""


def slice_size(bytes_each: float, device: torch.device) -> int:
    """Return the number of samples to compute at once, at least 1.

    bytes_each: temporary memory of a sample. On a GPU with little free memory a slice takes half of
    what is free; elsewhere the size does not depend on the machine.
    """
    budget = float(MOST_BYTES)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        budget = min(budget, (free + idle) / 2)
    return max(1, int(budget / bytes_each))
