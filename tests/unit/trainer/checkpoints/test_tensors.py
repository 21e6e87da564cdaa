"""Safetensors files appear whole or not at all."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from trainer.checkpoints import tensors as tensor_files
from trainer.checkpoints.tensors import write_tensors

WEIGHTS = {"conv.weight": torch.ones(2), "conv.bias": torch.zeros(3, dtype=torch.float16)}


def test_tensors_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "weights.safetensors"
    write_tensors(path, WEIGHTS)
    torch.testing.assert_close(load_file(path), WEIGHTS, rtol=0, atol=0)
    assert list(path.parent.iterdir()) == [path]


def test_a_failure_in_the_middle_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"old")

    def full_disk(tensors: dict[str, Tensor], part: Path) -> None:
        part.write_bytes(b"half of the new")
        raise OSError("no space left on device")

    monkeypatch.setattr(tensor_files, "save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_tensors(path, WEIGHTS)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
