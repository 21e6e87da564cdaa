"""Read the metadata of samples: their fields, and img2dataset's counts of downloads.

img2dataset writes `00000.parquet` and `00000_stats.json` beside `00000.tar`. The parquet has a row
for each sample, joined to it by `key`. The JSON counts the images fetched and failed.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from data.config import FilterConfig
from data.shards.captions import PLAIN_CAPTIONS, CaptionRule, Member, choose_caption
from data.shards.codecs import (
    IMAGE_EXTENSIONS,
    BadSampleError,
    Buffer,
    decode_json,
    image_size,
)
from data.shards.filters import as_number
from data.storage.documents import MAX_JSON_BYTES, is_json_object, lookup
from data.storage.files import open_file, read_bytes
from data.storage.parquet import read_parquet
from data.text import printable

MAX_ROWS, MAX_ROWS_BYTES = 2**20, 2**29
"""Largest parquet beside a tar: its rows, and the bytes of the columns that are read."""
DOWNLOAD_COUNTS = ("count", "successes", "failed_to_download", "failed_to_resize")


def aspect(width: float, height: float) -> float:
    """Divide the long side by the short side; NaN for a side that is not positive."""
    return max(width, height) / min(width, height) if min(width, height) > 0 else math.nan


class SampleFields:
    """The fields of one sample, each read at its first use.

    A field comes from the row of the parquet, else from the sample's JSON. Otherwise width, height,
    short_side, aspect and caption_length are computed from the image and the first caption.
    row: of the parquet. member: extension → the sample's member, or None. captions: place of the
    captions.
    """

    def __init__(
        self, row: Mapping[str, Any], member: Member, captions: CaptionRule = PLAIN_CAPTIONS
    ) -> None:
        self._row, self._member, self._captions = row, member, captions

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
        return len(choose_caption(self._member, self._captions))

    _DERIVED: ClassVar[dict[str, Callable[["SampleFields"], object]]] = {
        "width": lambda fields: fields._size[0],
        "height": lambda fields: fields._size[1],
        "short_side": lambda fields: min(fields._size),
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


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of the parquet beside a tar, by the keys of the samples."""

    location: str = ""
    """Path or URL of the parquet."""
    rows: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    numbered: bool = False
    """Whether the keys of the table are numbers: they join keys of samples with leading zeros."""

    @classmethod
    def beside(cls, tar: str, rules: Sequence[FilterConfig]) -> Self:
        """Read the columns that rules need; without rules or without a parquet there are no rows.

        Raises: ValueError where the parquet cannot be read, has no column `key` of text or whole
        numbers, or is over a limit.
        """
        location = parquet_beside(tar)
        try:
            file = open_file(location).stream() if rules else None
        except FileNotFoundError:
            file = None
        if file is None:
            return cls()
        wanted = {name for rule in rules for name in (rule.name, rule.name.split(".")[0])} | {"key"}
        try:
            with file:
                rows = {
                    _key(row): row
                    for row in read_parquet(
                        file,
                        lambda columns: [name for name in columns if name in wanted],
                        max_rows=MAX_ROWS,
                        max_bytes=MAX_ROWS_BYTES,
                    )
                }
        except KeyError:
            raise ValueError(f"{location}: no column 'key' that names its samples") from None
        except ValueError as error:
            raise ValueError(f"{location}: cannot be read as parquet ({error})") from error
        numbered = any(isinstance(row["key"], int) for row in rows.values())
        return cls(location, rows, numbered)

    def of(self, key: str) -> Mapping[str, Any]:
        """Return the row of a sample; empty if it has none."""
        return self.rows.get(self._joined(key), {})

    def check(self, keys: NDArray[np.bytes_]) -> None:
        """Raise ValueError where no row belongs to one of the samples, or one to two samples."""
        joined = [self._joined(key.decode()) for key in keys.tolist()]
        if self.rows and joined and self.rows.keys().isdisjoint(joined):
            shown = printable(next(iter(self.rows)))
            raise ValueError(
                f"{self.location}: no 'key' in it, such as {shown}, names a sample of the tar, "
                f"such as {printable(keys[0].decode())}"
            )
        if self.numbered and len(set(joined)) < len(joined):
            raise ValueError(
                f"{self.location}: column 'key' holds numbers, and two samples of the tar have the "
                "same number with other zeros: write the keys as text"
            )

    def _joined(self, key: str) -> str:
        return str(int(key)) if self.numbered and key.isdecimal() else key


def _key(row: Mapping[str, Any]) -> str:
    """Return the key of a row. Raises: KeyError or ValueError where it has none."""
    key = row["key"]
    if isinstance(key, bytes):
        return key.decode(errors="surrogateescape")
    if isinstance(key, bool | float) or not isinstance(key, str | int):
        raise ValueError(f"column 'key' holds {type(key).__name__}, neither text nor whole numbers")
    return str(key)


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
