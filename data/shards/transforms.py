"""Crop and resize an image to the input of the first stage."""

from dataclasses import asdict
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data.config import PixelConfig
from data.shards.codecs import PLAIN_PIXELS


class Crop(NamedTuple):
    """A square part of an image."""

    scale: float = 1.0
    """Side of the square by the short side of the image, in (0, 1]."""
    x: float = 0.5
    """Place from the left edge, 0, to the right edge, 1."""
    y: float = 0.5
    """Place from the top edge, 0, to the bottom edge, 1."""


CENTRE = Crop()
"""The largest centred square."""


def crop_box(width: int, height: int, crop: Crop = CENTRE) -> tuple[float, float, float, float]:
    """Return a crop as (left, top, right, bottom), in pixels."""
    side = min(width, height) * crop.scale
    left, top = (width - side) * crop.x, (height - side) * crop.y
    return left, top, left + side, top + side


def square(image: Image.Image, size: int, crop: Crop = CENTRE) -> NDArray[np.uint8]:
    """Resize a crop of an RGB image: [size, size, 3] uint8.

    The filter is antialiased bicubic. A whole image of that size is returned unchanged.
    """
    return _resized(image, size, crop, Image.Resampling.BICUBIC)


def nearest_square(labels: Image.Image, size: int, crop: Crop = CENTRE) -> NDArray[np.uint8]:
    """Resize a crop of a label map of mode L, with the nearest pixel: [size, size] uint8."""
    return _resized(labels, size, crop, Image.Resampling.NEAREST)


def _resized(
    image: Image.Image, size: int, crop: Crop, filtering: Image.Resampling
) -> NDArray[np.uint8]:
    if image.size != (size, size) or crop.scale < 1:
        image = image.resize((size, size), filtering, crop_box(*image.size, crop))
    return np.asarray(image)


def transform_name(size: int, pixels: PixelConfig) -> str:
    """Describe the transform of `square`, and the options of pixels that are not the default."""
    others = [
        f"{name} {value}"
        for name, value in asdict(pixels).items()
        if value != getattr(PLAIN_PIXELS, name)
    ]
    return ", ".join(["centre crop", f"bicubic to {size}", *others])
