"""Pictures of every mode, depth and format, and libvips, which decodes them without our code."""

import io
import struct
import zlib
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

VIPS: Any = import_module("pyvips")
"""Without types, which pyvips does not declare."""
WIDTH, HEIGHT = 40, 24
DISPLAY_P3, PRESS = (bytes(VIPS.Image.profile_load(name)) for name in ("p3", "cmyk"))
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
HEIC_START = b"\0\0\0\x1cftypheic"
BROKEN = b"no profile at all" * 9


def scene() -> Image.Image:
    """Draw ramps of colour with two patches."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    ramps = (x * 255 // (WIDTH - 1), y * 255 // (HEIGHT - 1), (x + y) * 255 // (WIDTH + HEIGHT - 2))
    pixels = np.stack(ramps, axis=-1).astype(np.uint8)
    pixels[4:10, 4:12], pixels[12:20, 20:32] = (200, 120, 60), (60, 200, 60)
    return Image.fromarray(pixels)


def deep() -> NDArray[np.uint16]:
    """Draw a ramp of 16 bits: [H, W]."""
    return np.linspace(0, 65535, WIDTH * HEIGHT).reshape(HEIGHT, WIDTH).astype(np.uint16)


def encoded(image: Image.Image, image_format: str, **options: Any) -> bytes:
    """Encode by Pillow."""
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def turned(orientation: int) -> Image.Exif:
    """Return EXIF data of an orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def chunk(name: bytes, body: bytes) -> bytes:
    """Return a chunk of PNG."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def deep_png(values: np.ndarray, depth: int, *, hidden: Sequence[int] = ()) -> bytes:
    """Write a PNG of any depth, which Pillow cannot do: [H, W] or [H, W, C].

    hidden: the transparent colour.
    """
    values = values.reshape(HEIGHT, WIDTH, -1)
    shifts = np.arange(depth - 1, -1, -1)
    bits = (values[..., None].astype(np.uint32) >> shifts & 1).astype(np.uint8)
    rows = np.packbits(bits.reshape(HEIGHT, -1), axis=1)
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[values.shape[2]]
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, depth, kind, 0, 0, 0)
    level = struct.pack(f">{len(hidden)}H", *hidden)
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header),
            chunk(b"tRNS", level) if level else b"",
            chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))),
            chunk(b"IEND", b""),
        ]
    )


def corpus() -> Iterator[tuple[str, bytes]]:
    """Yield (name, file) of pictures that libvips reads by the same rules."""
    yield from _pngs()
    yield from _deep_pngs()
    yield from _jpegs()
    yield from _tiffs()
    yield from _others()


def layers() -> dict[str, Image.Image]:
    """Draw the scene in the modes that Pillow writes."""
    colour = scene()
    grey = colour.convert("L")
    opacity = Image.fromarray(np.tile(np.linspace(0, 255, WIDTH).astype(np.uint8), (HEIGHT, 1)))
    return {
        "1": grey.convert("1"),
        "L": grey,
        "LA": Image.merge("LA", (grey, opacity)),
        "P": colour.quantize(32),
        "RGB": colour,
        "RGBA": Image.merge("RGBA", (*colour.split(), opacity)),
        "CMYK": colour.convert("CMYK"),
    }


def _pngs() -> Iterator[tuple[str, bytes]]:
    drawn = layers()
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
        yield f"png {mode}", encoded(drawn[mode], "PNG")
    for mode in ("RGB", "RGBA", "P"):
        yield f"png {mode}, Display P3", encoded(drawn[mode], "PNG", icc_profile=DISPLAY_P3)
    for mode in ("L", "RGB"):
        yield f"png {mode}, sRGB", encoded(drawn[mode], "PNG", icc_profile=SRGB)
    for mode, hidden in {"P": 3, "RGB": (200, 120, 60), "L": drawn["L"].getpixel((5, 5))}.items():
        yield f"png {mode}, one colour hidden", encoded(drawn[mode], "PNG", transparency=hidden)
    opacities = bytes(range(0, 256, 8))
    yield "png P, opacities", encoded(drawn["P"], "PNG", transparency=opacities)
    yield "png RGB, EXIF 6", encoded(drawn["RGB"], "PNG", exif=turned(6))
    interlaced = VIPS.Image.new_from_array(np.asarray(drawn["RGB"]))
    yield "png RGB, interlaced", interlaced.pngsave_buffer(interlace=True)
    more = [drawn["RGB"].transpose(Image.Transpose.ROTATE_180)]
    yield "png RGB, animated", encoded(drawn["RGB"], "PNG", save_all=True, append_images=more)


def _deep_pngs() -> Iterator[tuple[str, bytes]]:
    ramp, grey = deep(), np.asarray(layers()["L"])
    for depth in (1, 2, 4):
        values = grey >> (8 - depth)
        yield f"png grey of {depth} bits", deep_png(values, depth)
        hidden = [int(values[5, 5])]
        yield f"png grey of {depth} bits, one hidden", deep_png(values, depth, hidden=hidden)
    colour = np.stack([ramp, ramp[:, ::-1], ramp[::-1]], axis=-1)
    colour[5, 5] = (65535, 0, 65535)  # unlike its neighbours in 8 bits, too
    for channels, hidden in ((1, [65535]), (3, colour[5, 5].tolist())):
        values = colour[..., :channels]
        yield f"png of 16 bits, {channels} channels", deep_png(values, 16)
        yield (
            f"png of 16 bits, {channels} channels, one hidden",
            deep_png(values, 16, hidden=hidden),
        )
        layered = np.dstack([values, ramp[:, ::-1]])
        yield f"png of 16 bits, {channels} channels and opacity", deep_png(layered, 16)


def _jpegs() -> Iterator[tuple[str, bytes]]:
    drawn = layers()
    for orientation in range(1, 9):
        yield f"jpeg, EXIF {orientation}", encoded(drawn["RGB"], "JPEG", exif=turned(orientation))
    for mode in ("L", "RGB"):
        yield f"jpeg {mode}", encoded(drawn[mode], "JPEG", quality=95)
    yield "jpeg, progressive", encoded(drawn["RGB"], "JPEG", progressive=True)
    yield "jpeg L, sRGB", encoded(drawn["L"], "JPEG", icc_profile=SRGB)
    yield "jpeg, Display P3", encoded(drawn["RGB"], "JPEG", icc_profile=DISPLAY_P3)
    yield "jpeg CMYK, press", encoded(drawn["CMYK"], "JPEG", icc_profile=PRESS)
    yield "jpeg, broken profile", encoded(drawn["RGB"], "JPEG", icc_profile=BROKEN)


def _tiffs() -> Iterator[tuple[str, bytes]]:
    drawn, ramp = layers(), deep()
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
        yield f"tiff {mode}", encoded(drawn[mode], "TIFF")
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits"):
        yield f"tiff, {compression}", encoded(drawn["RGB"], "TIFF", compression=compression)
    yield "tiff, EXIF 6", encoded(drawn["RGB"], "TIFF", exif=turned(6))
    yield "tiff CMYK, press", encoded(drawn["CMYK"], "TIFF", icc_profile=PRESS)
    yield "tiff L, white is zero", encoded(drawn["L"], "TIFF", tiffinfo={262: 0})
    little = Image.fromarray(ramp)
    big = Image.frombytes("I;16B", ramp.shape[::-1], ramp.astype(">u2").tobytes())
    yield "tiff of 16 bits, little-endian", encoded(little, "TIFF")
    yield "tiff of 16 bits, big-endian", encoded(big, "TIFF")
    yield "tiff of 16 bits, LZW", encoded(little, "TIFF", compression="tiff_lzw")
    yield "tiff of 16 bits, white is zero", encoded(little, "TIFF", tiffinfo={262: 0})
    colour = VIPS.Image.new_from_array(np.stack([ramp, ramp[:, ::-1], ramp[::-1]], axis=-1))
    yield "tiff of 16 bits, RGB", colour.copy(interpretation="rgb16").tiffsave_buffer()


def _others() -> Iterator[tuple[str, bytes]]:
    drawn = layers()
    more = [drawn["P"].transpose(Image.Transpose.ROTATE_180)]
    yield "gif", encoded(drawn["P"], "GIF")
    yield "gif, one colour hidden", encoded(drawn["P"], "GIF", transparency=3)
    yield "gif, animated", encoded(drawn["P"], "GIF", save_all=True, append_images=more)
    yield "webp, lossy", encoded(drawn["RGB"], "WEBP")
    yield "webp RGBA", encoded(drawn["RGBA"], "WEBP", lossless=True)
    yield "webp, EXIF 6", encoded(drawn["RGB"], "WEBP", lossless=True, exif=turned(6))
    profile = {"lossless": True, "icc_profile": DISPLAY_P3}
    yield "webp, Display P3", encoded(drawn["RGB"], "WEBP", **profile)
    several = {"lossless": True, "save_all": True, "append_images": more}
    yield "webp, animated", encoded(drawn["RGB"], "WEBP", **several)
    # with fewer samples of colour than of light, libavif and libheif round differently
    full = {"quality": 100, "subsampling": "4:4:4"}
    yield "avif", encoded(drawn["RGB"], "AVIF", **full)
    yield "avif RGBA", encoded(drawn["RGBA"], "AVIF", **full)
    yield "avif, EXIF 6", encoded(drawn["RGB"], "AVIF", exif=turned(6), **full)


def decode_by_vips(payload: bytes) -> NDArray[np.uint8]:
    """Decode to 8-bit sRGB on white by libvips: [H, W, 3]."""
    image = VIPS.Image.new_from_buffer(payload, "").autorot()
    profile = bytes(image.get("icc-profile-data")) if image.get_typeof("icc-profile-data") else b""
    if profile and profile != BROKEN:
        image = image.icc_transform("srgb", embedded=True, intent="perceptual")
    else:
        image = image.colourspace("srgb")
    if image.hasalpha():
        image = image.flatten(background=255)
    return np.asarray(image.cast("uchar").numpy())[..., :3]
