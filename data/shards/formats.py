"""The closed list of picture formats, and the plugins that read some of them."""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

FORMATS = {
    "png": "PNG",
    "jpg": "JPEG",
    "jpeg": "JPEG",
    "webp": "WEBP",
    "jfif": "JPEG",
    "jpe": "JPEG",
    "bmp": "BMP",
    "gif": "GIF",
    "tif": "TIFF",
    "tiff": "TIFF",
    "avif": "AVIF",
    "heic": "HEIF",
    "heif": "HEIF",
    "jxl": "JXL",
}
"""Extension of a file → Pillow's name of the format; the content decides, not the extension."""

JXL_STREAM, JXL_BOXES = b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n"
HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis")
HEADER_BYTES = 64
"""Enough for the brands of a file."""


class Plugin(NamedTuple):
    """A package that teaches Pillow a format when its module is imported."""

    format: str
    package: str
    module: str
    """Module to import."""
    register: str
    """Function of the module to call afterwards; empty: the import registers the format."""
    reads: Callable[[bytes], bool]
    """Says whether a file with these first bytes is of the format."""


class FormatError(ValueError):
    """The error of a format that cannot be read here; the message is the reason."""


def _is_jxl(head: bytes) -> bool:
    return head.startswith((JXL_STREAM, JXL_BOXES))


def _is_heif(head: bytes) -> bool:
    """Look for a brand of HEVC; AVIF has the same boxes, and Pillow reads it."""
    return head[4:8] == b"ftyp" and any(brand in head[8:] for brand in HEIF_BRANDS)


PLUGINS = (
    Plugin("HEIF", "pillow-heif", "pillow_heif", "register_heif_opener", _is_heif),
    Plugin("JXL", "pillow-jxl-plugin", "pillow_jxl", "", _is_jxl),
)
OF_PILLOW = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
"""Formats that need no plugin."""


def readers(payload: bytes | memoryview) -> tuple[str, ...]:
    """Return Pillow's names of the formats that a picture may have; import the plugin of its own.

    Raises: FormatError where the plugin is not installed.
    """
    head = bytes(payload[:HEADER_BYTES])
    for plugin in PLUGINS:
        if plugin.reads(head):
            if find_spec(plugin.module) is None:
                missing = f"{plugin.format} needs {plugin.package}: pip install -e '.[formats]'"
                raise FormatError(missing)
            module = import_module(plugin.module)
            if plugin.register:
                getattr(module, plugin.register)()
            return (plugin.format,)
    return OF_PILLOW


def extension_of(payload: bytes) -> str:
    """Return the extension for a picture by its first bytes; `png` for unknown ones."""
    head = payload[:HEADER_BYTES]
    starts = {b"\xff\xd8": "jpg", b"BM": "bmp", b"GIF8": "gif", b"II": "tif", b"MM": "tif"}
    found = next((name for start, name in starts.items() if head.startswith(start)), "png")
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    if _is_heif(head):
        return "heic"
    if head[4:8] == b"ftyp":
        return "avif"
    return "jxl" if _is_jxl(head) else found


def jxl_size(payload: bytes | memoryview) -> tuple[int, int] | None:
    """Read (width, height) from the header of a JPEG XL, before a decoder takes memory for it.

    Returns None for other formats. Source: ISO/IEC 18181-1, SizeHeader; 18181-2, boxes.
    Raises: ValueError where there is no codestream.
    """
    if not _is_jxl(bytes(payload[: len(JXL_BOXES)])):
        return None
    start = 0 if bytes(payload[:2]) == JXL_STREAM else _find_stream(payload)
    bits = int.from_bytes(payload[start + 2 : start + 14], "little")

    def take(count: int) -> int:
        nonlocal bits
        value, bits = bits & ((1 << count) - 1), bits >> count
        return value

    def side(in_eights: int) -> int:
        return 8 * (1 + take(5)) if in_eights else 1 + take((9, 13, 18, 30)[take(2)])

    in_eights = take(1)
    height = side(in_eights)
    ratio = ((0, 1), (1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))[take(3)]
    width = height * ratio[0] // ratio[1] if ratio[0] else side(in_eights)
    return width, height


def _find_stream(payload: bytes | memoryview) -> int:
    """Return the start of the codestream in the box jxlc, or in the first box jxlp."""
    place = 0
    while place + 16 <= len(payload):
        size, name = (
            int.from_bytes(payload[place : place + 4], "big"),
            payload[place + 4 : place + 8],
        )
        header = 8
        if size == 1:  # a size of 64 bits follows
            size, header = int.from_bytes(payload[place + 8 : place + 16], "big"), 16
        start = place + header + (4 if name == b"jxlp" else 0)
        if name in (b"jxlc", b"jxlp") and bytes(payload[start : start + 2]) == JXL_STREAM:
            return start
        if size < header:  # 0: to the end of the file
            break
        place += size
    raise ValueError("JPEG XL without a codestream")
