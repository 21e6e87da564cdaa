"""Loads CLIP networks (Radford et al. 2021) of open_clip, by name or from files."""

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from models.conditioning.clip_tokenizer import ClipTokenizer
from models.config import ConditionerConfig
from models.weights import hub
from models.weights.files import load_weights

LOCAL_FILE_HINT = "or set conditioner.pretrained to the path of a safetensors file"
MAX_CONFIG_BYTES = 2**20
MAX_NUMBER, MAX_LAYERS = 2**20, 500
"""Largest number, and largest number of layers, in the config of a network from a file."""
FP16_BYTES = 2
SMALL_PARAMETERS = 2**26
"""A network of no more weights is built, whatever the size of its file."""
FOREIGN_TEXT_TOWERS = {"hf_model_name", "hf_tokenizer_name"}
PLAIN_TEXT_TOWER = {"context_length", "vocab_size", "width", "heads", "layers", "no_causal_mask"}
"""Options of text towers whose size follows from a formula."""


class Clip(NamedTuple):
    """A frozen CLIP with its tokenizer and the normalisation of its images.

    model: has encode_image(images [B, 3, size, size], normalised from [0, 1] by image_mean and
    image_std) and encode_text(tokenizer(captions)), both → [B, embed_dim].
    """

    model: Any
    tokenizer: ClipTokenizer
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    text_architecture: dict[str, Any]
    """Options of the text tower, JSON values."""
    embed_dim: int
    """Channels of an embedding of an image or a text."""

    @property
    def image_size(self) -> int:
        """Side of the square images, in pixels."""
        size = self.model.visual.image_size
        return size if isinstance(size, int) else size[0]

    @property
    def text_width(self) -> int:
        """Channels of a token in the text tower."""
        return getattr(self.model, "text", self.model).ln_final.normalized_shape[0]


def _open_clip() -> Any:
    """Import open_clip where it is needed: it takes seconds. It has no type stubs."""
    import open_clip

    return open_clip


def load_clip(config: ConditionerConfig) -> Clip:
    """Load the CLIP of `config.model` and `config.pretrained`, frozen, in fp32 on the CPU.

    It reads weights from a safetensors file, fp32 or fp16, never from a pickle.

    Raises: ValueError or FileNotFoundError, naming the option, if there is no such network.
    """
    architecture = _architecture(config.model)
    path, tag = _weights(config.model, config.pretrained)
    if tag.get("quick_gelu"):
        architecture["quick_gelu"] = True
    try:
        if config.model.endswith(".json"):
            _check_size(architecture, path)
        model = _network(architecture)
        text = architecture["text_cfg"]
        tokenizer = ClipTokenizer(
            text.get("context_length", 77), **text.get("tokenizer_kwargs", {})
        )
    except Exception as error:
        # open_clip checks few options: a wrong one raises nearly any error
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(
            f"conditioner.model: open_clip cannot build {config.model} ({reason})"
        ) from error
    load_weights(
        model,
        path,
        option="conditioner.pretrained",
        described_by=f"conditioner.model = {config.model}",
    )
    return Clip(
        model=model.eval().requires_grad_(False),
        tokenizer=tokenizer,
        image_mean=tuple(tag.get("mean") or _open_clip().OPENAI_DATASET_MEAN),
        image_std=tuple(tag.get("std") or _open_clip().OPENAI_DATASET_STD),
        text_architecture={**text, "quick_gelu": architecture.get("quick_gelu", False)},
        embed_dim=architecture["embed_dim"],
    )


class TextTower(NamedTuple):
    """Size and cost of the text tower of a CLIP, known without its weights."""

    parameters: int
    tokens: int
    flops: int
    """[FLOPs] Multiplications and additions of matrix products, for one caption."""


def text_tower(model: str) -> TextTower:
    """Describe the text tower of `conditioner.model` without loading weights.

    Raises: ValueError or FileNotFoundError, naming the option, if there is no such network.
    """
    architecture = _architecture(model)
    text = architecture["text_cfg"]
    if text.keys() <= PLAIN_TEXT_TOWER and {"vocab_size", "width", "layers"} <= text.keys():
        return _plain_text_tower(text, architecture["embed_dim"])
    with torch.device("meta"):
        clip = _network(architecture)
        tokens = text.get("context_length", 77)
        with FlopCounterMode(display=False) as counter:
            clip.encode_text(torch.zeros(1, tokens, dtype=torch.long))
    del clip.visual
    parameters = sum(parameter.numel() for parameter in clip.parameters())
    return TextTower(parameters, tokens, counter.get_total_flops())


def _plain_text_tower(text: Mapping[str, int], embed_dim: int) -> TextTower:
    """Count a transformer of Radford et al. 2021 without open_clip, whose import takes seconds."""
    tokens, width, layers = text.get("context_length", 77), text["width"], text["layers"]
    block = 12 * width**2 + 13 * width  # queries to values, output, two layers of 4 · width, norms
    parameters = layers * block + (text["vocab_size"] + tokens + 2 + embed_dim) * width
    products = 12 * tokens * width**2 + 2 * tokens**2 * width
    flops = 2 * (layers * products + width * embed_dim)
    return TextTower(parameters + 1, tokens, flops)  # 1: the temperature


def _network(architecture: dict[str, Any]) -> Any:
    """Build open_clip's CLIP of these options, with random weights."""
    options = dict(architecture)
    custom = options.pop("custom_text", False)
    return (_open_clip().CustomTextCLIP if custom else _open_clip().CLIP)(**options)


def _architecture(model: str) -> dict[str, Any]:
    """Read the options of a CLIP from open_clip's collection or from a JSON file."""
    if not model:
        raise ValueError(
            "conditioner.model is empty: set it to an open_clip architecture, such as ViT-H-14, "
            "or to the path of a model config in JSON"
        )
    if model.endswith(".json"):
        architecture = _read_architecture(Path(model))
    elif (described := _collection() / f"{model}.json").parent == _collection() and (
        described.is_file()
    ):
        architecture = _read_architecture(described)
    else:
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


def _collection() -> Path:
    """Return open_clip's folder of architectures, without an import of the package."""
    package = find_spec("open_clip")
    assert package is not None and package.origin is not None
    return Path(package.origin).parent / "model_configs"


def _check_size(architecture: dict[str, Any], weights: Path) -> None:
    """Check, before memory is taken, that a network is no larger than the file of its weights.

    Raises: ValueError where it is larger, or a number of the config is beyond any network's.
    """
    values: list[Any] = [architecture]
    for value in values:  # the list grows with the nested values
        if isinstance(value, dict):
            values += value.values()
        elif isinstance(value, list):
            values += value
        elif isinstance(value, int | float) and not -1 <= value <= MAX_NUMBER:
            raise ValueError(f"its {value} is out of range")
    layers = (architecture[tower].get("layers", 0) for tower in ("vision_cfg", "text_cfg"))
    if any(isinstance(count, int) and count > MAX_LAYERS for count in layers):
        raise ValueError(f"it has more than {MAX_LAYERS} layers")
    with torch.device("meta"):
        parameters = sum(tensor.numel() for tensor in _network(architecture).parameters())
    held = weights.stat().st_size // FP16_BYTES if weights.is_file() else 0
    if parameters > max(held, SMALL_PARAMETERS):
        raise ValueError(f"{parameters} weights are more than {weights} holds")


def _read_architecture(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"conditioner.model: no file at {path}: correct the path")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ValueError(f"conditioner.model: {path} is over {MAX_CONFIG_BYTES} bytes: no config")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"conditioner.model: {path} is not JSON ({error})") from error
    match content:
        case {"vision_cfg": dict(), "text_cfg": dict()} as architecture:
            return architecture
        case _:
            raise ValueError(f"conditioner.model: {path} lacks vision_cfg or text_cfg")


def _weights(model: str, pretrained: str) -> tuple[Path, dict[str, Any]]:
    """Return the weights file and open_clip's entry of the tag, which is empty for a path."""
    if not pretrained:
        raise ValueError(
            "conditioner.pretrained is empty: set it to an open_clip tag, " + LOCAL_FILE_HINT
        )
    tags: list[str] = _open_clip().list_pretrained_tags_by_model(model)
    if pretrained in tags:
        tag: dict[str, Any] = _open_clip().get_pretrained_cfg(model, pretrained)
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
