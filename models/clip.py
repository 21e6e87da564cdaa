"""Loading of CLIP networks (Radford et al. 2021) by open_clip, by name or from files."""

import json
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import open_clip
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from models import hub
from models.config import ConditionerConfig
from models.weights import load_weights

LOCAL_FILE_HINT = "or set conditioner.pretrained to the path of a safetensors file"
FOREIGN_TEXT_TOWERS = {"hf_model_name", "hf_tokenizer_name"}


class Clip(NamedTuple):
    """A frozen CLIP with all that its inputs need.

    model: has encode_image([B, 3, size, size] in [0, 1], normalised by the mean and standard
    deviation) and encode_text(tokenizer(captions)), both → [B, embed_dim].
    """

    model: Any
    tokenizer: Callable[[list[str]], Tensor]
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    text_architecture: dict[str, Any]
    """Options of the text tower, JSON values."""
    embed_dim: int
    """Width of an embedding of an image or a text."""

    @property
    def image_size(self) -> int:
        """Side of the square images, in pixels."""
        size = self.model.visual.image_size
        return size if isinstance(size, int) else size[0]

    @property
    def text_width(self) -> int:
        """Width of a token in the text tower."""
        return getattr(self.model, "text", self.model).ln_final.normalized_shape[0]


def load_clip(config: ConditionerConfig) -> Clip:
    """The CLIP of `config.model` and `config.pretrained`, frozen, in fp32 on the CPU.

    Weights come from a safetensors file, fp32 or fp16, never from a pickle. Raises ValueError or
    FileNotFoundError, naming the option, when there is no such network or it cannot be had.
    """
    architecture = _architecture(config.model)
    path, tag = _weights(config.model, config.pretrained)
    if tag.get("quick_gelu"):
        architecture["quick_gelu"] = True
    separate_text_tower = architecture.pop("custom_text", False)
    network = open_clip.CustomTextCLIP if separate_text_tower else open_clip.CLIP
    try:
        model = network(**architecture)
    except TypeError as error:
        raise ValueError(
            f"conditioner.model: open_clip cannot build {config.model} ({error})"
        ) from error
    load_weights(
        model,
        path,
        option="conditioner.pretrained",
        described_by=f"conditioner.model = {config.model}",
    )
    text = architecture["text_cfg"]
    return Clip(
        model=model.eval().requires_grad_(False),
        tokenizer=open_clip.SimpleTokenizer(
            context_length=text.get("context_length", 77), **text.get("tokenizer_kwargs", {})
        ),
        image_mean=tuple(tag.get("mean") or open_clip.OPENAI_DATASET_MEAN),
        image_std=tuple(tag.get("std") or open_clip.OPENAI_DATASET_STD),
        text_architecture={**text, "quick_gelu": architecture.get("quick_gelu", False)},
        embed_dim=architecture["embed_dim"],
    )


class TextTower(NamedTuple):
    """What the text tower of a CLIP costs, without its weights."""

    parameters: int
    tokens: int
    flops: int
    """Of one caption."""


def text_tower(model: str) -> TextTower:
    """The text tower of `conditioner.model`; nothing is loaded. Raises as `load_clip`."""
    architecture = _architecture(model)
    separate_text_tower = architecture.pop("custom_text", False)
    with torch.device("meta"):
        clip = (open_clip.CustomTextCLIP if separate_text_tower else open_clip.CLIP)(**architecture)
        tokens = architecture["text_cfg"].get("context_length", 77)
        with FlopCounterMode(display=False) as counter:
            clip.encode_text(torch.zeros(1, tokens, dtype=torch.long))
    del clip.visual
    parameters = sum(parameter.numel() for parameter in clip.parameters())
    return TextTower(parameters, tokens, counter.get_total_flops())


def _architecture(model: str) -> dict[str, Any]:
    """The options of open_clip's CLIP, from its own collection or from a JSON file."""
    if not model:
        raise ValueError(
            "conditioner.model is empty: set it to an open_clip architecture, such as ViT-H-14, "
            "or to the path of a model config in JSON"
        )
    if model.endswith(".json"):
        architecture = _read_architecture(Path(model))
    else:
        architecture = (
            open_clip.get_model_config(model) if model in open_clip.list_models() else None
        )
    if architecture is None:
        raise ValueError(
            f"conditioner.model: open_clip knows no architecture {model!r}; "
            f"`python -c 'import open_clip; print(open_clip.list_models())'` lists them"
        )
    if "multimodal_cfg" in architecture or FOREIGN_TEXT_TOWERS & architecture["text_cfg"].keys():
        raise ValueError(
            f"conditioner.model: the text tower of {model} is not CLIP's own: "
            f"choose another, such as ViT-H-14"
        )
    if "timm_model_name" in architecture["vision_cfg"]:
        architecture["vision_cfg"]["timm_model_pretrained"] = False
    return architecture


def _read_architecture(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"conditioner.model: no file at {path}: correct the path")
    try:
        architecture = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"conditioner.model: {path} is not JSON ({error})") from error
    if not isinstance(architecture, dict) or not all(
        isinstance(architecture.get(tower), dict) for tower in ("vision_cfg", "text_cfg")
    ):
        raise ValueError(f"conditioner.model: {path} lacks vision_cfg or text_cfg")
    return architecture


def _weights(model: str, pretrained: str) -> tuple[Path, dict[str, Any]]:
    """The weights file, and what open_clip knows about it (nothing when it is not a tag's)."""
    if not pretrained:
        raise ValueError(
            "conditioner.pretrained is empty: set it to an open_clip tag, " + LOCAL_FILE_HINT
        )
    tags = open_clip.list_pretrained_tags_by_model(model)
    if pretrained in tags:
        tag = open_clip.get_pretrained_cfg(model, pretrained)
        return _download(model, pretrained, tag.get("hf_hub", "")), tag
    if not pretrained.endswith(".safetensors"):
        known = f"its tags: {', '.join(tags)}" if tags else "it has no tags"
        raise ValueError(
            f"conditioner.pretrained = {pretrained} is no tag of {model} and no .safetensors file "
            f"({known})"
        )
    return Path(pretrained), {}


def _download(model: str, pretrained: str, hub_path: str) -> Path:
    repo, _, filename = hub_path.rpartition("/")
    if not repo:
        raise ValueError(
            f"conditioner.pretrained = {pretrained}: there is no safetensors file of {model} with "
            f"this tag: choose another, {LOCAL_FILE_HINT}"
        )
    file = str(PurePosixPath(filename or "open_clip_model.bin").with_suffix(".safetensors"))
    try:
        return hub.fetch_file(repo, file)
    except OSError as error:
        raise ValueError(
            f"conditioner.pretrained = {pretrained}: cannot download the weights of {model} "
            f"({error}): download {repo}/{file} on a machine with a network, {LOCAL_FILE_HINT}"
        ) from error
