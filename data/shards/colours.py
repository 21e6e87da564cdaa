"""Turn a decoded picture of any mode and depth into 8-bit sRGB.

1. Deeper channels are scaled to 8 bits, not clipped. White is the largest value of the depth; where
   a file of 32 bits does not tell its range, its largest value decides (`_scale`).
2. The embedded ICC profile is applied with its perceptual intent. Without a profile, grey and RGB
   are sRGB, CMYK is (1 - C)(1 - K), and LAB is CIELAB under D50.
3. Transparent pixels are laid over a background, in sRGB.
"""

import io
from collections import Counter
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

MAX_PROFILE_BYTES = 2**22
"""Profiles of printers take up to about 3 MB."""
BROKEN_PROFILE = "ICC profile cannot be used: colours taken as sRGB"
PHOTOMETRIC, BITS, SAMPLE_FORMAT = 262, 258, 339
"""Tags of TIFF."""
WHITE_IS_ZERO, UNSIGNED = 0, 1

_cms: Any = ImageCms
"""The module without its types, which Pillow declares in part."""
_SRGB = ImageCms.ImageCmsProfile(_cms.createProfile("sRGB"))
_SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}
"""Mode → colour space of a profile."""


class PixelError(ValueError):
    """The error of pixels without a known meaning; the message is the reason."""


def to_srgb(image: Image.Image, background: str, noted: Counter[str]) -> Image.Image:
    """Convert a picture to mode RGB; one of sRGB without transparency is returned as it is.

    background: colour behind transparent pixels, `#rrggbb`. noted: counts BROKEN_PROFILE.
    Raises: PixelError where the range of its values is unknown.
    """
    profile: object = image.info.get("icc_profile")
    colour, alpha = _split(image)
    if isinstance(profile, bytes) and profile and colour.mode in _SPACES:
        colour = _managed(colour, profile, noted)
    elif colour.mode == "LAB":
        colour = _applied(_from_lab(), colour)
    if colour.mode != "RGB":
        colour = colour.convert("RGB")
    if alpha is None:
        return colour
    canvas = Image.new("RGB", image.size, background)
    canvas.paste(colour, mask=alpha)
    return canvas


def scale_transparency(image: Image.Image, depth: int) -> None:
    """Give the transparent colour of a PNG the depth of Pillow's pixels, 8 bits.

    depth: bits of a channel in the file, in which PNG states that colour. RGB of 16 bits is
    compared by its upper 8 bits, since Pillow keeps no more.
    """
    colour: Any = image.info.get("transparency")
    if image.mode == "L" and isinstance(colour, int):
        image.info["transparency"] = colour * 255 // (2**depth - 1)
    elif image.mode == "RGB" and colour is not None:
        image.info["transparency"] = tuple(level >> (depth - 8) for level in colour)


def _split(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Return the colour channels in 8 bits, and the opacity [0, 255]; None if all is opaque."""
    if image.mode.startswith(("I", "F")):
        return _to_8_bits(image)
    if not image.has_transparency_data:
        return (image if image.mode in (*_SPACES, "LAB") else _plain(image)), None
    is_grey = image.mode in ("1", "L", "LA", "La")
    layer = image.convert("LA" if is_grey else "RGBA")
    *channels, alpha = layer.split()
    return channels[0] if is_grey else Image.merge("RGB", channels), alpha


def _plain(image: Image.Image) -> Image.Image:
    return image.convert("L" if image.mode == "1" else "RGB")


def _to_8_bits(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Scale grey of 16 or 32 bits; the level that PNG calls transparent gets opacity 0."""
    values = np.asarray(image)
    tags: dict[int, object] = getattr(image, "tag_v2", {})
    grey = _scale(values, image.mode, tags)
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        grey = 255 - grey
    hidden: object = image.info.get("transparency")
    opacity = np.where(values == hidden, 0, 255).astype(np.uint8)
    alpha = Image.fromarray(opacity) if isinstance(hidden, int) else None
    return Image.fromarray(grey), alpha


def _scale(values: NDArray[np.generic], mode: str, tags: dict[int, object]) -> NDArray[np.uint8]:
    """Scale grey values [H, W] to 8 bits.

    16 bits lose their lower half, as Pillow does with 16-bit RGB. 32-bit integers up to 65535 are
    such values, too; else their full range counts. Of floats, 1 is white if none is larger; else
    255 or 65535, which other programs write.
    """
    low, high = float(values.min()), float(values.max())
    if mode == "F":
        if not low >= 0 or not (high <= 1 or 2 <= high <= 65535):  # NaN is not >= 0
            raise PixelError(f"float pixels from {low:g} to {high:g} have no known white")
        white = 1 if high <= 1 else 255 if high <= 255 else 65535
        return np.rint(values.astype(np.float64) * (255 / white)).astype(np.uint8)
    if mode.startswith("I;16"):
        bits = _first(tags.get(BITS), 16)
    elif low >= 0 and high <= 65535:
        bits = 16
    elif _first(tags.get(SAMPLE_FORMAT), UNSIGNED) == UNSIGNED:
        values, bits = values.astype(np.int32).view(np.uint32), 32
    elif low >= 0:
        bits = 31
    else:
        raise PixelError(f"integer pixels from {low:g} to {high:g} have no known black")
    return (values.astype(np.uint32) >> (bits - 8)).astype(np.uint8)


def _first(tag: Any, default: int) -> int:
    """Return the value of a tag, or the first of several."""
    value: Any = tag if isinstance(tag, int) else next(iter(tag or ()), None)
    return value if isinstance(value, int) else default


def _managed(colour: Image.Image, profile: bytes, noted: Counter[str]) -> Image.Image:
    """Apply a profile; grey pixels may have one of RGB."""
    for candidate in (colour, colour.convert("RGB")) if colour.mode == "L" else (colour,):
        try:
            conversion = _conversion(profile, candidate.mode)
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            continue
        return candidate if conversion is None else _applied(conversion, candidate)
    noted[BROKEN_PROFILE] += 1
    return colour


@lru_cache(maxsize=32)
def _conversion(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Build the conversion to sRGB; None where it would change nothing.

    Raises: ValueError, OSError or PyCMSError where the profile is broken, or of another mode.
    """
    if len(profile) > MAX_PROFILE_BYTES:
        raise ValueError(f"profile of {len(profile)} bytes is over {MAX_PROFILE_BYTES}")
    opened: Any = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    if opened.profile.xcolor_space.strip() != _SPACES[mode]:
        raise ValueError(f"profile of {opened.profile.xcolor_space} for {mode}")
    conversion = ImageCms.buildTransform(opened, _SRGB, mode, "RGB")
    same = mode != "CMYK" and _changes_nothing(conversion, mode)
    return None if same else conversion


def _changes_nothing(conversion: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Try 216 colours, or the grey levels: no channel may change by more than one level."""
    cube = np.indices((6, 6, 6)).T.reshape(1, -1, 3) * 51
    levels = cube if mode == "RGB" else np.arange(256)[None]
    probe = Image.fromarray(levels.astype(np.uint8))
    found = np.asarray(_applied(conversion, probe), np.int16)
    return bool(np.abs(found - np.asarray(probe.convert("RGB"))).max() <= 1)


@lru_cache(maxsize=1)
def _from_lab() -> ImageCms.ImageCmsTransform:
    lab = ImageCms.ImageCmsProfile(_cms.createProfile("LAB"))
    return ImageCms.buildTransform(lab, _SRGB, "LAB", "RGB")


def _applied(conversion: ImageCms.ImageCmsTransform, image: Image.Image) -> Image.Image:
    return conversion.apply(image)
