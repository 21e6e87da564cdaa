"""Read the metadata of samples: their fields, and img2dataset's counts of downloads.

img2dataset writes `00000.parquet` and `00000_stats.json` beside `00000.tar`. The parquet has a row
for each sample, joined to it by `key`. The JSON counts the images fetched and failed.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

from data.shards.codecs import (
    CAPTION_EXTENSIONS,
    IMAGE_EXTENSIONS,
    BadSampleError,
    Buffer,
    decode_json,
    decode_text,
    image_size,
)
from data.shards.filters import as_number
from data.storage.documents import MAX_JSON_BYTES, is_json_object
from data.storage.files import open_file, read_bytes
from data.storage.parquet import Columns, read_parquet

MAX_ROWS, MAX_ROWS_BYTES = 2**20, 2**29
"""Largest parquet beside a tar: its rows, and the bytes of the columns that are read."""
DOWNLOAD_COUNTS = ("count", "successes", "failed_to_download", "failed_to_resize")


def lookup(fields: Mapping[str, Any], name: str) -> object:
    """Find a field by its name, or by a dotted path into nested objects; None if it is missing."""
    if name in fields:
        return fields[name]
    outer, dot, inner = name.partition(".")
    nested = fields.get(outer)
    return lookup(nested, inner) if dot and is_json_object(nested) else None


def aspect(width: float, height: float) -> float:
    """Divide the long side by the short side; NaN for a side that is not positive."""
    return max(width, height) / min(width, height) if min(width, height) > 0 else math.nan


class SampleFields:
    """The fields of one sample, each read at its first use.

    A field comes from the row of the parquet, else from the sample's JSON. Otherwise width, height,
    aspect and caption_length are computed from the image and the caption.
    row: of the parquet. member: extension → the sample's member, or None.
    """

    def __init__(self, row: Mapping[str, Any], member: Callable[[str], Buffer | None]) -> None:
        self._row, self._member = row, member

    def __call__(self, name: str) -> object:
        """Return the value of a field; None if it is missing.

        Raises: BadSampleError where the JSON, the image or the caption cannot be read.
        """
        value = lookup(self._row, name)
        if value is None:
            value = lookup(self._json, name)
        if value is None and name in self._DERIVED:
            value = self._DERIVED[name](self)
        return value

    @cached_property
    def _json(self) -> dict[str, Any]:
        payload = self._member("json")
        return {} if payload is None else _decode_object(payload)

    @cached_property
    def _size(self) -> tuple[int, int]:
        return image_size(self._first(IMAGE_EXTENSIONS))

    def _aspect(self) -> float | None:
        width, height = as_number(self("width")), as_number(self("height"))
        return aspect(width, height) if width is not None and height is not None else None

    def _caption_length(self) -> int:
        return len(decode_text(self._first(CAPTION_EXTENSIONS)))

    _DERIVED: ClassVar[dict[str, Callable[["SampleFields"], object]]] = {
        "width": lambda fields: fields._size[0],
        "height": lambda fields: fields._size[1],
        "aspect": _aspect,
        "caption_length": _caption_length,
    }

    def _first(self, extensions: Sequence[str]) -> Buffer:
        for extension in extensions:
            payload = self._member(extension)
            if payload is not None:
                return payload
        raise BadSampleError(f"no {' or '.join(extensions)}")


def parquet_beside(tar: str) -> str:
    """Return the path or URL of the parquet beside a tar, such as `00000.parquet`."""
    return f"{tar[: -len('.tar')]}.parquet"


def read_rows(tar: str, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Read the rows of the parquet beside a tar: {key of a sample: {column: value}}.

    names: of fields; only their columns are read. The result is empty without a parquet.
    Raises: ValueError where the parquet cannot be read, has no column `key`, or is over a limit.
    """
    location = parquet_beside(tar)
    try:
        file = open_file(location).stream()
    except FileNotFoundError:
        return {}
    wanted = {name.split(".")[0] for name in names} | {*names, "key"}

    def choose(columns: Columns) -> list[str]:
        return [name for name in columns if name in wanted]

    try:
        with file:
            rows = read_parquet(file, choose, max_rows=MAX_ROWS, max_bytes=MAX_ROWS_BYTES)
            return {str(row["key"]): row for row in rows}
    except KeyError:
        raise ValueError(f"{location}: no column 'key' that names its samples") from None
    except ValueError as error:
        raise ValueError(f"{location}: cannot be read as parquet ({error})") from error


def read_download_counts(tar: str) -> dict[str, int]:
    """Read the counts in the `_stats.json` beside a tar; the result is empty without that file.

    Raises: BadSampleError where the file is not a JSON object.
    """
    try:
        payload = read_bytes(f"{tar[: -len('.tar')]}_stats.json", limit=MAX_JSON_BYTES)
    except FileNotFoundError:
        return {}
    counts = _decode_object(payload)
    return {name: counts[name] for name in DOWNLOAD_COUNTS if type(counts.get(name)) is int}


def _decode_object(payload: Buffer) -> dict[str, Any]:
    fields = decode_json(payload)
    if not is_json_object(fields):
        raise BadSampleError("JSON is not an object")
    return fields
