"""Tensors of images as uint8, as grids and as PNG files."""

import io
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from data.secrets import public
from data.shards.codecs import MAX_IMAGE_BYTES
from data.storage.atomic import atomic_path
from data.storage.untrusted import read_file
from trainer.pictures.grids import GAP, about_picture


def to_uint8(images: Tensor) -> Tensor:
    """Convert images [B, 3, H, W] from [-1, 1] to uint8 on the CPU; other values are clipped."""
    return (images.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8).cpu()


def from_uint8(images: Tensor) -> Tensor:
    """Convert uint8 images [B, 3, H, W] to float32 in [-1, 1], on their device."""
    return images.float() / 127.5 - 1


def grid(images: Tensor, columns: int) -> Tensor:
    """Lay out uint8 images [B, 3, H, W] as [3, rows·(H+GAP)+GAP, columns·(W+GAP)+GAP]."""
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    picture = torch.full(
        (channels, rows * (height + GAP) + GAP, columns * (width + GAP) + GAP), 255
    ).to(torch.uint8)
    for number, image in enumerate(images):
        top = (number // columns) * (height + GAP) + GAP
        left = (number % columns) * (width + GAP) + GAP
        picture[:, top : top + height, left : left + width] = image
    return picture


def encode_png(picture: Tensor, about: Mapping[str, object] | None = None) -> bytes:
    """Encode a uint8 image [3, H, W] as PNG; about: JSON values for its `parameters` text."""
    file = io.BytesIO()
    _to_pillow(picture).save(file, "PNG", pnginfo=_info(about))
    return file.getvalue()


def save_png(path: Path, picture: Tensor, about: Mapping[str, object] | None = None) -> None:
    """Write a uint8 image [3, H, W] as PNG; about: JSON values for its `parameters` text.

    Raises: OSError if the file cannot be written.
    """
    save_picture(path, _to_pillow(picture), about)


def _to_pillow(picture: Tensor) -> Image.Image:
    return Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())


def read_about(path: Path) -> dict[str, object]:
    """Read the JSON values that `save_png` wrote into a picture; empty if it has none."""
    try:
        return about_picture(read_file(path, limit=MAX_IMAGE_BYTES, below=path.parent))
    except OSError:
        return {}


def save_picture(path: Path, image: Image.Image, about: Mapping[str, object] | None = None) -> None:
    """Write a Pillow image as PNG; about: JSON values for its `parameters` text.

    Raises: OSError if the file cannot be written.
    """
    with atomic_path(path) as part:
        image.save(part, "PNG", pnginfo=_info(about))


def _info(about: Mapping[str, object] | None) -> PngInfo:
    info = PngInfo()
    if about:
        info.add_itxt("parameters", json.dumps(public(about)))
    return info
