"""Networks on a device for a limited time."""

from collections.abc import Generator, Iterable
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def on_device(modules: Iterable[nn.Module], device: torch.device) -> Generator[None]:
    """Move modules to a device, in evaluation mode; at the end restore their devices and modes.

    GPU memory that was used inside goes back to CUDA for the training.
    """
    moved = [(module, _device_of(module)) for module in modules]
    modes = [(part, part.training) for module, _ in moved for part in module.modules()]
    try:
        for module, _ in moved:
            _move(module, device)
            module.eval()
        yield
    finally:
        for module, before in moved:
            _move(module, before)
        for part, mode in modes:
            part.training = mode
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _device_of(module: nn.Module) -> torch.device | None:
    """Return the device of a module's first tensor; None if it has no tensors."""
    tensors = (*module.parameters(), *module.buffers())
    return tensors[0].device if tensors else None


def _move(module: nn.Module, device: torch.device | None) -> None:
    if device is not None and device != _device_of(module):
        with torch.inference_mode(False):  # inference tensors cannot be trained later
            module.to(device)
