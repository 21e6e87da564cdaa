"""Crop and resize an image to the input of the first stage."""

from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data.config import PixelConfig
from data.shards.codecs import PLAIN_PIXELS


def crop_box(width: int, height: int) -> tuple[float, float, float, float]:
    """Return the largest centred square as (left, top, right, bottom), in pixels."""
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def square(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """Resize the short side to `size` and crop the centre: [size, size, 3] uint8.

    The filter is antialiased bicubic. An image of that size is returned unchanged.
    """
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC, crop_box(*image.size))
    return np.asarray(image)


def transform_name(size: int, pixels: PixelConfig) -> str:
    """Describe the transform of `square`, and the options of pixels that are not the default."""
    others = [
        f"{name} {value}"
        for name, value in asdict(pixels).items()
        if value != getattr(PLAIN_PIXELS, name)
    ]
    return ", ".join(["centre crop", f"bicubic to {size}", *others])
