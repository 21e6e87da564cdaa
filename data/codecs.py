"""The closed list of what a shard may hold, and how each member becomes values.

Nothing here can execute what it reads: no pickle, no constructor named by the data, a cap on
every size that the data states.
"""

import io
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain
from mmap import mmap
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")
CAPTION_EXTENSIONS = ("txt", "cls")
ARRAY_EXTENSIONS = ("moments.npy", "flip.moments.npy", "text.npy")
EXTENSIONS = frozenset((*IMAGE_EXTENSIONS, *CAPTION_EXTENSIONS, *ARRAY_EXTENSIONS, "json"))
"""Members of any other name are never read."""

MAX_IMAGE_BYTES = 2**28
MAX_PIXELS = 2**26
MAX_TEXT_BYTES = 2**16
MAX_JSON_BYTES = 2**20
MAX_JSON_DEPTH = 32
MAX_ARRAY_BYTES = 2**28
MAX_ARRAY_HEADER_BYTES = 2**14

Buffer = bytes | memoryview | mmap


QUARTER_TURNS = range(5, 9)
"""EXIF orientations that swap width and height."""


class BadSampleError(ValueError):
    """A sample that cannot be used; the message is the reason, without the sample's name."""


@contextmanager
def _opened(payload: Buffer) -> Iterator[Image.Image]:
    """Open an image of bounded size, reading no more than its header."""
    if len(payload) > MAX_IMAGE_BYTES:
        raise BadSampleError(f"image of {len(payload)} bytes is over {MAX_IMAGE_BYTES}")
    try:
        image = Image.open(io.BytesIO(payload), formats=("PNG", "JPEG", "WEBP"))
        if image.width * image.height > MAX_PIXELS:
            raise BadSampleError(f"image of {image.width}x{image.height} is over {MAX_PIXELS} px")
        yield image
    except BadSampleError:
        raise
    except Exception as error:
        # Pillow's decoders answer damaged input with nearly every built-in exception.
        raise BadSampleError(f"image cannot be decoded ({type(error).__name__})") from error


def decode_image(payload: Buffer) -> Image.Image:
    """Decode PNG, JPEG or WebP to RGB, upright; transparency is flattened on white.

    Raises:
        BadSampleError: not an image of these formats, damaged, or over MAX_PIXELS.
    """
    with _opened(payload) as image:
        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            layer = image.convert("RGBA")
            image = Image.new("RGBA", layer.size, "white")
            image.alpha_composite(layer)
        return image.convert("RGB")


def image_size(payload: Buffer) -> tuple[int, int]:
    """Return the (width, height) that `decode_image` would give, from the header alone.

    Raises:
        BadSampleError: not an image of these formats, or over MAX_PIXELS.
    """
    with _opened(payload) as image:
        exif = Image.Exif()
        exif.load(image.info.get("exif", b""))
        turned = exif.get(ExifTags.Base.Orientation, 1) in QUARTER_TURNS
        return (image.height, image.width) if turned else image.size


def encode_png(image: Image.Image) -> bytes:
    """Encode an image as PNG; the same pixels give the same bytes."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@lru_cache(maxsize=256)
def _npy_header(header: bytes) -> tuple[np.dtype, tuple[int, ...]]:
    """Parse everything before an .npy file's data."""
    try:
        stream = io.BytesIO(header)
        if np.lib.format.read_magic(stream) == (1, 0):
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
        else:
            shape, fortran_order, dtype = np.lib.format.read_array_header_2_0(stream)
    except Exception as error:
        # numpy's parser raises whatever its evaluation of literals meets
        raise BadSampleError("array header cannot be read") from error
    plain = dtype.itemsize > 0 and not dtype.hasobject and not fortran_order
    if not plain or any(type(side) is not int or side < 0 for side in shape):
        raise BadSampleError(f"array of {dtype} is not plain row-major data")
    return dtype, shape


def decode_npy(payload: Buffer) -> np.ndarray:
    """View an .npy file's bytes as an array, without a copy and never with pickle.

    Raises:
        BadSampleError: a damaged header, Python objects, or a size that does not match.
    """
    if len(payload) > MAX_ARRAY_BYTES:
        raise BadSampleError(f"array of {len(payload)} bytes is over {MAX_ARRAY_BYTES}")
    length_bytes = 2 if payload[6:7] == b"\x01" else 4
    start = 8 + length_bytes + int.from_bytes(payload[8 : 8 + length_bytes], "little")
    if start > MAX_ARRAY_HEADER_BYTES:
        raise BadSampleError(f"array header of {start} bytes is over {MAX_ARRAY_HEADER_BYTES}")
    dtype, shape = _npy_header(bytes(payload[:start]))
    count = math.prod(shape)
    if start + count * dtype.itemsize != len(payload):
        raise BadSampleError(f"array of {shape} {dtype} does not fit {len(payload)} bytes")
    try:
        return np.frombuffer(payload, dtype, count, start).reshape(shape)
    except ValueError as error:  # more dimensions, or larger ones, than numpy has
        raise BadSampleError(f"array of {len(shape)} dimensions cannot be formed") from error


def encode_npy(array: np.ndarray) -> bytes:
    """Encode an array as .npy."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def decode_text(payload: Buffer) -> str:
    """Decode a caption or class: UTF-8, without surrounding white space.

    Raises:
        BadSampleError: not UTF-8, or over MAX_TEXT_BYTES.
    """
    if len(payload) > MAX_TEXT_BYTES:
        raise BadSampleError(f"text of {len(payload)} bytes is over {MAX_TEXT_BYTES}")
    try:
        return str(payload, "utf-8").strip()
    except UnicodeDecodeError as error:
        raise BadSampleError("text is not UTF-8") from error


def decode_json(payload: Buffer) -> Any:
    """Decode JSON of bounded size and depth.

    Raises:
        BadSampleError: not JSON, over MAX_JSON_BYTES, or nested over MAX_JSON_DEPTH.
    """
    if len(payload) > MAX_JSON_BYTES:
        raise BadSampleError(f"JSON of {len(payload)} bytes is over {MAX_JSON_BYTES}")
    try:
        value = json.loads(bytes(payload))
    except (ValueError, RecursionError) as error:
        raise BadSampleError(f"JSON cannot be read ({type(error).__name__})") from error
    level = [value]
    for _ in range(MAX_JSON_DEPTH + 1):
        level = [item for item in level if isinstance(item, dict | list)]
        if not level:
            return value
        children = (item.values() if isinstance(item, dict) else item for item in level)
        level = list(chain.from_iterable(children))
    raise BadSampleError(f"JSON is nested deeper than {MAX_JSON_DEPTH}")
