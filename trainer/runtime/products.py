"""The precision of products of fp32 numbers on a GPU."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch

_backends: Any = torch.backends  # torch declares no types for these settings


@contextmanager
def fp32_products(*, tf32: bool) -> Generator[None]:
    """Within, compute products of fp32 matrices and convolutions in TF32 or exactly in fp32.

    torch's own settings round the factors of convolutions to TF32, 10 bits, and not those of
    matrices. A CPU has no TF32.
    """
    settings = (_backends.cuda.matmul, _backends.cudnn.conv)
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "tf32" if tf32 else "ieee"
    try:
        yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision
