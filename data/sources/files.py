"""The files of a source of pictures: below a folder, or in zips, which are read in place."""

import io
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

from data.config import DataConfig
from data.shards.account import Fate
from data.shards.annotations import NO_ANNOTATIONS, AnnotationRule
from data.shards.codecs import BadSampleError
from data.sources.caption_tables import TABLES
from data.sources.coco import is_annotation
from data.sources.listing import MAC_FOLDER, Listing, list_files, own_folders, sort_files
from data.storage.untrusted import open_regular
from data.storage.zips import ZipArchive, ZipMemberError

MAX_TABLE_BYTES = 2**30
"""Largest table in a zip, which is read as a whole."""
OPEN_ZIPS = 4
"""Zips are read one after the other, and may be more than the system's limit of open files."""
_GLOB = frozenset("*?[")


class Files(Protocol):
    """The files of a source, by paths that are relative to it."""

    listing: Listing
    roots: tuple[str, ...]
    """Beginnings of the paths, up to the folders that may hold tables: `` or `part1.zip/`."""

    def __str__(self) -> str:
        """Return the place of the files, for messages."""
        ...

    def inner(self, name: str) -> str:
        """Return the path of a file relative to its root."""
        ...

    def state(self, name: str) -> bytes:
        """Return bytes that differ once a file has changed."""
        ...

    def open(self, name: str) -> BinaryIO:
        """Open a table, for reading and seeking.

        Raises: FileNotFoundError where it is missing; OSError or ValueError where it cannot be
        read.
        """
        ...

    def read(self, name: str, limit: int) -> bytes:
        """Read a file up to `limit` + 1 bytes; the last byte shows that it is over the limit.

        Raises: UnsafeFileError where it is no regular file of the source; BadSampleError where a
        zip does not give it; OSError where it cannot be read.
        """
        ...


class FolderFiles:
    """The files below a folder."""

    roots: tuple[str, ...] = ("",)

    def __init__(
        self,
        folder: Path,
        own: Iterable[Path] = (),
        annotations: AnnotationRule = NO_ANNOTATIONS,
    ) -> None:
        """own: resolved paths of folders that are not entered. annotations: see `list_files`."""
        self.folder = folder
        self.listing = list_files(folder, own, annotations)

    def __str__(self) -> str:
        return str(self.folder)

    def inner(self, name: str) -> str:
        """Return the path as it is."""
        return name

    def state(self, name: str) -> bytes:
        """Return size and time; those of the link where it leads nowhere."""
        file = self.folder / name
        facts = file.stat() if file.exists() else file.lstat()
        return b"%d\0%d" % (facts.st_size, facts.st_mtime_ns)

    def open(self, name: str) -> BinaryIO:
        """Open a file of the folder. Raises: as `open_regular`."""
        return os.fdopen(open_regular(self.folder / name, below=self.folder), "rb")

    def read(self, name: str, limit: int) -> bytes:
        """Read a file of the folder. Raises: as `open_regular`."""
        with self.open(name) as file:
            return file.read(limit + 1)


class _Place(NamedTuple):
    """Where a file is."""

    zip: Path
    member: str
    start: int
    """Length of the root in the file's path."""


class ZipFiles:
    """The files in zips.

    place: the zip, or the folder of several, for messages. zips: root → zip. inside: folder in the
    zips; empty: the only folder of each that holds more than pictures, or all. annotations: those
    that images need.
    Raises: as `ZipArchive`.
    """

    def __init__(
        self,
        place: Path,
        zips: Mapping[str, Path],
        inside: str = "",
        annotations: AnnotationRule = NO_ANNOTATIONS,
    ) -> None:
        self._place = place
        self.roots = tuple(zips)
        self._zips = zips
        self._archive = lru_cache(OPEN_ZIPS)(_open_zip)
        self._places: dict[str, _Place] = {}
        self.listing = Listing()
        for root, path in zips.items():
            try:
                archive = self._archive(path)
            except ValueError as error:
                raise ValueError(f"data.source.path: {error}") from error
            top = f"{inside}/" if inside else _only_folder(archive)
            for member in archive.members:
                if member.startswith(top):
                    name = root + member[len(top) :]
                    self._places[name] = _Place(path, member, len(root))
                else:
                    self.listing.left_alone.add(Fate.left_alone, f"not in {top}", root + member)
            for folder in archive.folders:
                self.listing.left_alone.add(Fate.left_alone, "entry of a folder", root + folder)
        sort_files(sorted(self._places), self.listing, self.inner, annotations)

    def __str__(self) -> str:
        return str(self._place)

    @property
    def paths(self) -> Sequence[Path]:
        """Paths of the zips."""
        return list(self._zips.values())

    def inner(self, name: str) -> str:
        """Return the path without the name of its zip."""
        return name[self._places[name].start :]

    def state(self, name: str) -> bytes:
        """Return size and CRC-32, as the zip states them."""
        place = self._places[name]
        info = self._archive(place.zip).members[place.member]
        return b"%d\0%d" % (info.file_size, info.CRC)

    def open(self, name: str) -> BinaryIO:
        """Read a table into memory."""
        if name not in self._places:
            raise FileNotFoundError(name)
        try:
            content = self.read(name, MAX_TABLE_BYTES)
        except BadSampleError as error:
            raise ValueError(f"data.source.path: {self}/{name}: {error}") from error
        if len(content) > MAX_TABLE_BYTES:
            over = f"over {MAX_TABLE_BYTES} bytes, which is too large for a table in a zip"
            raise ValueError(f"data.source.path: {self}/{name}: {over}")
        return io.BytesIO(content)

    def read(self, name: str, limit: int) -> bytes:
        """Read a member; see `ZipArchive.read`."""
        place = self._places[name]
        try:
            return self._archive(place.zip).read(place.member, limit)
        except ZipMemberError as error:
            raise BadSampleError(str(error)) from error


def _open_zip(path: Path) -> ZipArchive:
    return ZipArchive(open_regular(path), str(path))


def _only_folder(archive: ZipArchive) -> str:
    """Return the folder that holds all of a zip, with `/`; empty if its pictures lie there alone.

    Programs that pack a folder begin each path with its name, which would hide the tables. A folder
    of pictures alone may be that of a class.
    """
    names = [name for name in archive.members if not name.startswith(f"{MAC_FOLDER}/")]
    top = ""
    while True:
        folders = {name[len(top) :].partition("/")[0] for name in names}
        inner = f"{top}{folders.pop()}/" if len(folders) == 1 else ""
        if not inner or not all(name.startswith(inner) for name in names):
            return top
        direct = [name[len(inner) :] for name in names if "/" not in name[len(inner) :]]
        if direct and not any(name in TABLES or is_annotation(name) for name in direct):
            return top
        top = inner


def open_files(config: DataConfig, annotations: AnnotationRule = NO_ANNOTATIONS) -> Files:
    """Open the files at data.source.path: a folder, a zip, a folder in a zip, or several zips.

    A folder of zips without pictures beside them stands for the zips. Several are named by a
    pattern, too: `parts/*.zip`. annotations: those that images need.
    Raises: FileNotFoundError where there is nothing of this; ValueError where a zip is damaged, or
    the source lies in a folder of the experiment's own data.
    """
    path = config.source.path
    place = Path(path)
    folder = None
    if path and place.is_dir():
        folder = FolderFiles(place, own_folders(config, place), annotations)
        if folder.listing.images:
            return folder
    zips = open_zips(path, annotations)
    if zips is None:
        if folder is None:
            raise FileNotFoundError(
                f"data.source.path: no folder and no zip at {path!r}; it should hold the images"
            )
        return folder
    for zipped in zips.paths:
        own_folders(config, zipped)
    if folder is not None:
        zips.listing.rejected += folder.listing.rejected
        beside = folder.listing.left_alone.entries()
        zips.listing.left_alone.merge(one for one in beside if not one.reason.startswith(".zip:"))
    return zips


def open_zips(path: str, annotations: AnnotationRule = NO_ANNOTATIONS) -> ZipFiles | None:
    """Open a zip, a folder in a zip, the zips of a folder or of a pattern; None if there is none.

    annotations: those that images need.
    Raises: ValueError where a zip is damaged.
    """
    place = Path(path)
    if path and place.is_dir():
        return _several(place, place.rglob("*"), annotations)
    for outer in (place, *place.parents):
        if _is_zip(outer):
            inside = place.relative_to(outer).as_posix()
            return ZipFiles(outer, {"": outer}, "" if inside == "." else inside, annotations)
    found = find_pattern(place)
    base = os.path.commonpath([one.parent for one in found]) if found else ""
    return _several(Path(base), found, annotations)


def find_pattern(place: Path) -> list[Path]:
    """Return the files that a pattern names, sorted: none for a path that is there as it stands."""
    if not _GLOB & {*str(place)} or place.exists():
        return []
    anchor = Path(place.anchor)
    return sorted(one for one in anchor.glob(str(place.relative_to(anchor))) if one.is_file())


def _several(base: Path, paths: Iterable[Path], annotations: AnnotationRule) -> ZipFiles | None:
    zips = sorted(filter(_is_zip, paths))
    if not zips:
        return None
    if len(zips) == 1:
        return ZipFiles(zips[0], {"": zips[0]}, annotations=annotations)
    named = {f"{one.relative_to(base).as_posix()}/": one for one in zips}
    return ZipFiles(base, named, annotations=annotations)


def _is_zip(path: Path) -> bool:
    named = path.suffix.lower() == ".zip" and not path.name.startswith("._")
    return named and os.path.lexists(path) and not path.is_dir()
