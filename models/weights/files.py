"""Strict loading of weights from files, and hashes of networks."""

import hashlib
import json
import pickle
from collections.abc import Container, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeGuard

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

_safetensors: Any = safetensors.torch  # its types are incomplete

TORCH_SUFFIXES = (".ckpt", ".bin", ".pt", ".pth")
"""Names of files that torch.save has written."""


def load_weights(network: nn.Module, path: Path, *, option: str, described_by: str) -> None:
    """Load a network's weights, fp32 or fp16, from a safetensors file.

    option: the config path that names the file; described_by: the options that describe the
    network. Both are for error messages.

    Raises: FileNotFoundError if there is no such file; ValueError if it is no safetensors file or
    has the weights of another network.
    """
    weights = unwrapped(read_weights(path, option), network.state_dict(), path, option)
    fill(network, weights, path, option=option, described_by=described_by)


def read_weights(path: Path, option: str) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file, or of a torch file with tensors alone, by name.

    A torch file (TORCH_SUFFIXES) may hold the tensors below one key, such as `state_dict`. option:
    the config path that names the file, for error messages.

    Raises: FileNotFoundError if there is no such file; ValueError if it cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{option}: no file at {path}: make it first, or correct the path")
    if path.suffix in TORCH_SUFFIXES:
        return _read_torch_file(path, option)
    try:
        return _safetensors.load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{option}: {path} is no safetensors file or is damaged ({error})"
        ) from error


def fill(
    network: nn.Module, weights: Mapping[str, Tensor], path: Path, *, option: str, described_by: str
) -> None:
    """Copy weights of any precision into a network, which keeps its own precision.

    path, option, described_by: for the error message (`load_weights`).

    Raises: ValueError if they are the weights of another network, or no finite numbers.
    """
    if difference := _first_difference(network.state_dict(), weights):
        raise ValueError(
            f"{option}: {path} holds another network than {described_by} describes: {difference}"
        )
    check_finite(weights, path, option)
    network.load_state_dict(weights)


def check_finite(weights: Mapping[str, Tensor], path: Path, option: str) -> None:
    """Raise ValueError that names a tensor with NaN or infinite values; none can be trained."""
    for name, value in weights.items():
        if not value.float().isfinite().all():  # torch cannot test fp8
            raise ValueError(f"{option}: {path} has values that are not finite, in {name}")


def widened(weights: Mapping[str, Tensor], name: str, expected: Tensor) -> dict[str, Tensor]:
    """Append channels of zeros to the input of a convolution, up to the expected number.

    name: of its weight [C_out, C_in, k, k] in `weights`; expected: the weight of the network.
    Other differences of shapes stay.
    """
    tensor = weights.get(name)
    if tensor is None or tensor.dim() != 4 or tensor.shape[1] >= expected.shape[1]:
        return dict(weights)
    more = tensor.new_zeros(len(tensor), expected.shape[1] - tensor.shape[1], *tensor.shape[2:])
    return {**weights, name: torch.cat([tensor, more], dim=1)}


def unwrapped(
    weights: Mapping[str, Tensor], expected: Container[str], path: Path, option: str
) -> dict[str, Tensor]:
    """Remove the prefix that wrappers, such as DistributedDataParallel, give to all names.

    Prints a line if there is one. expected: names that need no change; path, option: for the line.
    """
    columns = zip(*(name.split(".")[:-1] for name in weights), strict=False)
    shared = takewhile(lambda column: len(set(column)) == 1, columns)
    prefix = "".join(f"{column[0]}." for column in shared)
    if not prefix or any(name in expected for name in weights):
        return dict(weights)
    print(f"{option}: {path} is read without the prefix {prefix} of its names")
    return {name.removeprefix(prefix): value for name, value in weights.items()}


def hash_network(network: nn.Module, architecture: Mapping[str, Any]) -> str:
    """Hash an architecture (JSON values) and the network's weights as fp32: SHA-256, in hex."""
    digest = hashlib.sha256(json.dumps(architecture, sort_keys=True).encode())
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _read_torch_file(path: Path, option: str) -> dict[str, Tensor]:
    try:
        # with weights_only the reader builds tensors and plain values, and runs no code
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ValueError(
            f"{option}: {path} is damaged, or holds more than tensors, which is never loaded "
            f"because it could run code: convert it to safetensors where you trust it"
        ) from error
    own = _tensors(content)
    if own:
        return own
    below = {key: found for key, value in _items(content) if (found := _tensors(value))}
    if "state_dict" in below or len(below) == 1:
        key = "state_dict" if "state_dict" in below else next(iter(below))
        if key != "state_dict":
            print(f"{option}: {path} holds its tensors below {key!r}")
        return below[key]
    if below:
        raise ValueError(
            f"{option}: {path} is a torch file with several sets of tensors, "
            f"{', '.join(sorted(below))}: save the one you want as safetensors"
        )
    raise ValueError(f"{option}: {path} is a torch file without tensors by name")


def _items(content: object) -> list[tuple[str, object]]:
    """Return the entries of a dict with their keys as strings; none of other values."""
    return [(str(key), value) for key, value in content.items()] if _is_dict(content) else []


def _tensors(content: object) -> dict[str, Tensor]:
    return {key: value for key, value in _items(content) if isinstance(value, Tensor)}


def _is_dict(content: object) -> TypeGuard[dict[object, object]]:
    return isinstance(content, dict)


def _first_difference(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            return f"it lacks {name}"
        if name not in expected:
            return f"its {name} has no place"
        if expected[name].shape != found[name].shape:
            shapes = [list(tensors[name].shape) for tensors in (found, expected)]
            return f"its {name} is {shapes[0]}, not {shapes[1]}"
        if expected[name].is_floating_point() != found[name].is_floating_point():
            return f"its {name} holds {found[name].dtype}, not {expected[name].dtype}"
    return ""
