"""Decode a sample to a square: its image, with the label map and the boxes of the same crop."""

from collections import Counter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data.config import PixelConfig
from data.shards.annotations import AnnotationRule, Box
from data.shards.codecs import IMAGE_EXTENSIONS, BadSampleError, decode_image
from data.shards.stored import StoredSample
from data.shards.transforms import CENTRE, Crop, crop_box, nearest_square, square


class Square(NamedTuple):
    """A decoded sample."""

    pixels: NDArray[np.uint8]
    """[size, size, 3]."""
    labels: NDArray[np.uint8] | None
    """[size, size], class numbers; None where no map is asked for."""
    boxes: list[Box]
    """In parts of the square."""

    def mirrored(self) -> "Square":
        """Return the mirror image, left to right."""
        labels = None if self.labels is None else self.labels[:, ::-1]
        return Square(self.pixels[:, ::-1], labels, [box.mirrored() for box in self.boxes])


def decode_square(
    sample: StoredSample,
    size: int,
    pixels: PixelConfig,
    rule: AnnotationRule,
    *,
    crop: Crop = CENTRE,
    noted: Counter[str] | None = None,
) -> Square:
    """Decode the image of a sample and the annotations of a rule, cropped and resized together.

    Maps keep their numbers: they take the nearest pixel. Boxes are clipped to the crop; those
    outside of it go. pixels, noted: as in `decode_image`.
    Raises: BadSampleError where a member is missing or damaged, or the map has another size.
    """
    image = _decode(sample, pixels, noted)
    labels, boxes = None, list[Box]()
    if rule.maps:
        labels = rule.read_map(sample.member, image.size)
        labels = nearest_square(Image.fromarray(labels), size, crop)
    if rule.boxes:
        width, height = image.size
        left, top, right, bottom = crop_box(width, height, crop)
        part = left / width, top / height, right / width, bottom / height
        inside = (box.in_crop(part) for box in rule.read_boxes(sample.member))
        boxes = [box for box in inside if box is not None]
    return Square(square(image, size, crop), labels, boxes)


def _decode(sample: StoredSample, pixels: PixelConfig, noted: Counter[str] | None) -> Image.Image:
    for extension in IMAGE_EXTENSIONS:
        if sample.has(extension):
            return decode_image(sample.payload(extension), pixels, noted)
    raise BadSampleError("no image")
