"""Conversion between our tensors and those of CompVis (latent diffusion, Stable Diffusion).

Our tensor names are diffusers'. CompVis has other names, stores linear layers of attention as 1x1
convolutions, and q, k and v of self-attention as one tensor. `first_stage_places` and `unet_places`
map our names to theirs; `from_compvis` and `to_compvis` convert by these maps.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.config import UNetConfig
from models.weights.files import fill, read_weights, unwrapped, widened

Weights = Mapping[str, Tensor]
"""Tensors by name."""

FIRST_STAGE_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "quantize.emb")
UNET_INPUT = "conv_in.weight"
COMPVIS_FIRST_STAGE = "first_stage_model."
COMPVIS_UNET = "model.diffusion_model."
COMPVIS_EMA = "model_ema."
COMPVIS_FACTOR = "scale_factor"

FIRST_STAGE_RULES = [
    (r"down_blocks\.(\d+)\.resnets", r"down.\1.block"),
    (r"down_blocks\.(\d+)\.attentions", r"down.\1.attn"),
    (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up\.(\d+)\.resnets", r"up.\1.block"),
    (r"up\.(\d+)\.attentions", r"up.\1.attn"),
    (r"up\.(\d+)\.upsamplers\.0", r"up.\1.upsample"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"group_norm", "norm"),
    (r"to_([qkv])", r"\1"),
    (r"to_out\.0", "proj_out"),
]
OLD_DIFFUSERS_ATTENTION = {
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "proj_attn": "to_out.0",
}
UNET_RES_BLOCK = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def load_first_stage(network: nn.Module, path: Path) -> None:
    """Load a first stage from a file with our, diffusers' or CompVis' names.

    The file holds a first stage alone, or a whole CompVis model with one.

    Raises: FileNotFoundError if there is no such file; ValueError if it cannot be read or has the
    weights of another network.
    """
    option, expected = "autoencoder.weights", network.state_dict()
    weights = unwrapped(read_weights(path, option), expected, path, option)
    weights = _below(COMPVIS_FIRST_STAGE, weights)
    weights = {key: value for key, value in weights.items() if key.startswith(FIRST_STAGE_PARTS)}
    if any(key.startswith("encoder.down.") for key in weights):
        print(f"{option}: {path} has CompVis' layout")
        weights = from_compvis(weights, first_stage_places(expected), expected)
    weights = {_present_name(key): value for key, value in weights.items()}
    fill(network, weights, path, option=option, described_by="autoencoder.*")


def load_unet(network: nn.Module, config: UNetConfig, path: Path) -> float | None:
    """Load a U-Net from a file with our, diffusers' or CompVis' names.

    If a CompVis file has averaged weights (EMA), it loads these. With `config.widen_input` the file
    may lack input channels; their weights are zeros.

    Returns the factor of the latents that a CompVis file may have; None if it has none.

    Raises: FileNotFoundError if there is no such file; ValueError if it cannot be read or has the
    weights of another network.
    """
    option, expected = "unet.weights", network.state_dict()
    weights = unwrapped(read_weights(path, option), expected, path, option)
    factor = weights.get(COMPVIS_FACTOR)
    places = unet_places(expected, config)
    averages = {
        place.key: COMPVIS_EMA + (COMPVIS_UNET.removeprefix("model.") + place.key).replace(".", "")
        for place in places.values()
    }
    layout = "CompVis' layout"
    if all(average in weights for average in averages.values()):
        weights = {key: weights[average] for key, average in averages.items()}
        layout += ", with averaged weights"
    weights = _below(COMPVIS_UNET, weights)
    if "input_blocks.0.0.weight" in weights:
        print(f"{option}: {path} has {layout}")
        weights = from_compvis(weights, places, expected)
    if config.widen_input:
        weights = widened(weights, UNET_INPUT, expected[UNET_INPUT])
    fill(network, weights, path, option=option, described_by="unet.*")
    return factor.item() if factor is not None and factor.numel() == 1 else None


def _below(prefix: str, weights: Weights) -> dict[str, Tensor]:
    """Return the tensors with this prefix, without it; all tensors if none has it."""
    below = {
        key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)
    }
    return below or dict(weights)


def _present_name(key: str) -> str:
    """Rename attention of diffusers before 0.18 to its present names."""
    pattern = r"(attentions\.\d+)\.(query|key|value|proj_attn)\."
    return re.sub(pattern, lambda found: f"{found[1]}.{OLD_DIFFUSERS_ATTENTION[found[2]]}.", key)


class Place(NamedTuple):
    """Position of one of our tensors in CompVis' weights."""

    key: str
    """CompVis' name of the tensor that holds it."""
    part: int | None = None
    """0, 1, 2: the q, k or v of that tensor, whose rows are [heads, 3, width of a head]."""
    heads: int = 1
    kernel_dims: int = 0
    """Axes of size 1 at the end, in a linear layer stored as a convolution."""


def first_stage_places(names: Iterable[str]) -> dict[str, Place]:
    """Map our tensor names of a first stage to CompVis' places, without first_stage_model.

    For example encoder.down_blocks.0.resnets.1.conv1.weight → encoder.down.0.block.1.conv1.weight.
    """
    names = list(names)
    last = max(int(found) for name in names for found in re.findall(r"up_blocks\.(\d+)", name))
    places: dict[str, Place] = {}
    for name in names:
        # CompVis counts the decoder's levels from the highest resolution, too
        key = re.sub(r"up_blocks\.(\d+)", lambda found: f"up.{last - int(found[1])}", name)
        for pattern, replacement in FIRST_STAGE_RULES:
            key = re.sub(pattern, replacement, key)
        linear = re.search(r"\.to_(q|k|v|out\.0)\.weight$", name)
        places[name] = Place(key, kernel_dims=2 if linear else 0)
    return places


def unet_places(names: Iterable[str], config: UNetConfig) -> dict[str, Place]:
    """Map our tensor names of a U-Net to CompVis' places, without model.diffusion_model.

    The config gives the number of blocks and heads. For example, with two ResBlocks a level,
    down_blocks.1.resnets.0.conv1.weight → input_blocks.4.0.in_layers.2.weight.
    """
    return {name: _unet_place(name, config) for name in names}


def _unet_place(name: str, config: UNetConfig) -> Place:
    parts, layers, last = name.split("."), config.layers_per_block, len(config.heads) - 1
    match parts:
        case ["down_blocks", level, "resnets", layer, *rest]:
            block, heads = f"input_blocks.{1 + int(level) * (layers + 1) + int(layer)}.0", 1
        case ["down_blocks", level, "attentions", layer, *rest]:
            block = f"input_blocks.{1 + int(level) * (layers + 1) + int(layer)}.1"
            heads = config.heads[int(level)]
        case ["down_blocks", level, "downsamplers", _, *rest]:
            block, heads = f"input_blocks.{(int(level) + 1) * (layers + 1)}.0", 1
            rest = ["op" if part == "conv" else part for part in rest]
        case ["mid_block", "resnets", layer, *rest]:
            block, heads = f"middle_block.{2 * int(layer)}", 1
        case ["mid_block", "attentions", _, *rest]:
            block, heads = "middle_block.1", config.heads[last]
        case ["up_blocks", step, "resnets", layer, *rest]:
            block, heads = f"output_blocks.{int(step) * (layers + 1) + int(layer)}.0", 1
        case ["up_blocks", step, "attentions", layer, *rest]:
            block = f"output_blocks.{int(step) * (layers + 1) + int(layer)}.1"
            heads = config.heads[last - int(step)]
        case ["up_blocks", step, "upsamplers", _, *rest]:
            after = 2 if config.attention[last - int(step)] else 1
            block, heads = f"output_blocks.{int(step) * (layers + 1) + layers}.{after}", 1
        case _:
            stem, leaf = name.rsplit(".", 1)
            return Place(f"{UNET_ENDS[stem]}.{leaf}")
    match rest:
        case ["to_q" | "to_k" | "to_v" as projection, leaf]:
            part = ("to_q", "to_k", "to_v").index(projection)
            return Place(f"{block}.qkv.{leaf}", part, heads, kernel_dims=int(leaf == "weight"))
        case ["to_out", "0", leaf]:
            return Place(f"{block}.proj_out.{leaf}", kernel_dims=int(leaf == "weight"))
        case ["group_norm", leaf]:
            return Place(f"{block}.norm.{leaf}")
        case [first, *others]:
            return Place(".".join([block, UNET_RES_BLOCK.get(first, first), *others]))
        case _:
            raise KeyError(name)


def from_compvis(theirs: Weights, places: Mapping[str, Place], ours: Weights) -> dict[str, Tensor]:
    """Convert CompVis' tensors to our names, and to our shapes if they differ in axes of size 1.

    Tensors without a place keep their names, so a strict loader reports them.
    """
    found: dict[str, Tensor] = {}
    for name, place in places.items():
        if place.key in theirs:
            tensor = theirs[place.key]
            if place.part is not None:
                parts = tensor.reshape(place.heads, 3, -1, *tensor.shape[1:])
                tensor = parts[:, place.part].flatten(0, 1)
            shape = ours[name].shape
            is_same = _without_kernel(tensor.shape) == _without_kernel(shape)
            found[name] = tensor.reshape(shape) if is_same else tensor
    used = {place.key for place in places.values()}
    return found | {key: tensor for key, tensor in theirs.items() if key not in used}


def _without_kernel(shape: Sequence[int]) -> list[int]:
    """Leave out the axes of size 1 at the end, which a convolution has and a linear layer lacks."""
    axes = list(shape)
    while axes and axes[-1] == 1:
        axes.pop()
    return axes


def to_compvis(ours: Weights, places: Mapping[str, Place]) -> dict[str, Tensor]:
    """Convert our tensors to CompVis' names and shapes: the inverse of `from_compvis`."""
    theirs: dict[str, Tensor] = {}
    fused: dict[str, list[Tensor]] = {}
    for name, place in places.items():
        tensor = ours[name][(..., *[None] * place.kernel_dims)]
        if place.part is None:
            theirs[place.key] = tensor
        else:
            rows = tensor.reshape(place.heads, -1, *tensor.shape[1:])
            fused.setdefault(place.key, []).append(rows)
    for key, parts in fused.items():
        theirs[key] = torch.stack(parts, dim=1).flatten(0, 2)
    return theirs
