"""Annotations that a test makes up: a label map of the picture's own colours, and boxes."""

import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data.shards.annotations import Box, encode_boxes, encode_map
from data.shards.codecs import BOXES, MAP
from data.shards.manifest import Manifest
from tests.support.data_sets import pixels_of, png

BOX = Box("cat", 0.125, 0.25, 0.5, 1.0)


def annotations(number: int, size: int = 8) -> dict[str, bytes]:
    """The members of sample `number`: a map of the red channel's top bits, and two boxes."""
    return {MAP: encode_map(map_of(number, size)), BOXES: encode_boxes(boxes_of(number))}


def map_of(number: int, size: int = 8) -> NDArray[np.uint8]:
    return (pixels_of(png(number, size))[..., 0] >> 4).astype(np.uint8)


def boxes_of(number: int) -> list[Box]:
    return [BOX, Box("dog", 0.5, 0.0, 0.5 + (1 + number % 4) / 8, 0.75)]


def encoded(array: NDArray[Any], mode: str | None = None) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


def name_classes(folder: str) -> None:
    """Write the classes of `annotations` to the manifest of a data set, and the images' size."""
    manifest = Manifest.load(folder, option="data.train")
    maps = [f"class {number}" for number in range(16)]
    named = dataclasses.replace(
        manifest, image_size=8, map_classes=maps, box_classes=["cat", "dog"]
    )
    named.save(Path(folder))
