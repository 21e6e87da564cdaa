"""Strict loading of weights from safetensors files, with errors that name the option at fault."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn


def load_weights(network: nn.Module, path: Path, *, option: str, described_by: str) -> None:
    """Fill the network from a file of fp32 or fp16 weights; it keeps its own precision.

    option: the config path that names the file. described_by: the options that describe the
    network. Raises FileNotFoundError when there is no such file, ValueError when it is not a
    safetensors file or holds another network.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{option}: no file at {path}: make it first, or correct the path")
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{option}: {path} is no safetensors file or is damaged ({error})"
        ) from error
    if difference := _first_difference(network.state_dict(), weights):
        raise ValueError(
            f"{option}: {path} holds another network than {described_by} describes: {difference}"
        )
    network.load_state_dict(weights)


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
