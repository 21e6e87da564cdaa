"""Loading of CLIP networks (Radford et al. 2021), by name or from files, by open_clip."""

import json
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import huggingface_hub
import open_clip
from safetensors import SafetensorError
from torch import Tensor

from models.config import ConditionerConfig

NETWORK_TIMEOUT_S = 5.0
LOCAL_FILE_HINT = "or set conditioner.pretrained to the path of a safetensors file"


class Clip(NamedTuple):
    """A frozen CLIP with all that its inputs need.

    model: has encode_image([B, 3, size, size] in [0, 1], normalised by the mean and standard
    deviation) and encode_text(tokenizer(captions)), both → [B, embed_dim].
    """

    model: Any
    tokenizer: Callable[[list[str]], Tensor]
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]

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
    name = _architecture(config.model)
    weights, tag = _weights(name, config.pretrained)
    normalisation = {key: tag[key] for key in ("mean", "std") if key in tag}
    try:
        model = open_clip.create_model(
            name,
            pretrained=str(weights),
            force_quick_gelu=tag.get("quick_gelu", False),
            force_preprocess_cfg=normalisation,
        )
    except SafetensorError as error:
        raise ValueError(
            f"conditioner.pretrained: {weights} is no safetensors file or is damaged ({error})"
        ) from error
    except (RuntimeError, KeyError) as error:
        raise ValueError(
            f"conditioner.pretrained: {weights} holds another network than conditioner.model = "
            f"{config.model} describes ({' '.join(str(error).split())[:200]})"
        ) from error
    model.eval().requires_grad_(False)
    preprocessing = open_clip.get_model_preprocess_cfg(model)
    return Clip(
        model=model,
        tokenizer=open_clip.get_tokenizer(name),
        image_mean=tuple(preprocessing["mean"]),
        image_std=tuple(preprocessing["std"]),
    )


def _architecture(model: str) -> str:
    """open_clip's name of the architecture, which a JSON file may define."""
    if not model:
        raise ValueError(
            "conditioner.model is empty: set it to an open_clip architecture, such as ViT-H-14, "
            "or to the path of a model config in JSON"
        )
    if model.endswith(".json"):
        name, architecture = Path(model).stem, _register(Path(model))
    else:
        name, architecture = model, open_clip.get_model_config(model) or {}
    if not architecture:
        raise ValueError(
            f"conditioner.model: open_clip knows no architecture {model!r}; "
            f"`python -c 'import open_clip; print(open_clip.list_models())'` lists them"
        )
    if {"hf_model_name", "hf_tokenizer_name"} & architecture["text_cfg"].keys():
        raise ValueError(
            f"conditioner.model: the text tower of {model} is not CLIP's own: "
            f"choose another, such as ViT-H-14"
        )
    return name


def _register(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"conditioner.model: no file at {path}: correct the path")
    try:
        architecture = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"conditioner.model: {path} is not JSON ({error})") from error
    missing = {"embed_dim", "vision_cfg", "text_cfg"} - architecture.keys()
    if missing:
        raise ValueError(f"conditioner.model: {path} lacks {', '.join(sorted(missing))}")
    if open_clip.get_model_config(path.stem) not in (None, architecture):
        raise ValueError(
            f"conditioner.model: {path}: open_clip has another architecture of the name "
            f"{path.stem}: rename the file"
        )
    open_clip.add_model_config(path)
    return architecture


def _weights(name: str, pretrained: str) -> tuple[Path, dict[str, Any]]:
    """The weights file, and what open_clip knows about it (nothing when it is not a tag's)."""
    if not pretrained:
        raise ValueError(
            "conditioner.pretrained is empty: set it to an open_clip tag, " + LOCAL_FILE_HINT
        )
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained in tags:
        tag = open_clip.get_pretrained_cfg(name, pretrained)
        return _download(name, pretrained, tag.get("hf_hub", "")), tag
    path = Path(pretrained)
    if path.suffix != ".safetensors":
        known = f"tags of {name}: {', '.join(tags)}" if tags else f"{name} has no tags"
        raise ValueError(
            f"conditioner.pretrained = {pretrained} is no tag of {name} and no .safetensors file "
            f"({known})"
        )
    if not path.is_file():
        raise FileNotFoundError(f"conditioner.pretrained: no file at {path}: correct the path")
    return path, {}


def _download(name: str, pretrained: str, hub_path: str) -> Path:
    repo, _, filename = hub_path.rpartition("/")
    if not repo:
        raise ValueError(
            f"conditioner.pretrained = {pretrained}: {name} with this tag has no safetensors file: "
            f"choose another tag, {LOCAL_FILE_HINT}"
        )
    file = str(PurePosixPath(filename or "open_clip_model.bin").with_suffix(".safetensors"))
    cached = huggingface_hub.try_to_load_from_cache(repo, file)
    if isinstance(cached, str):
        return Path(cached)
    try:
        _require_network()
        return Path(huggingface_hub.hf_hub_download(repo, file))
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ValueError(
            f"conditioner.pretrained = {pretrained}: cannot download the weights of {name} "
            f"({reason}): download {repo}/{file} on a machine with a network, {LOCAL_FILE_HINT}"
        ) from error


def _require_network() -> None:
    """Fail in seconds: the hub's own client retries for a minute."""
    request = urllib.request.Request(huggingface_hub.constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=NETWORK_TIMEOUT_S).close()
    except urllib.error.HTTPError as error:
        # A mirror may answer its root with "not found", and still have the file.
        if error.code >= 500:
            raise
