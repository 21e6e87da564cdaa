"""Decode and encode the members of a sample: images, text, JSON and arrays.

Untrusted data cannot execute code here: there is no pickle, and data name no constructors. Every
size that the data state has a limit.
"""

import codecs
import io
import json
import math
import warnings
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from data.config import PixelConfig, Truncated
from data.shards.colours import PixelError, scale_transparency, to_srgb
from data.shards.formats import FORMATS, FormatError, jxl_size, readers
from data.storage.documents import DocumentError, parse_json
from data.storage.documents import is_json_array as is_json_array
from data.storage.documents import is_json_object as is_json_object
from data.text import is_unicode

IMAGE_EXTENSIONS = tuple(FORMATS)
CAPTION_EXTENSIONS = ("txt", "cls")
ANNOTATION_EXTENSIONS = MAP, BOXES = "map.png", "boxes.json"
ARRAY_EXTENSIONS = ("moments.npy", "flip.moments.npy", "text.npy")
EXTENSIONS = frozenset(
    (
        *IMAGE_EXTENSIONS,
        *CAPTION_EXTENSIONS,
        *ANNOTATION_EXTENSIONS,
        *ARRAY_EXTENSIONS,
        "json",
    )
)
"""The only members that are read."""

MAX_IMAGE_BYTES = 2**28
MAX_PIXELS = 2**26
MAX_TEXT_BYTES = 2**16
MAX_ARRAY_BYTES = 2**28
MAX_ARRAY_HEADER_BYTES = 2**14

Buffer = bytes | memoryview


TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation → how to turn the stored picture upright."""
QUARTER_TURNS = range(5, 9)
"""EXIF orientations that swap width and height."""
END_OF_JPEG = b"\xff\xd9"
LATE_EXIF, PNG_DEPTH_AT = b"eXIf", 24
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""First bytes of a text → its encoding. The mark of UTF-32 begins with that of UTF-16."""
_MARKS_BEGIN = bytes(mark[0] for mark in BYTE_ORDER_MARKS)
REPLACED_BYTES = "text with bytes that are not of data.encoding: each replaced by U+FFFD"
CUT_OFF = "JPEG was cut off: the rest is grey"
BROKEN_EXIF = "EXIF cannot be read: picture taken as it lies"
PLAIN_PIXELS = PixelConfig()

# Pillow warns of damaged metadata, whose pixels are whole
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")


class BadSampleError(ValueError):
    """The error of a sample that cannot be used; the message is the reason and names no sample."""


@contextmanager
def _opened(payload: Buffer) -> Generator[Image.Image, None, None]:
    """Open an image of bounded size; only its header is read."""
    if len(payload) > MAX_IMAGE_BYTES:
        raise BadSampleError(f"image of {len(payload)} bytes is over {MAX_IMAGE_BYTES}")
    try:
        allowed = readers(payload)
        _check_pixels(*(jxl_size(payload) or (0, 0)))  # its plugin decodes while it opens
        image = Image.open(io.BytesIO(payload), formats=allowed)
        _check_pixels(*image.size)
        yield image
    except BadSampleError:
        raise
    except (PixelError, FormatError) as error:
        raise BadSampleError(str(error)) from error
    except Exception as error:
        # Pillow's decoders raise nearly every built-in exception for damaged input
        raise BadSampleError(f"image cannot be decoded ({type(error).__name__})") from error


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadSampleError(f"image of {width}x{height} is over {MAX_PIXELS} px")


def decode_image(
    payload: Buffer, pixels: PixelConfig = PLAIN_PIXELS, noted: Counter[str] | None = None
) -> Image.Image:
    """Decode a picture of one of FORMATS to 8-bit sRGB, turned upright by its EXIF data.

    Of an animation the first frame counts. data/shards/colours.py tells how colours are converted.
    pixels: colour behind transparent pixels, and the rule for JPEGs that are cut off. noted: counts
    CUT_OFF, BROKEN_EXIF and BROKEN_PROFILE.
    Raises: BadSampleError where the payload is of another format, damaged, or over MAX_PIXELS.
    """
    noted = Counter() if noted is None else noted
    with _opened(payload) as image:
        try:
            image.load()
        except OSError:
            if image.format not in ("JPEG", "MPO"):
                raise
            image = _completed(payload, pixels, noted)
        if image.format == "PNG":
            scale_transparency(image, depth=payload[PNG_DEPTH_AT])
        turn = TURNS.get(_orientation(image, noted))
        colours = to_srgb(image, pixels.background, noted)
        return colours if turn is None else colours.transpose(turn)


def decode_plain(payload: Buffer, *modes: str) -> Image.Image:
    """Decode a PNG as it lies, without a conversion of its colours.

    modes: Pillow's names of the modes that it may have.
    Raises: BadSampleError where it has another mode, is damaged, over MAX_PIXELS, or is no PNG.
    """
    with _opened(payload) as image:
        if image.format != "PNG" or image.mode not in modes:
            found = f"{image.format} of mode {image.mode}"
            raise BadSampleError(f"image is {found}, not PNG of mode {' or '.join(modes)}")
        image.load()
        return image


def _completed(payload: Buffer, pixels: PixelConfig, noted: Counter[str]) -> Image.Image:
    """Decode a JPEG that is cut off; its decoder draws grey where nothing arrived.

    Raises: BadSampleError where data.pixels.truncated rejects it, or it is damaged otherwise.
    """
    with _opened(bytes(payload) + END_OF_JPEG) as image:
        image.load()
    if pixels.truncated is Truncated.reject:
        raise BadSampleError("JPEG is cut off (data.pixels.truncated=fill takes it)")
    noted[CUT_OFF] += 1
    return image


def _orientation(image: Image.Image, noted: Counter[str]) -> int:
    """Return the EXIF orientation that is still to be applied, from 1 to 8.

    The readers of TIFF, HEIC and JPEG XL apply it themselves, the last but for recompressed JPEGs.
    """
    if image.format in ("TIFF", "HEIF") or not getattr(image, "jpeg", True):
        return 1
    try:
        # not of a subclass: that of PNG would decode the pixels
        found: object = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF raises nearly every built-in exception
        noted[BROKEN_EXIF] += 1
        return 1
    return found if isinstance(found, int) and found in TURNS else 1


def image_size(payload: Buffer) -> tuple[int, int]:
    """Read the size (width, height) in pixels of the upright image from its header.

    Raises: BadSampleError where the payload is of a format that is not in FORMATS, or over
    MAX_PIXELS.
    """
    with _opened(payload) as image:
        if image.format == "PNG" and "exif" not in image.info and LATE_EXIF in bytes(payload):
            image.load()  # it may lie after the pixels
        turned = _orientation(image, Counter()) in QUARTER_TURNS
        return (image.height, image.width) if turned else image.size


def image_text(payload: Buffer, name: str) -> str:
    """Return a text that an image holds under a name; empty if it holds none.

    Raises: BadSampleError where the payload is of a format that is not in FORMATS, or over
    MAX_PIXELS.
    """
    with _opened(payload) as image:
        text: object = image.info.get(name)
        return text if isinstance(text, str) else ""


def encode_png(image: Image.Image) -> bytes:
    """Encode an image as PNG; the same pixels give the same bytes."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@lru_cache(maxsize=256)
def _npy_header(header: bytes) -> tuple[np.dtype, tuple[int, ...]]:
    """Parse the bytes of an .npy file before its data."""
    try:
        stream = io.BytesIO(header)
        if np.lib.format.read_magic(stream) == (1, 0):
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
        else:
            shape, fortran_order, dtype = np.lib.format.read_array_header_2_0(stream)
    except Exception as error:
        # numpy's parser evaluates a literal, which may raise nearly any error
        raise BadSampleError("array header cannot be read") from error
    plain = dtype.itemsize > 0 and not dtype.hasobject and not fortran_order
    if not plain or any(type(side) is not int or side < 0 for side in shape):
        raise BadSampleError(f"array of {dtype} is not plain row-major data")
    return dtype, shape


def decode_npy(payload: Buffer) -> np.ndarray:
    """View the bytes of an .npy file as an array, without a copy and without pickle.

    Raises: BadSampleError where the header is damaged, the array holds Python objects or is not
    row-major, or its size is not that of the payload or over MAX_ARRAY_BYTES.
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
    except ValueError as error:  # more dimensions, or larger ones, than numpy supports
        raise BadSampleError(f"array of {len(shape)} dimensions cannot be formed") from error


def encode_npy(array: np.ndarray) -> bytes:
    """Encode an array as an .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def decode_text(payload: Buffer, encoding: str = "utf-8", noted: Counter[str] | None = None) -> str:
    """Decode a caption or class, and strip the white space around it.

    encoding: of the text, unless it begins with a byte order mark. Bytes that do not fit it become
    U+FFFD. noted: counts REPLACED_BYTES.
    Raises: BadSampleError where the payload is over MAX_TEXT_BYTES.
    """
    if len(payload) > MAX_TEXT_BYTES:
        raise BadSampleError(f"text of {len(payload)} bytes is over {MAX_TEXT_BYTES}")
    if payload and payload[0] in _MARKS_BEGIN:
        head = bytes(payload[:4])
        marked = (name for mark, name in BYTE_ORDER_MARKS.items() if head.startswith(mark))
        encoding = next(marked, encoding)
    try:
        return str(payload, encoding).strip()
    except UnicodeDecodeError:
        if noted is not None:
            noted[REPLACED_BYTES] += 1
        return str(payload, encoding, errors="replace").strip()


def decode_json(payload: Buffer) -> Any:
    """Decode JSON of bounded size and depth.

    Raises: BadSampleError where the payload is not JSON, too large or nested too deep
    (`parse_json`), or has text that is not Unicode.
    """
    try:
        value = parse_json(payload)
    except DocumentError as error:
        raise BadSampleError(str(error)) from error
    check_unicode(value)
    return value


def check_unicode(value: object) -> None:
    r"""Check all text in a JSON value: JSON can escape half of a surrogate pair, `\ud800`.

    Raises: BadSampleError where UTF-8 cannot encode a text.
    """
    if not is_unicode(json.dumps(value, ensure_ascii=False)):
        raise BadSampleError("text is not Unicode")
