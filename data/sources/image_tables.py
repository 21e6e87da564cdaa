"""Parquet and Arrow files that hold the images themselves, as a source.

Hugging Face `datasets` writes them: a folder of Parquet files from its hub, or the Arrow files of
`save_to_disk`. The column of images has `{bytes, path}`, or the bytes alone.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from data.config import CaptionForm, DataConfig
from data.shards.account import Fate, Tally
from data.shards.captions import JSON_FIELD, texts_of
from data.shards.codecs import (
    MAX_IMAGE_BYTES,
    MAX_TEXT_BYTES,
    BadSampleError,
    check_unicode,
    decode_image,
)
from data.shards.formats import extension_of
from data.shards.index import crc32
from data.shards.manifest import Rejected
from data.shards.splits import draws
from data.sources.caption_tables import json_value
from data.sources.folder import SEVERAL_CAPTIONS
from data.sources.listing import Listing, own_folders, walk
from data.sources.samples import Item, RawSample, spread
from data.storage.arrow import ArrowTable
from data.storage.documents import is_json_array, is_json_object, lookup, parse_json
from data.storage.parquet import ColumnKind, ParquetTable
from data.storage.untrusted import UnsafeFileError, open_regular
from data.text import printable, words_of

TABLES = {".parquet": ParquetTable, ".arrow": ArrowTable}
SAMPLED_TABLES = 16
FOOTER_BYTES = 2**16
"""Bytes at both ends of a table that are hashed: the last ones tell the sizes of all chunks."""


class ImageTables:
    """The images in the Parquet and Arrow files below a folder, or in one such file.

    Raises: FileNotFoundError where there is none; ValueError where one cannot be read, or lacks a
    column that an option names.
    """

    licence = ""
    image_size = 0

    def __init__(self, config: DataConfig) -> None:
        self._config, self._source = config, config.source
        place = Path(config.source.path)
        if not config.source.path or not place.exists():
            raise FileNotFoundError(f"data.source.path: nothing at {config.source.path!r}")
        self._folder = place if place.is_dir() else place.parent
        self.left_alone = Tally()
        self._rejected: list[Rejected] = []
        self._files = list(self._list()) if place.is_dir() else [place.name]
        if not self._files:
            raise FileNotFoundError(
                f"data.source.path: no {' or '.join(TABLES)} file below {self._folder}"
            )
        self._kinds: dict[str, Mapping[str, ColumnKind]] = {}
        self._numbers = [self._check(name) for name in self._files]

    def _list(self) -> Iterator[str]:
        listing = Listing(left_alone=self.left_alone, rejected=self._rejected)
        for name in sorted(walk(self._folder, listing, own_folders(self._config, self._folder))):
            path = PurePosixPath(name)
            if path.suffix in TABLES and not path.name.startswith((".", "_", "cache-")):
                yield name
            else:
                self.left_alone.add(Fate.left_alone, f"{path.suffix or 'file'}: no table", name)

    def _check(self, name: str) -> int:
        """Return the number of rows of a table; refuse one without the columns."""
        with self._open(name) as table:
            self._kinds[name] = table.columns
            source = self._source
            needed = {"image_field": source.image_field, "label_field": source.label_field}
            if source.require_captions and not source.label_field:
                needed["caption_field"] = source.caption_field
            for option, column in needed.items():
                if column and column.split(".")[0] not in table.columns:
                    raise ValueError(
                        f"data.source.{option}: {self._folder / name} has no column {column}; its "
                        f"columns are {', '.join(table.columns)}"
                    )
            return table.rows

    def _open(self, name: str) -> ParquetTable | ArrowTable:
        path = self._folder / name
        file = os.fdopen(open_regular(path, below=self._folder), "rb")
        try:
            return TABLES[path.suffix](file)
        except ValueError as error:
            file.close()
            raise ValueError(f"data.source.path: {path}: {error}") from error

    @property
    def classes(self) -> Sequence[str]:
        """Names of the classes: those that `datasets` notes, else the texts of the column."""
        return self._classes

    @cached_property
    def _classes(self) -> list[str]:
        field = self._source.label_field
        if not field:
            return []
        names: set[str] = set()
        for name in self._files:
            with self._open(name) as table:
                if noted := _class_names(table.metadata, field):
                    return noted
                for row in table.read([field], max_cell_bytes=MAX_TEXT_BYTES):
                    if isinstance(label := row[field], str):
                        names.add(label)
        return sorted(names)

    @cached_property
    def _numbers_of_classes(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.classes)}

    def fingerprint(self) -> str:
        """Hash the names, sizes, times, and first and last bytes of the tables."""
        digest = hashlib.sha256()
        for name in self._files:
            with os.fdopen(open_regular(self._folder / name, below=self._folder), "rb") as file:
                facts = os.fstat(file.fileno())
                about = b"%s\0%d\0%d\n" % (os.fsencode(name), facts.st_size, facts.st_mtime_ns)
                digest.update(about + file.read(FOOTER_BYTES))
                file.seek(max(0, facts.st_size - FOOTER_BYTES))
                digest.update(file.read())
        return digest.hexdigest()

    def former_fingerprint(self) -> str:
        """Return the same hash: earlier versions read no such tables."""
        return self.fingerprint()

    def __len__(self) -> int:
        return sum(self._numbers) + len(self._rejected)

    @property
    def images(self) -> int:
        """Number of rows."""
        return sum(self._numbers)

    def sample(self, number: int) -> Iterator[Item]:
        """Yield about `number` of the rows: the first ones of tables spread over the source."""
        tables = spread(self._files, SAMPLED_TABLES)
        for name in tables:
            yield from islice(self._read([name]), -(-number // len(tables)))

    def __iter__(self) -> Iterator[Item]:
        yield from self._read(self._files)
        yield from self._rejected

    def _read(self, files: Sequence[str]) -> Iterator[Item]:
        for name in files:
            kinds = self._kinds[name]
            image, caption = self._source.image_field, self._source.caption_field
            chosen = [
                column
                for column, kind in kinds.items()
                if kind is not ColumnKind.binary or column in (image, caption.split(".")[0])
            ]
            parts = PurePosixPath(name).parts[:-1]
            partition = dict(part.split("=", 1) for part in parts if "=" in part)
            with self._open(name) as table:
                try:
                    rows = table.read(chosen, images=image, max_cell_bytes=MAX_IMAGE_BYTES)
                    for number, row in enumerate(rows):
                        yield self._item(f"{name}:{number}", {**partition, **row})
                except ValueError as error:
                    raise ValueError(f"data.source.path: {self._folder / name}: {error}") from error

    def _item(self, name: str, row: dict[str, Any]) -> Item:
        try:
            return self._sample(name, row)
        except BadSampleError as error:
            return Rejected(key=printable(name), reason=str(error))
        except OSError as error:
            return Rejected(key=printable(name), reason=f"file cannot be read ({error.strerror})")

    def _sample(self, name: str, row: dict[str, Any]) -> RawSample:
        source, noted = self._source, Counter[str]()
        captions = texts_of(lookup(row, source.caption_field), self._config.encoding)
        label = self._label(row)
        if not captions and label is not None and self.classes:
            captions = [words_of(self.classes[label])]
        hidden = (source.image_field, source.caption_field, source.label_field)
        fields = {
            column: value
            for column, cell in row.items()
            if column not in hidden and (value := json_value(cell)) is not None
        }
        if is_json_object(cell := row.get(source.caption_field)):
            fields[source.caption_field] = json_value(cell)
        if len(captions) > 1 or (captions and self._config.captions is CaptionForm.json):
            fields = {JSON_FIELD: captions, **fields}
        if len(captions) > 1 and self._config.captions is not CaptionForm.json:
            noted[SEVERAL_CAPTIONS] += 1
        check_unicode([captions, fields])
        if not captions and label is None and source.require_captions:
            raise BadSampleError("no caption")
        if captions and (size := len(captions[0].encode())) > MAX_TEXT_BYTES:
            raise BadSampleError(f"text of {size} bytes is over {MAX_TEXT_BYTES}")
        payload = self._image(row[source.image_field])
        image = decode_image(payload, self._config.pixels, noted)
        return RawSample(
            name=name,
            draw=draws([len(payload)], [crc32(payload)]).item(),
            extension=extension_of(payload),
            image=payload,
            caption=captions[0] if captions else "",
            width=image.width,
            height=image.height,
            label=label,
            metadata=fields,
            noted=noted,
        )

    def _image(self, cell: object) -> bytes:
        """Return the encoded image of a cell; a path names a file below the folder."""
        path = None
        if is_json_object(cell):
            cell, path = cell.get("bytes"), cell.get("path")
        if cell is None and isinstance(path, str):
            try:
                handle = open_regular(self._folder / path, below=self._folder)
            except (FileNotFoundError, UnsafeFileError) as error:
                raise BadSampleError("image is a path that leads to no file here") from error
            with os.fdopen(handle, "rb") as file:
                return file.read(MAX_IMAGE_BYTES + 1)
        if not isinstance(cell, bytes):
            raise BadSampleError("no image" if cell is None else "image is not bytes")
        return cell

    def _label(self, row: Mapping[str, Any]) -> int | None:
        field = self._source.label_field
        value = row.get(field) if field else None
        if value is None:
            return None
        if isinstance(value, str):
            return self._numbers_of_classes[value]
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise BadSampleError(f"class is {printable(str(value))}, neither a name nor a number")
        if self.classes and value >= len(self.classes):
            raise BadSampleError(f"class {value} is over the last one, {len(self.classes) - 1}")
        return value


def columns_of(place: Path) -> list[str]:
    """Return the names of the columns of a table, or of the first one below a folder.

    Raises: ValueError where it cannot be read.
    """
    tables = (path for path in sorted(place.rglob("*")) if path.suffix in TABLES)
    path = next(tables) if place.is_dir() else place
    with TABLES[path.suffix](os.fdopen(open_regular(path), "rb")) as table:
        return list(table.columns)


def _class_names(metadata: Mapping[bytes, bytes], field: str) -> list[str]:
    """Return the names that `datasets` notes for a column of class numbers."""
    try:
        about = parse_json(metadata.get(b"huggingface", b"{}"))
    except ValueError:
        return []
    names = lookup(about, f"info.features.{field}.names") if is_json_object(about) else None
    return [str(name) for name in names] if is_json_array(names) else []
