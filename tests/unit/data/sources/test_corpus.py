"""A hostile and odd folder: each of its files ends as the table says, and none in silence."""

import io
import json
import os
import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.config import SourceConfig
from data.shards.manifest import Rejected
from data.sources.samples import RawSample
from data.sources.sources import open_source
from tests.support.data_sets import data_config, png

SAMPLE = "sample"
"""Fate of a file that is used; any other fate is a part of the reason of its rejection."""
PIXELS = np.random.default_rng(0).integers(0, 256, (24, 20, 3), np.uint8)
PICTURE = Image.fromarray(PIXELS)


DEEP = {"I;16": np.uint16, "F": np.float32}


def encoded(kind: str, mode: str = "RGB", **options: Any) -> bytes:
    buffer = io.BytesIO()
    if mode in DEEP:
        image = Image.fromarray(PIXELS[..., 0].astype(DEEP[mode]) * 127)
    elif mode == "LAB":
        image = Image.merge("LAB", [Image.fromarray(PIXELS[..., n]) for n in range(3)])
    else:
        image = PICTURE.convert(mode)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded("JPEG", exif=exif)


def bomb(width: int, height: int) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + body))
        return struct.pack(">I", len(body)) + name + body + checksum

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(99)))
    return b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")


def frames(kind: str) -> bytes:
    other = PICTURE.transpose(Image.Transpose.ROTATE_180)
    return encoded(kind, save_all=True, append_images=[other])


JPEG, PNG = encoded("JPEG"), encoded("PNG")
BAD_EXIF = JPEG[:2] + b"\xff\xe1\x00\x10Exif\0\0MM\0*\xff\xff\xff\xff" + JPEG[2:]
UNDECODED = "image cannot be decoded"

PICTURES: dict[str, tuple[bytes, str]] = {
    **{f"png_{m}.png": (encoded("PNG", m), SAMPLE) for m in ("1", "L", "LA", "P", "RGB", "RGBA")},
    "png_deep.png": (encoded("PNG", "I;16"), SAMPLE),
    **{f"jpg_{m}.jpg": (encoded("JPEG", m), SAMPLE) for m in ("L", "RGB", "CMYK", "YCbCr")},
    **{f"turned_{n}.jpg": (turned(n), SAMPLE) for n in range(10)},
    **{f"bmp_{m}.bmp": (encoded("BMP", m), SAMPLE) for m in ("1", "L", "P", "RGB")},
    **{
        f"tif_{m.replace(';', '')}.tif": (encoded("TIFF", m), SAMPLE)
        for m in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "LAB", "I;16", "F", "YCbCr")
    },
    "lzw.tiff": (encoded("TIFF", compression="tiff_lzw"), SAMPLE),
    "progressive.jpeg": (encoded("JPEG", progressive=True), SAMPLE),
    "grey.jfif": (encoded("JPEG", "L"), SAMPLE),
    "bad_exif.jpg": (BAD_EXIF, SAMPLE),
    "lossless.webp": (encoded("WEBP", lossless=True), SAMPLE),
    "alpha.webp": (encoded("WEBP", "RGBA"), SAMPLE),
    "moving.webp": (frames("WEBP"), SAMPLE),
    "moving.gif": (frames("GIF"), SAMPLE),
    "still.gif": (encoded("GIF", "P"), SAMPLE),
    "still.avif": (encoded("AVIF"), SAMPLE),
    "LOUD.PNG": (PNG, SAMPLE),
    "Loud.JpG": (JPEG, SAMPLE),
    "png_inside.jpg": (PNG, SAMPLE),
    "jpeg_inside.png": (JPEG, SAMPLE),
    "empty.png": (b"", UNDECODED),
    "byte.jpg": (b"\xff", UNDECODED),
    "head.png": (PNG[:30], UNDECODED),
    "half.png": (PNG[: len(PNG) // 2], UNDECODED),
    "cut.jpg": (JPEG[:-60], "JPEG is cut off"),
    "noise.webp": (PIXELS.tobytes(), UNDECODED),
    "page.jpg": (b"<html>404</html>", UNDECODED),
    "drawing.png": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", UNDECODED),
    "script.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n", UNDECODED),
    "paper.jpg": (b"%PDF-1.7\n", UNDECODED),
    "archive.png": (b"PK\3\4" + bytes(40), UNDECODED),
    "object.png": (pickle.dumps(print), UNDECODED),
    "bomb.png": (bomb(60_000, 60_000), UNDECODED),
    "large.png": (bomb(9_000, 9_000), "is over"),
    "nothing.png": (bomb(0, 5), UNDECODED),
    **{f"other.{name}": (b"x", f"picture .{name}") for name in ("psd", "svg", "ico", "tga")},
    **{f"another.{name}": (b"x", f"picture .{name}") for name in ("ppm", "jp2", "dng")},
}
OTHERS = [
    *("README", ".DS_Store", "Thumbs.db", "._rgb.png", "notes.docx", "film.mp4", "list.npy"),
    *("pictures.zip", "shard.tar", "shard.tar.gz", "data.mdb", "x.tfrecord", "x.h5"),
    *("lonely.txt", "lonely.json", "index.html"),
]
"""Files that are left alone."""
TEXTS: dict[str, tuple[bytes, str]] = {
    "utf8": ("naïve 猫 🦆".encode(), SAMPLE),
    "bom": ("naïve".encode("utf-8-sig"), SAMPLE),
    "utf16": ("naïve".encode("utf-16"), SAMPLE),
    "utf32": ("naïve".encode("utf-32"), SAMPLE),
    "latin": (b"caf\xe9", SAMPLE),
    "nul": (b"a\0b", SAMPLE),
    "ansi": (b"\x1b[31mred\x1b[0m", SAMPLE),
    "html": (b"<script>alert(1)</script>", SAMPLE),
    "marks": ("\u202ereversed\u2066".encode(), SAMPLE),
    "long": (b"word " * 10_000, SAMPLE),
    "empty": (b"", "no caption"),
    "blank": (b" \n\t", "no caption"),
    "novel": (b"a" * 2**20, "text of"),
}
ROWS: dict[str, tuple[Any, str]] = {
    "row_list": (["a", "b"], SAMPLE),
    "row_object": ({"en": "a"}, SAMPLE),
    "row_number": (7, SAMPLE),
    "row_nested": ({"en": ["a", {"x": "b"}]}, SAMPLE),
    "row_false": (False, "caption is false"),
    "row_true": ([True], "caption is true"),
    "row_null": (None, "no caption"),
    "row_half": ("a cat \ud83d", "text is not Unicode"),
    "row_control": ("a\u0007b", SAMPLE),
}
NAMES = [
    *("with space.png", "ünïcode 猫.png", "#1.png", "100%.png", "[a].png", "*.png", "?.png"),
    *(
        "'quoted'.png",
        '"double".png',
        "new\nline.png",
        "-dash.png",
        "a.b.c.png",
        "x" * 200 + ".png",
    ),
    *("$HOME.png", "`id`.png", "a;b.png", "back\\slash.png", "{0..3}.png", ".hidden.png"),
]
NO_TEXT = os.fsdecode(b"\xff\xfe.png")
ODD: dict[str, tuple[Callable[[Path], object], str]] = {
    "pipe.png": (os.mkfifo, "not read"),
    "dead.png": (lambda path: path.symlink_to("nowhere"), "cannot be read"),
    "out.png": (lambda path: path.symlink_to("/etc/hostname"), "not read"),
    "folder": (lambda path: path.symlink_to(path.parent.parent), "link to a folder"),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The folder, and the fate of each file."""
    folder = tmp_path_factory.mktemp("odd") / "corpus"
    folder.mkdir()
    fates: dict[str, str] = {}
    for name, (content, fate) in PICTURES.items():
        (folder / name).write_bytes(content)
        (folder / name).with_suffix(".txt").write_text("caption")
        fates[name] = fate
    for name in OTHERS:
        (folder / name).write_bytes(b"x")
    for stem, (content, fate) in TEXTS.items():
        (folder / f"{stem}.png").write_bytes(png(len(fates)))
        (folder / f"{stem}.txt").write_bytes(content)
        fates[f"{stem}.png"] = fate
    rows = []
    for stem, (value, fate) in ROWS.items():
        (folder / f"{stem}.png").write_bytes(png(len(fates)))
        rows.append(json.dumps({"file_name": f"{stem}.png", "text": value}))
        fates[f"{stem}.png"] = fate
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    for name in (*NAMES, NO_TEXT):
        (folder / name).write_bytes(png(len(fates)))
        (folder / name).with_suffix(".txt").write_text("caption")
        fates[name] = "file name is not UTF-8" if name == NO_TEXT else SAMPLE
    for name, (make, fate) in ODD.items():
        make(folder / name)
        (folder / name).with_suffix(".txt").write_text("caption")
        fates[name] = fate
    return folder, fates


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_each_file_has_its_fate_and_none_vanishes(corpus: tuple[Path, dict[str, str]]) -> None:
    folder, fates = corpus
    assert len(fates) + len(OTHERS) >= 120
    source = open_source(data_config(folder.parent, source=SourceConfig(path=str(folder))))
    items = list(source)
    assert len(items) == len(source) == len(fates)
    found = {item.name: SAMPLE for item in items if isinstance(item, RawSample)}
    found |= {item.key: item.reason for item in items if isinstance(item, Rejected)}
    shown = {name: os.fsencode(name).decode(errors="replace") for name in fates}
    wrong = {
        name: (fate, found.get(shown[name]))
        for name, fate in fates.items()
        if fate not in found.get(shown[name], "")
    }
    assert not wrong
    alone = source.left_alone.entries()
    assert sum(entry.count for entry in alone) >= len(OTHERS)
    examples = {name for entry in alone for name in entry.examples}
    assert {"README", "film.mp4", "pictures.zip", "data.mdb", "lonely.json"} <= examples


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_every_sample_is_a_picture_with_a_caption(corpus: tuple[Path, dict[str, str]]) -> None:
    source = open_source(data_config(corpus[0].parent, source=SourceConfig(path=str(corpus[0]))))
    samples = [item for item in source if isinstance(item, RawSample)]
    assert all(sample.caption and sample.width and sample.height for sample in samples)
    captions = {sample.name: sample.caption for sample in samples}
    assert captions["utf16.png"] == captions["utf32.png"] == captions["bom.png"] == "naïve"
    assert captions["latin.png"] == "caf\ufffd"
    assert captions["row_nested.png"] == captions["row_object.png"] == "a"
