"""Strict loading of weights from files, and the identity of what was loaded."""

import hashlib
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn


def load_weights(network: nn.Module, path: Path, *, option: str, described_by: str) -> None:
    """Fill the network from a safetensors file of fp32 or fp16 weights.

    option: the config path that names the file. described_by: the options that describe the
    network. Raises FileNotFoundError when there is no such file, ValueError when it is not a
    safetensors file or holds another network.
    """
    fill(network, read_weights(path, option), path, option=option, described_by=described_by)


def read_weights(path: Path, option: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a .ckpt file that holds nothing but tensors.

    Raises FileNotFoundError when there is no such file, ValueError when it cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{option}: no file at {path}: make it first, or correct the path")
    if path.suffix == ".ckpt":
        return _read_checkpoint(path, option)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{option}: {path} is no safetensors file or is damaged ({error})"
        ) from error


def fill(
    network: nn.Module, weights: Mapping[str, Tensor], path: Path, *, option: str, described_by: str
) -> None:
    """Put weights of any precision into a network, which keeps its own; arguments as above.

    Raises ValueError when they are those of another network.
    """
    if difference := _first_difference(network.state_dict(), weights):
        raise ValueError(
            f"{option}: {path} holds another network than {described_by} describes: {difference}"
        )
    network.load_state_dict(weights)


def hash_network(network: nn.Module, architecture: Mapping[str, Any]) -> str:
    """SHA-256, in hex, of an architecture (JSON values) and of the network's weights as fp32."""
    digest = hashlib.sha256(json.dumps(architecture, sort_keys=True).encode())
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _read_checkpoint(path: Path, option: str) -> dict[str, Tensor]:
    try:
        # weights_only: torch's own reader, which builds tensors and plain values and runs nothing
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ValueError(
            f"{option}: {path} is damaged, or holds more than tensors, which is never loaded "
            f"because it could run code: convert it to safetensors where you trust it"
        ) from error
    found = found.get("state_dict", found) if isinstance(found, dict) else {}
    return {str(key): value for key, value in found.items() if isinstance(value, Tensor)}


def _first_difference(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            return f"it lacks {name}"
        if name not in expected:
            return f"its {name} has no place"
        if expected[name].shape != found[name].shape:
            shapes = [list(tensors[name].shape) for tensors in (found, expected)]
            return f"its {name} is {shapes[0]}, not {shapes[1]}"
    return ""
