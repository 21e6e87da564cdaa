"""Pictures for people: tensors to uint8, grids, PNG files."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

GAP = 2


def to_uint8(images: Tensor) -> Tensor:
    """images: [B, 3, H, W] about [-1, 1] → the same, uint8 on the CPU."""
    return (images.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8).cpu()


def grid(images: Tensor, columns: int) -> Tensor:
    """images: [B, 3, H, W] uint8 → one picture [3, rows·(H+gap)+gap, columns·(W+gap)+gap] uint8."""
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


def tiles(picture: Image.Image, height: int, width: int, columns: int) -> Iterator[Image.Image]:
    """What `grid` laid out, row by row; blank where the last row was not full."""
    for top in range(GAP, picture.height - height, height + GAP):
        for left in range(GAP, columns * (width + GAP), width + GAP):
            yield picture.crop((left, top, left + width, top + height))


def save_png(path: Path, picture: Tensor, about: Mapping[str, object] | None = None) -> None:
    """Write [3, H, W] uint8 with its parameters as JSON in the PNG's `parameters` text."""
    image = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
    save_picture(path, image, about)


def save_picture(path: Path, image: Image.Image, about: Mapping[str, object] | None = None) -> None:
    """As save_png, of an image of Pillow's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    info = PngInfo()
    if about is not None:
        info.add_itxt("parameters", json.dumps(dict(about)))
    part = path.with_suffix(".part")
    image.save(part, "PNG", pnginfo=info)
    part.replace(path)
