"""Parquet and Arrow files that hold the images themselves, as a source.

Hugging Face `datasets` writes them: a folder of Parquet files from its hub, or the Arrow files of
`save_to_disk`. The column of images has `{bytes, path}`, or the bytes alone.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from itertools import islice
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from data.config import DataConfig
from data.shards.account import Fate, Tally
from data.shards.annotations import NO_LABELS
from data.shards.codecs import (
    MAX_IMAGE_BYTES,
    MAX_TEXT_BYTES,
    BadSampleError,
)
from data.shards.manifest import Rejected
from data.sources.caption_tables import Row, json_value
from data.sources.files import find_pattern
from data.sources.folder import SPLITS
from data.sources.listing import Listing, own_folders, walk
from data.sources.making import Classes, make_sample
from data.sources.samples import Item, RawSample, Source, spread
from data.storage.arrow import ArrowTable
from data.storage.documents import is_json_array, is_json_object, lookup, parse_json
from data.storage.parquet import ColumnKind, ParquetTable
from data.storage.untrusted import UnsafeFileError, open_regular
from data.text import printable

TABLES = {".parquet": ParquetTable, ".arrow": ArrowTable}
SAMPLED_TABLES = 16
FOOTER_BYTES = 2**16
"""Bytes at both ends of a table that are hashed: the last ones tell the sizes of all chunks."""


class ImageTables(Source):
    """The images in the Parquet and Arrow files below a folder, of a pattern, or in one such file.

    Raises: FileNotFoundError where there is none; ValueError where one cannot be read, or lacks a
    column that an option names, or a folder holds several splits.
    """

    licence = ""
    image_size = 0

    def __init__(self, config: DataConfig) -> None:
        self._config, self._source = config, config.source
        place = Path(config.source.path)
        chosen = find_pattern(place)
        if not config.source.path or not (chosen or place.exists()):
            raise FileNotFoundError(f"data.source.path: nothing at {config.source.path!r}")
        self._folder = place if place.is_dir() else _base(chosen or [place])
        self.left_alone = Tally()
        self.labels = NO_LABELS
        self._rejected: list[Rejected] = []
        if place.is_file() and place.suffix not in TABLES:
            raise ValueError(
                f"data.source.path: {place} is neither a folder nor a {' or '.join(TABLES)} file"
            )
        if place.is_dir():
            self._files = list(self._list())
            self._refuse_splits()
        else:
            names = [one.relative_to(self._folder).as_posix() for one in chosen or [place]]
            self._files = list(self._tables(names))
        if not self._files:
            raise FileNotFoundError(
                f"data.source.path: no {' or '.join(TABLES)} file below {self._folder}"
            )
        self._kinds: dict[str, Mapping[str, ColumnKind]] = {}
        self._numbers = [self._check(name) for name in self._files]

    def _list(self) -> Iterator[str]:
        listing = Listing(left_alone=self.left_alone, rejected=self._rejected)
        found = walk(self._folder, listing, own_folders(self._config, self._folder))
        return self._tables(sorted(found))

    def _tables(self, names: Iterable[str]) -> Iterator[str]:
        for name in names:
            path = PurePosixPath(name)
            if _is_table(path):
                yield name
            else:
                self.left_alone.add(Fate.left_alone, f"{path.suffix or 'file'}: no table", name)

    def _refuse_splits(self) -> None:
        """Refuse to mix pictures for training and for tests; a pattern may name both."""
        splits = {split: name for name in self._files if (split := _split_of(name))}
        if len(splits) > 1:
            split = next((one for one in splits if one.startswith("train")), min(splits))
            name = splits[split]
            place = f"{self._folder}/{name[: name.index(split) + len(split)]}"
            place += "" if Path(place).is_dir() else "*"
            raise ValueError(
                f"data.source.path: {self._folder} holds the splits {', '.join(sorted(splits))}; "
                f"name one of them, such as 'data.source.path={place}'"
            )

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
        """Names of the classes, by number; empty if they have numbers alone."""
        return self._classes.names

    @cached_property
    def _classes(self) -> Classes:
        """Those that `datasets` notes, else the texts of the column."""
        field = self._source.label_field
        names: set[str] = set()
        for name in self._files if field else ():
            with self._open(name) as table:
                if noted := _class_names(table.metadata, field):
                    return Classes(noted, ordered=True)
                rows = table.read([field], max_cell_bytes=MAX_TEXT_BYTES)
                names |= {label for row in rows if isinstance(label := row[field], str)}
        return Classes(names)

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
        source, described = self._source, Row()
        hidden = (source.image_field, source.caption_field, source.label_field)
        fields = {
            column: value
            for column, cell in row.items()
            if column not in hidden and (value := json_value(cell)) is not None
        }
        if is_json_object(cell := row.get(source.caption_field)):
            fields[source.caption_field] = json_value(cell)
        described.add(lookup(row, source.caption_field), fields, self._config.encoding)
        label = self._classes.number_of(row.get(source.label_field) if source.label_field else None)
        read = partial(self._image, row[source.image_field])
        return make_sample(name, described, label, self._classes, read, self._config)

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


def _is_table(path: PurePath) -> bool:
    return path.suffix in TABLES and not path.name.startswith((".", "_", "cache-"))


def _base(files: Sequence[Path]) -> Path:
    return Path(os.path.commonpath([file.parent for file in files]))


def _split_of(name: str) -> str:
    """Return the split of a table: a folder of its path, or the beginning of its name; else empty.

    `datasets` writes `train/data-00000-of-00001.arrow`, its hub `data/train-00000-of-1.parquet`.
    """
    *folders, file = PurePosixPath(name).parts
    words = [*folders, file.split("-")[0].split(".")[0]]
    return next((word for word in words if word in SPLITS), "")


def columns_of(place: Path) -> list[str]:
    """Return the names of the columns of a table, or of the first one below a folder.

    Raises: ValueError where it cannot be read.
    """
    inside = sorted(place.rglob("*")) if place.is_dir() else find_pattern(place) or [place]
    path = next(path for path in inside if path.suffix in TABLES)
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
