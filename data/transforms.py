"""From a decoded image to the first stage's input."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def crop_box(width: int, height: int) -> tuple[float, float, float, float]:
    """Return the largest centred square as (left, top, right, bottom), in pixels."""
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def square(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """Resize the short side to `size` and crop the centre: [size, size, 3] uint8.

    The filter is antialiased bicubic; an image that is already of that size stays as it is.
    """
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC, crop_box(*image.size))
    return np.asarray(image)


def describe(size: int) -> str:
    """Name what `square` does, for the manifest of what is made from its output."""
    return f"centre crop, bicubic to {size}"
