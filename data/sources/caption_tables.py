"""Read the tables of captions and other fields beside images."""

import codecs
import csv
import io
import math
import os
import posixpath
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date, time
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from data.config import DataConfig
from data.shards.annotations import Box
from data.shards.captions import mended, texts_of
from data.shards.codecs import BYTE_ORDER_MARKS, BadSampleError
from data.storage.documents import (
    MAX_JSON_BYTES,
    is_json_array,
    is_json_object,
    lookup,
    parse_json,
)
from data.storage.parquet import ColumnKind, Columns, read_parquet

TABLES = tuple(
    f"{stem}.{kind}"
    for stem in ("captions", "metadata")
    for kind in ("csv", "tsv", "parquet", "jsonl")
)
"""Names of tables, directly in the folder of the images. Rows of a later one replace those of an
earlier one."""
MAX_ROWS = 2**26
"""Largest number of rows of a parquet table."""
MAX_CELL_CHARACTERS = 2**20
"""Python's own limit, 2^17, would end the whole table at one long caption."""
DELIMITERS = ",;\t"


@dataclass(slots=True)
class Row:
    """The captions and the other fields of one image, perhaps from several rows of a table."""

    captions: list[str] = field(default_factory=list[str])
    fields: dict[str, Any] = field(default_factory=dict[str, Any])
    """The other columns, as JSON values; of several rows the first counts."""
    boxes: list[Box] | None = None
    """Boxes of COCO, in pixels; None: none are known."""
    noted: Counter[str] = field(default_factory=Counter[str])
    """Remarks on the captions; see `texts_of`."""
    problem: str = ""
    """Why the caption cannot be used."""

    def add(self, caption: object, fields: Mapping[str, Any], encoding: str = "utf-8") -> None:
        """Add a row of a table; encoding: of captions in bytes."""
        try:
            self.captions += texts_of(caption, encoding, self.noted)
        except BadSampleError as error:
            self.problem = self.problem or str(error)
        self.fields = {**fields, **self.fields}


def read_tables(
    open_table: Callable[[str], BinaryIO], place: str, config: DataConfig
) -> dict[str, Row]:
    """Read the tables of a folder: {path of an image, relative to the folder: its rows}.

    Each table needs the columns data.source.file_field and data.source.caption_field.
    open_table: opens one by its name; raises FileNotFoundError where there is none. place: path of
    the folder, for errors.
    Raises: ValueError where a table cannot be read, lacks a column or is over a limit; OSError
    where it is no regular file of the folder.
    """
    rows: dict[str, Row] = {}
    for name in TABLES:
        try:
            file = open_table(name)
        except FileNotFoundError:
            continue
        with file:
            rows |= _read_table(Path(place, name), file, config)
    return rows


def _read_table(table: Path, file: BinaryIO, config: DataConfig) -> dict[str, Row]:
    reader = READERS[table.suffix]
    names = config.source.file_field, config.source.caption_field
    rows: dict[str, Row] = {}
    for columns in reader(table, file, config):
        image, caption = (lookup(columns, name) for name in names)
        fields = {
            name: value
            for name, cell in columns.items()
            if name not in names and (value := json_value(cell)) is not None
        }
        if is_json_object(caption):
            fields[names[1]] = json_value(caption)  # for data.caption_fields
        rows.setdefault(_path(image), Row()).add(caption, fields, config.encoding)
    return rows


def _path(image: object) -> str:
    """Return the path of an image as the listing of the folder has it."""
    name = os.fsdecode(image) if isinstance(image, bytes) else "" if image is None else str(image)
    return posixpath.normpath(name) if name else ""


def json_value(value: object) -> Any:
    """Return a cell as a JSON value; None for null, NaN and bytes that are no text.

    Decimals become numbers, dates and times ISO 8601, the pairs of a map an object.
    """
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        return mended(value)
    if isinstance(value, float | Decimal):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return None
    if isinstance(value, date | time):  # a datetime is a date
        return value.isoformat()
    if is_json_object(value):
        return {str(name): json_value(inner) for name, inner in value.items()}
    if is_json_array(value):
        if value and all(isinstance(entry, tuple) for entry in value):
            return {str(name): json_value(inner) for name, inner in value}
        return [json_value(entry) for entry in value]
    return str(value)


def _check_columns(found: Mapping[str, object] | list[str], config: DataConfig) -> None:
    """Raise ValueError where a table lacks a column that it needs."""
    source = config.source
    options = {"file_field": source.file_field, "caption_field": source.caption_field}
    missing = [
        f"data.source.{option}={name}"
        for option, name in options.items()
        if not {name, name.split(".")[0]} & {*found}
    ]
    if missing:
        columns = ", ".join(found) or "none"
        raise ValueError(
            f"it has no column {' and none '.join(missing)}; its columns are {columns}"
        )


def _read_csv(table: Path, file: BinaryIO, config: DataConfig) -> Iterator[Mapping[str, Any]]:
    csv.field_size_limit(MAX_CELL_CHARACTERS)
    head = file.read(4)
    file.seek(0)
    marked = [name for mark, name in BYTE_ORDER_MARKS.items() if head.startswith(mark)]
    encoding = marked[0] if marked else config.encoding
    with io.TextIOWrapper(file, encoding, errors="surrogateescape", newline="") as lines:
        try:
            first = lines.readline(MAX_CELL_CHARACTERS)
            lines.seek(0)
            delimiters = "\t" if table.suffix == ".tsv" else DELIMITERS
            rows = csv.DictReader(lines, delimiter=max(delimiters, key=first.count))
            _check_columns(list(rows.fieldnames or ()), config)
            for row in rows:
                yield {name: value for name, value in row.items() if isinstance(name, str)}
        except (csv.Error, ValueError) as error:
            raise ValueError(f"{table}: {error}") from error


def _read_parquet(table: Path, file: BinaryIO, config: DataConfig) -> Iterator[Mapping[str, Any]]:
    def choose(columns: Columns) -> list[str]:
        _check_columns(columns, config)
        needed = {config.source.file_field, config.source.caption_field}
        return [n for n, kind in columns.items() if n in needed or kind is not ColumnKind.binary]

    try:
        yield from read_parquet(file, choose, max_rows=MAX_ROWS)
    except ValueError as error:
        raise ValueError(f"{table}: {error}") from error


def _read_jsonl(table: Path, file: BinaryIO, config: DataConfig) -> Iterator[Mapping[str, Any]]:
    lines = iter(partial(file.readline, MAX_JSON_BYTES + 1), b"")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line.removeprefix(codecs.BOM_UTF8).decode(errors="surrogateescape"))
            if not is_json_object(row):
                raise ValueError("it is no object")
            # a line may lack its caption, such as that of an unconditional picture
            _check_columns({**row, config.source.caption_field: ""}, config)
            yield {config.source.caption_field: None, **row}
        except ValueError as error:
            raise ValueError(f"{table}, line {number}: {error}") from error


READERS = {".csv": _read_csv, ".tsv": _read_csv, ".parquet": _read_parquet, ".jsonl": _read_jsonl}
