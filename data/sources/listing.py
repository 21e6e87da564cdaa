"""List the files below a folder of images, each in its part: nothing is passed over in silence."""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath, PurePosixPath

from data.config import DataConfig
from data.shards.account import Fate, Tally
from data.shards.annotations import NO_ANNOTATIONS, AnnotationRule
from data.shards.codecs import IMAGE_EXTENSIONS
from data.shards.index import OTHER_PICTURES, unread_picture
from data.shards.manifest import Rejected
from data.shards.tar import UNPACK
from data.sources.caption_tables import TABLES
from data.sources.coco import is_annotation
from data.sources.open_images import is_box_table
from data.sources.tars import UNPACK_SUFFIX
from data.text import printable

CONTACT_SHEET_NAME = "contact_sheet.png"
"""Picture that `trainer.pack … stats=true` writes into a data set's folder."""
MAC_FOLDER = "__MACOSX"
"""Folder of a zip with what a Mac notes of the other files."""
WAYS = {
    "tar": "for tars set data.source.kind=webdataset",
    "tgz": "unpack it, and for tars set data.source.kind=webdataset",
    "zip": "not read beside pictures; data.source.path=FILE.zip reads it in place",
    "mdb": "LMDB is not read: write its values to files or tars",
    "lmdb": "LMDB is not read: write its values to files or tars",
    "tfrecord": "TFRecords are not read: write them to tars",
    "h5": "HDF5 is not read: write its arrays to images",
    "hdf5": "HDF5 is not read: write its arrays to images",
    "npy": "arrays are not read: write them to images",
    "npz": "arrays are not read: write them to images",
} | {
    kind: f"of tables, captions.{kind} and metadata.{kind} in data.source.path are read"
    for kind in ("csv", "tsv", "parquet", "jsonl")
}
"""Extension of a file that is not read → what to do."""


@dataclass(slots=True, kw_only=True)
class Listing:
    """The files below a folder, by paths relative to it, in the order of their names."""

    images: list[str] = field(default_factory=list[str])
    """Pictures of the formats that are read."""
    inputs: list[str] = field(default_factory=list[str])
    """Texts beside images, and tables."""
    rejected: list[Rejected] = field(default_factory=list[Rejected])
    """Samples that cannot be read: other formats, links to folders, folders without access."""
    left_alone: Tally = field(default_factory=Tally)
    """Files that are no samples."""


def own_folders(config: DataConfig, source: Path) -> set[Path]:
    """Return the folders of an experiment's data sets and cache, which are no part of its source.

    Raises: ValueError where the source lies in one of them, or one holds pictures of the source.
    """
    options = {"data.train": config.train, "data.val": config.val, "data.latents": config.latents}
    options |= {"data.cache.dir": config.cache.dir} if config.cache.dir else {}
    real = Path(os.path.realpath(source))
    own: set[Path] = set()
    for option, name in options.items():
        folder = Path(os.path.realpath(name))
        if real.is_relative_to(folder):
            raise ValueError(
                f"data.source.path: {source} lies in {option}; choose another data.dir"
            )
        if folder.is_relative_to(real):
            pictures = (one for one in folder.rglob("*") if _extension(one) in IMAGE_EXTENSIONS)
            if any(one.name != CONTACT_SHEET_NAME for one in pictures):
                raise ValueError(
                    f"{option}: {name} holds pictures of data.source.path; choose another data.dir"
                )
        own.add(folder)
    return own


def list_files(
    folder: Path, own: Iterable[Path], annotations: AnnotationRule = NO_ANNOTATIONS
) -> Listing:
    """List the files below a folder.

    own: resolved paths of folders that are not entered; see `own_folders`. annotations: those that
    images need.
    """
    listing = Listing()
    names = sorted(walk(folder, listing, set(own)))
    sort_files(names, listing, annotations=annotations)
    return listing


def sort_files(
    names: Iterable[str],
    listing: Listing,
    inner: Callable[[str], str] = str,
    annotations: AnnotationRule = NO_ANNOTATIONS,
) -> None:
    """Add files to a listing, by their names.

    inner: gives the path below a root for tables. annotations: those that images need.
    Raises: ValueError where a table of captions or annotations is compressed.
    """
    texts: list[str] = []
    beside: list[str] = []
    for name in names:
        path = PurePosixPath(name)
        extension = _extension(path)
        if path.name.startswith("._") or MAC_FOLDER in path.parts:
            listing.left_alone.add(Fate.left_alone, "attributes that a Mac wrote", name)
        elif any(path.name.lower().endswith(f".{member}") for member in annotations.members):
            beside.append(name)
        elif extension in IMAGE_EXTENSIONS:
            listing.images.append(name)
        elif extension in OTHER_PICTURES:
            listing.rejected.append(Rejected(key=name, reason=unread_picture(extension)))
        elif _is_table(inner(name), annotations):
            listing.inputs.append(name)
        elif program := _compressor(inner(name), annotations):
            shown = printable(name)
            raise ValueError(
                f"data.source.path: {shown} is compressed with {program}: unpack it once, "
                f"`{UNPACK[program]} {shown}`"
            )
        elif extension in ("txt", "json"):
            texts.append(name)
        else:
            kind = f".{extension}" if extension else "file without an extension"
            way = WAYS.get(extension, "no picture and no caption")
            listing.left_alone.add(Fate.left_alone, f"{kind}: {way}", name)
    stems = {name.rpartition(".")[0] for name in listing.images}
    stems |= {item.key.rpartition(".")[0] for item in listing.rejected}
    for name, dots in [*((name, 1) for name in texts), *((name, 2) for name in beside)]:
        stem, *kind = name.rsplit(".", dots)
        if stem in stems:
            listing.inputs.append(name)
        else:
            reason = f".{'.'.join(kind)}: no image of this name"
            listing.left_alone.add(Fate.left_alone, reason, name)


def _is_table(name: str, annotations: AnnotationRule) -> bool:
    known = name in TABLES or is_annotation(name)
    return known or (annotations.boxes and is_box_table(name))


def _compressor(name: str, annotations: AnnotationRule) -> str:
    """Return the program that compressed a table; empty for other files."""
    stem, dot, suffix = name.rpartition(".")
    return UNPACK_SUFFIX.get(dot + suffix, "") if _is_table(stem, annotations) else ""


def _extension(path: PurePath) -> str:
    return path.suffix.lower().removeprefix(".")


def walk(folder: Path, listing: Listing, own: set[Path]) -> Iterator[str]:
    """Yield the files below a folder; links to folders, and closed folders, go to the listing."""

    def shown(path: str | Path) -> str:
        return Path(path).relative_to(folder).as_posix()

    def closed(error: OSError) -> None:
        reason = f"a folder that cannot be read ({error.strerror})"
        listing.rejected.append(Rejected(key=shown(error.filename), reason=reason))

    for place, folders, files in os.walk(folder, onerror=closed):
        here = Path(place)
        for name in list(folders):
            if Path(os.path.realpath(here / name)) in own:
                reason = "folder of this experiment's own data"
                listing.left_alone.add(Fate.left_alone, reason, shown(here / name))
            elif (here / name).is_symlink():
                reason = "a link to a folder, which is not followed; copy the folder here"
                listing.rejected.append(Rejected(key=shown(here / name), reason=reason))
            else:
                continue
            folders.remove(name)
        yield from (shown(here / name) for name in files)
