"""What is known of a sample beside its image and caption: its fields, wherever they are kept.

img2dataset writes `00000.parquet` and `00000_stats.json` beside `00000.tar`: a row for each
sample, joined to it by `key`, and the counts of what was fetched and what failed.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import pyarrow as pa
from pyarrow import parquet

from data.codecs import (
    CAPTION_EXTENSIONS,
    IMAGE_EXTENSIONS,
    BadSampleError,
    Buffer,
    decode_json,
    decode_text,
    image_size,
)
from data.filters import as_number
from data.storage import map_bytes, read_bytes

DOWNLOAD_COUNTS = ("count", "successes", "failed_to_download", "failed_to_resize")


def lookup(fields: Mapping[str, Any], name: str) -> object:
    """Find a field by name, or by a dotted path into nested ones; None where there is none."""
    if name in fields:
        return fields[name]
    outer, dot, inner = name.partition(".")
    nested = fields.get(outer)
    return lookup(nested, inner) if dot and isinstance(nested, dict) else None


def aspect(width: float, height: float) -> float:
    """Long side by short side; NaN for a side that is not positive."""
    return max(width, height) / min(width, height) if min(width, height) > 0 else math.nan


class SampleFields:
    """The fields of one sample, read when they are asked for.

    A row of the parquet comes first, then the sample's JSON, then what follows from image and
    caption: width, height, aspect, caption_length.

    Args:
        row: Of the parquet.
        member: Extension → the sample's member, or None.
    """

    def __init__(self, row: Mapping[str, Any], member: Callable[[str], Buffer | None]) -> None:
        self._row, self._member = row, member

    def __call__(self, name: str) -> object:
        """Return a field's value; None where the sample has none.

        Raises:
            BadSampleError: what would tell it cannot be read.
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
        fields = {} if payload is None else decode_json(payload)
        if not isinstance(fields, dict):
            raise BadSampleError("JSON is not an object")
        return fields

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


def read_rows(tar: str, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Read the rows of the parquet beside a tar, by key, with the columns that the fields need.

    Raises:
        ValueError: there is a parquet, but it cannot be read or joined.
    """
    location = f"{tar.removesuffix('.tar')}.parquet"
    try:
        payload = map_bytes(location)
    except FileNotFoundError:
        return {}
    try:
        table = parquet.ParquetFile(pa.BufferReader(pa.py_buffer(payload)))
        wanted = {name.split(".")[0] for name in names} | {*names, "key"}
        columns = [name for name in table.schema_arrow.names if name in wanted]
        rows = table.read(columns).to_pylist()
        return {str(row["key"]): row for row in rows}
    except KeyError:
        raise ValueError(f"{location}: no column 'key' that names its samples") from None
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{location}: cannot be read as parquet ({reason})") from error


def read_download_counts(tar: str) -> dict[str, int]:
    """Read the counts in the `_stats.json` beside a tar; none without that file.

    Raises:
        BadSampleError: it is there, but cannot be read.
    """
    try:
        payload = read_bytes(f"{tar.removesuffix('.tar')}_stats.json")
    except FileNotFoundError:
        return {}
    counts = decode_json(payload)
    if not isinstance(counts, dict):
        raise BadSampleError("JSON is not an object")
    return {name: counts[name] for name in DOWNLOAD_COUNTS if type(counts.get(name)) is int}
