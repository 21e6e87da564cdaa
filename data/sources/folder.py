"""A folder or zips of images as a source."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import PurePosixPath
from typing import BinaryIO

from typing_extensions import override

from data.config import DataConfig
from data.shards.account import Fate
from data.shards.annotations import NO_LABELS, AnnotationRule, Box, Labels, encode_boxes
from data.shards.captions import texts_of
from data.shards.codecs import (
    BOXES,
    IMAGE_EXTENSIONS,
    MAX_IMAGE_BYTES,
    MAX_TEXT_BYTES,
    BadSampleError,
    decode_json,
    decode_text,
)
from data.shards.manifest import Rejected
from data.sources.caption_tables import Row, read_tables
from data.sources.coco import is_annotation, read_annotations
from data.sources.files import FolderFiles, open_files
from data.sources.making import Classes, make_sample
from data.sources.open_images import BoxTable, is_box_table, read_boxes
from data.sources.samples import Item, RawSample, Source, spread
from data.storage.documents import MAX_JSON_BYTES, is_json_object, lookup
from data.storage.untrusted import UnsafeFileError
from data.text import is_unicode, printable

COMPARED, COMPARED_BYTES = 128, 2**16
"""Files of a folder whose first bytes are compared, beside the names, sizes and times of all."""
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}
"""Names of folders of splits, which hold those of classes."""
MAX_HINTS = 5
"""Kinds of files named where a folder holds no image."""


class FolderSource(Source):
    """The images below a folder, or in zips.

    A caption comes from the folder's tables, else from annotations of COCO, else from the .txt or
    .json with the image's stem.
    Raises: FileNotFoundError where the folder is missing or holds no image; ValueError where a
    table cannot be read.
    """

    licence = ""
    image_size = 0

    def __init__(self, config: DataConfig) -> None:
        self._config = config
        self._annotations = AnnotationRule.of(config)
        self._files = open_files(config, self._annotations)
        listing = self._files.listing
        self.left_alone = listing.left_alone
        if not listing.images:
            found = "; ".join(entry.reason for entry in self.left_alone.entries()[:MAX_HINTS])
            raise FileNotFoundError(
                f"data.source.path: no images ({', '.join(IMAGE_EXTENSIONS)}) in {self._files}"
                + (f"; it holds {found}" if found else "")
            )
        self._rows: dict[str, Row] = {}
        self._boxes: dict[str, list[Box] | BoxTable] = {}
        """Path of an image → its boxes: of COCO, in pixels, or in a table of Open Images."""
        self.labels = NO_LABELS
        for root in self._files.roots:
            self._rows |= self._read_rows(root, _below(root, listing.inputs))
        self._images, self._inputs = listing.images, listing.inputs
        self._beside = {PurePosixPath(name.lower()): name for name in listing.inputs}
        """Path of a text beside an image, in small letters → its real path."""
        self._rejected = listing.rejected
        named = {item.key for item in listing.rejected}
        self._missing = sorted(self._rows.keys() - set(self._images) - named)
        self._classes = self._find_classes()

    def _read_rows(self, root: str, inputs: Sequence[str]) -> dict[str, Row]:
        """Read the tables and annotations of a root: {path of an image: its rows}.

        inputs: paths below the root. Boxes and their labels go to `_boxes` and `labels`.
        """
        files, place = self._files, f"{self._files}/{root}".rstrip("/")
        images = _below(root, files.listing.images)

        def read(name: str, limit: int) -> bytes:
            return files.read(root + name, limit)

        def open_table(name: str) -> BinaryIO:
            return files.open(root + name)

        notes = read_annotations(read, place, filter(is_annotation, inputs), images)
        table = read_boxes(open_table, place, filter(is_box_table, inputs), images)
        for name in [*notes.others, *table.others]:
            self.left_alone.add(Fate.left_alone, "annotations of other images", root + name)
        for name, row in notes.rows.items():
            if row.boxes is not None:
                self._boxes[root + name] = row.boxes
        self._boxes |= {root + name: table for name in images if name in table}
        known = dict.fromkeys([*self.labels.boxes, *notes.labels, *table.labels])
        self.labels = Labels(boxes=list(known))
        rows = notes.rows | read_tables(open_table, place, self._config)
        return {root + name: row for name, row in rows.items()}

    @property
    def classes(self) -> Sequence[str]:
        """Names of the classes, by number; empty if they have numbers alone."""
        return self._classes.names

    def _find_classes(self) -> Classes:
        field = self._config.source.label_field
        labels = (row.fields.get(field) for row in self._rows.values()) if field else ()
        names = {label for label in labels if isinstance(label, str) and label}
        return Classes(() if all(name.isdecimal() for name in names) else names)

    def _label(self, name: str) -> object:
        """Return the class of an image, by name or number; None if it has none."""
        field = self._config.source.label_field
        return self._rows.get(name, Row()).fields.get(field) if field else None

    def fingerprint(self) -> str:
        """Hash the names, sizes and times of images and captions, and samples of their bytes."""
        digest = hashlib.sha256()
        names = [*self._images, *self._inputs]
        for name in names:
            digest.update(b"%s\0%s\n" % (os.fsencode(name), self._files.state(name)))
        for name in names[:: max(1, len(names) // COMPARED)]:
            with suppress(OSError, BadSampleError):
                digest.update(self._files.read(name, COMPARED_BYTES))
        return digest.hexdigest()

    @override
    def former_fingerprint(self) -> str:
        """Hash the names, sizes and times of all files; earlier versions read no zips."""
        if not isinstance(self._files, FolderFiles):
            return super().former_fingerprint()
        digest, folder = hashlib.sha256(), self._files.folder
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                facts = file.stat()
                name = os.fsencode(file.relative_to(folder))
                digest.update(b"%s\0%d\0%d\n" % (name, facts.st_size, facts.st_mtime_ns))
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._images) + len(self._missing) + len(self._rejected)

    @property
    def images(self) -> int:
        """Number of files with images."""
        return len(self._images)

    def sample(self, number: int) -> Iterator[Item]:
        """Yield about `number` of the images, spread evenly."""
        return (self._item(name) for name in spread(self._images, number))

    def _item(self, name: str) -> Item:
        try:
            return self._read(name)
        except BadSampleError as error:
            return Rejected(key=_shown(name), reason=str(error))
        except UnsafeFileError as error:
            return Rejected(key=_shown(name), reason=f"not read: {error.strerror}")
        except OSError as error:
            return Rejected(key=_shown(name), reason=f"file cannot be read ({error.strerror})")

    def __iter__(self) -> Iterator[Item]:
        yield from map(self._item, self._images)
        for name in self._missing:
            yield Rejected(key=printable(name), reason="captioned, but no such image")
        for item in self._rejected:
            yield replace(item, key=_shown(item.key))

    def _read(self, name: str) -> RawSample:
        if not is_unicode(name):
            raise BadSampleError("file name is not UTF-8 text")
        label = self._classes.number_of(self._label(name))
        read = partial(self._files.read, name, MAX_IMAGE_BYTES)
        extension = PurePosixPath(name).suffix.lower().removeprefix(".")
        row = self._describe(name)
        sample = make_sample(name, row, label, self._classes, read, self._config, extension)
        sample.annotations = self._annotate(sample)
        return sample

    def _annotate(self, sample: RawSample) -> dict[str, bytes]:
        """Return the label map and the boxes of an image, where they are asked for and there.

        Boxes come from the .boxes.json of its name, else from Open Images, else from COCO.
        """
        stem = PurePosixPath(sample.name.lower())
        found = {
            member: self._files.read(file, MAX_IMAGE_BYTES)
            for member in self._annotations.members
            if (file := self._beside.get(stem.with_suffix(f".{member}")))
        }
        boxes = self._boxes.get(sample.name)
        if boxes is not None and self._annotations.boxes and BOXES not in found:
            if isinstance(boxes, BoxTable):
                boxes = boxes.of(self._files.inner(sample.name))
            else:
                boxes = [box.scaled(1 / sample.width, 1 / sample.height) for box in boxes]
            found[BOXES] = encode_boxes(boxes)
        return found

    def _describe(self, name: str) -> Row:
        """Return the captions and the other fields of an image.

        Captions come from its row of a table, else from the .txt of its name, else from the .json.
        Raises: BadSampleError or OSError where a text beside it cannot be used.
        """
        row = self._rows.get(name, Row())
        row = replace(row, captions=[*row.captions], noted=Counter(row.noted))
        stem = PurePosixPath(name.lower())
        if not row.captions and (text := self._beside.get(stem.with_suffix(".txt"))):
            payload = self._files.read(text, MAX_TEXT_BYTES)
            row.captions = texts_of(decode_text(payload, self._config.encoding, row.noted))
        if document := self._beside.get(stem.with_suffix(".json")):
            found = decode_json(self._files.read(document, MAX_JSON_BYTES))
            if not is_json_object(found):
                raise BadSampleError("JSON is not an object")
            caption = lookup(found, self._config.source.caption_field)
            row.add(None if row.captions else caption, found)
        return row


def _below(root: str, names: Iterable[str]) -> list[str]:
    """Return the paths below a root, relative to it."""
    return [name[len(root) :] for name in names if name.startswith(root)]


def _shown(name: str) -> str:
    """Replace the bytes of a file name that are not UTF-8."""
    return os.fsencode(name).decode(errors="replace")


class ClassFolders(FolderSource):
    """Images in a folder for each class: CLASS/NAME.jpg, the layout of torchvision's ImageFolder.

    Folders inside of a class belong to it. The name of the class is the caption of an image that
    has no other. Raises: as FolderSource; ValueError where the folders are splits, not classes.
    """

    @override
    def _find_classes(self) -> Classes:
        paths = map(self._files.inner, self._images)
        names = sorted({path.split("/")[0] for path in paths if "/" in path})
        if names and {name.lower() for name in names} <= SPLITS:
            raise ValueError(
                f"data.source.path: {self._files} holds {', '.join(names)}, which are splits and "
                f"no classes: set data.source.path={self._files}/{names[0]}"
            )
        if not names:
            raise ValueError(
                f"data.source.kind=class_folders: {self._files} has no folder with images; name "
                "the folder that holds one folder for each class"
            )
        return Classes(names)

    @override
    def _label(self, name: str) -> object:
        folder, inside, _ = self._files.inner(name).partition("/")
        if not inside:
            raise BadSampleError("in no folder of a class")
        return folder
