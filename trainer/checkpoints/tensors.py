"""Writing of safetensors files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from data.storage.atomic import atomic_path

_safetensors: Any = safetensors.torch  # its types are incomplete
save_file: Callable[[dict[str, Tensor], Path], None] = _safetensors.save_file


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write contiguous CPU tensors by name, whole or not at all.

    Raises: OSError or SafetensorError if the file cannot be written; an older file at `path` is
    then unchanged.
    """
    with atomic_path(path) as part:
        save_file(tensors, part)
