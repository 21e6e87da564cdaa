"""Captions in a table beside the images, with whatever else its columns say of them."""

import csv
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from data.captions import JSON_FIELD


@dataclass(frozen=True, slots=True)
class Row:
    """What a table says of one image."""

    caption: str
    fields: dict[str, str | int | float | bool | list[str]]
    """The other columns, as far as they hold text or numbers, and a list of `captions`."""


def read_tables(folder: Path) -> dict[str, Row]:
    """Read the tables of a folder by file name.

    A row of `metadata.jsonl` goes before one of `captions.parquet`, and that before one of
    `captions.csv`. Each needs `file_name`, relative to the folder, and `text`.

    Raises:
        ValueError: a table cannot be read, or lacks a column.
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
            rows |= {str(row["file_name"]): _row(row) for row in read(table)}
    return rows


def _row(columns: Mapping[str, Any]) -> Row:
    others = {name: value for name, value in columns.items() if name not in ("file_name", "text")}
    fields: dict[str, Any] = {
        name: value for name, value in others.items() if isinstance(value, str | int | float)
    }
    captions = columns.get(JSON_FIELD)
    if isinstance(captions, list) and all(isinstance(caption, str) for caption in captions):
        fields[JSON_FIELD] = captions
    finite = {
        name: value
        for name, value in fields.items()
        if not isinstance(value, float) or math.isfinite(value)
    }
    text = columns["text"]
    return Row("" if text is None else str(text), finite)


def _read_csv(table: Path) -> Iterator[Mapping[str, Any]]:
    with table.open(encoding="utf-8-sig", newline="") as lines:
        rows = csv.DictReader(lines)
        try:
            if not {"file_name", "text"} <= set(rows.fieldnames or ()):
                raise ValueError("the first line must name the columns file_name, text")
            yield from rows
        except (csv.Error, ValueError) as error:
            raise ValueError(f"{table}: {error}") from error


def _read_parquet(table: Path) -> Iterator[Mapping[str, Any]]:
    try:
        with parquet.ParquetFile(table) as file:
            schema = file.schema_arrow
            if not {"file_name", "text"} <= set(schema.names):
                raise ValueError("it must have the columns file_name, text")
            columns = [column.name for column in schema if _is_plain(column.type)]
            for batch in file.iter_batches(columns=columns):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{table}: {str(error).splitlines()[0]}") from error


def _is_plain(column: pa.DataType) -> bool:
    checks = (pa.types.is_string, pa.types.is_large_string, pa.types.is_boolean)
    numbers = (pa.types.is_integer, pa.types.is_floating)
    return any(check(column) for check in checks + numbers)


def _read_jsonl(table: Path) -> Iterator[Mapping[str, Any]]:
    with table.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                yield row | {"file_name": row["file_name"], "text": row["text"]}
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ValueError(
                    f'{table}, line {number}: expected {{"file_name": …, "text": …}}'
                ) from error
