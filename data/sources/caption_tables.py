"""Read the tables of captions and other fields beside images."""

import csv
import io
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from data.shards.captions import JSON_FIELD, is_text_list
from data.storage.documents import MAX_JSON_BYTES, parse_json
from data.storage.parquet import Columns, read_parquet
from data.storage.untrusted import open_regular

MAX_ROWS = 2**26
"""Largest number of rows of captions.parquet."""

MAX_CELL_CHARACTERS = 2**20
"""Python's own limit, 2^17, would end the whole table at one long caption."""


@dataclass(frozen=True, slots=True)
class Row:
    """The caption and the other fields of one image."""

    caption: str
    fields: dict[str, str | int | float | bool | list[str]]
    """The other columns of text, numbers or booleans, and the list `captions`."""


def read_tables(folder: Path) -> dict[str, Row]:
    """Read the tables of a folder: {file name of an image: its row}.

    A row of `metadata.jsonl` replaces one of `captions.parquet`, and this replaces one of
    `captions.csv`. Each table needs the columns `file_name`, relative to the folder, and `text`.
    Bytes that are not UTF-8 become halves of surrogate pairs, as in file names.
    Raises: ValueError where a table cannot be read, lacks a column or is over a limit; OSError
    where it is no regular file of the folder.
    """
    rows: dict[str, Row] = {}
    tables = {
        "captions.csv": _read_csv,
        "captions.parquet": _read_parquet,
        "metadata.jsonl": _read_jsonl,
    }
    for name, read in tables.items():
        table = folder / name
        if table.exists():
            with os.fdopen(open_regular(table, below=folder), "rb") as file:
                rows |= {str(row["file_name"]): _row(row) for row in read(table, file)}
    return rows


def _row(columns: Mapping[str, Any]) -> Row:
    others = {name: value for name, value in columns.items() if name not in ("file_name", "text")}
    fields: dict[str, Any] = {
        name: value for name, value in others.items() if isinstance(value, str | int | float)
    }
    captions = columns.get(JSON_FIELD)
    if is_text_list(captions):
        fields[JSON_FIELD] = captions
    finite = {
        name: value
        for name, value in fields.items()
        if not isinstance(value, float) or math.isfinite(value)
    }
    text = columns["text"]
    return Row("" if text is None else str(text), finite)


def _read_csv(table: Path, file: BinaryIO) -> Iterator[Mapping[str, Any]]:
    csv.field_size_limit(MAX_CELL_CHARACTERS)
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    with text as lines:
        rows = csv.DictReader(lines)
        try:
            if not {"file_name", "text"} <= set(rows.fieldnames or ()):
                raise ValueError("the first line must name the columns file_name, text")
            yield from rows
        except (csv.Error, ValueError) as error:
            raise ValueError(f"{table}: {error}") from error


def _read_parquet(table: Path, file: BinaryIO) -> Iterator[Mapping[str, Any]]:
    try:
        yield from read_parquet(file, _plain_columns, max_rows=MAX_ROWS)
    except ValueError as error:
        raise ValueError(f"{table}: {error}") from error


def _plain_columns(columns: Columns) -> list[str]:
    if not {"file_name", "text"} <= columns.keys():
        raise ValueError("it must have the columns file_name, text")
    return [name for name, is_plain in columns.items() if is_plain]


def _parse(line: bytes) -> Any:
    try:
        line.decode()
    except UnicodeDecodeError:
        return parse_json(line.decode(errors="surrogateescape"))
    return parse_json(line)


def _read_jsonl(table: Path, file: BinaryIO) -> Iterator[Mapping[str, Any]]:
    lines = iter(partial(file.readline, MAX_JSON_BYTES + 1), b"")
    for number, line in enumerate(lines, start=1):
        try:
            row = _parse(line)
            yield row | {"file_name": row["file_name"], "text": row["text"]}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{table}, line {number}: expected {{"file_name": …, "text": …}}'
            ) from error
