"""Read the rows of parquet files, in memory that grows with the file and not with its claims.

Encodings repeat values: a file of 3 kB can hold a gigabyte of one text. Texts are therefore read as
dictionaries, a few rows at a time, and equal texts share their memory.
"""

import faulthandler
import os
import resource
import signal
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from enum import StrEnum, auto
from typing import Any, BinaryIO, Self

import pyarrow
from pyarrow import compute, parquet

_arrow: Any = pyarrow
"""The module without its types, which pyarrow does not declare."""
_compute: Any = compute


class ColumnKind(StrEnum):
    """What a column holds: text or one number or boolean a row; bytes; anything else."""

    plain = auto()
    binary = auto()
    other = auto()


Columns = Mapping[str, ColumnKind]
"""Name of a column → what it holds."""

MAX_CELL_BYTES = 2**20
MAX_FIXED_BYTES = 64
"""Largest width of a column of fixed-size values, such as decimals."""
MAX_VALUES = 2**26
"""Largest number of values in a column; a column of lists holds several in a row."""
BATCH_ROWS, IMAGE_ROWS = 256, 16
"""Rows that are read at once, without and with a column of images."""
LONGEST_LOOK_S = 60
"""Longest time for a look at the chunks of a file."""


def read_parquet(
    source: BinaryIO | bytes,
    choose: Callable[[Columns], list[str]],
    *,
    max_rows: int,
    max_bytes: int = 2**32,
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a parquet file: {name of a column: value}.

    source: the open file, or its bytes. choose: returns the names of the columns to read; its
    errors are raised here. max_bytes: of the chosen columns, without compression. Bytes of text
    that are not UTF-8 become halves of surrogate pairs.
    Raises: ValueError with one line where the file is not sound parquet, or over a limit.
    """
    table = ParquetTable(source)
    columns = choose(table.columns)
    yield from table.read(columns, max_rows=max_rows, max_bytes=max_bytes)


class ParquetTable:
    """An open parquet file.

    source: the open file, or its bytes.
    Raises: ValueError with one line where the file is not sound parquet.
    """

    def __init__(self, source: BinaryIO | bytes) -> None:
        self._source = source
        with one_line(), _open(source) as file:
            self.columns: Columns = {one.name: kind_of(one.type) for one in file.schema_arrow}
            self.metadata: dict[bytes, bytes] = file.schema_arrow.metadata or {}
            self.rows: int = file.metadata.num_rows

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not isinstance(self._source, bytes):
            self._source.close()

    def read(
        self,
        columns: list[str],
        *,
        images: str = "",
        max_cell_bytes: int = MAX_CELL_BYTES,
        max_rows: int = MAX_VALUES,
        max_bytes: int = 2**44,
    ) -> Iterator[dict[str, Any]]:
        """Yield the rows: {name of a column: value}.

        images: a column of images, whose cells are large and differ. max_cell_bytes: largest text
        or image. max_bytes: of the chosen columns, without compression.
        Raises: ValueError with one line where the file is damaged, or over a limit.
        """
        with one_line():
            with _open(self._source) as file:
                leaves = _leaves(file.schema, columns)
                _check_size(file.metadata, leaves, max_rows, max_bytes)
                texts = [
                    path
                    for path, leaf in leaves.items()
                    if leaf.physical_type == "BYTE_ARRAY" and path.split(".")[0] != images
                ]
            rows = IMAGE_ROWS if images else BATCH_ROWS
            with _open(self._source, texts) as file:
                for group in range(file.num_row_groups):  # each has dictionaries of its own
                    batches = file.iter_batches(rows, [group], columns)
                    yield from rows_of(batches, max_cell_bytes)


@contextmanager
def one_line() -> Generator[None, None, None]:
    """Turn the errors of pyarrow into ValueError with one line."""
    try:
        yield
    except MemoryError as error:  # a damaged length; it says nothing
        raise ValueError("a part is larger than the memory") from error
    except (_arrow.ArrowException, OSError, OverflowError) as error:
        raise ValueError(str(error).splitlines()[0]) from error


def rows_of(batches: Iterable[Any], max_cell_bytes: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of record batches of pyarrow; equal texts share their memory.

    Raises: ValueError where a cell is over the limit.
    """
    seen: dict[str, str] = {}
    for batch in batches:
        for column in batch.columns:
            _check_cells(column, max_cell_bytes)
        for row in _rows(batch):
            yield {
                name: seen.setdefault(value, value) if isinstance(value, str) else value
                for name, value in row.items()
            }


def read_file_metadata(payload: bytes) -> dict[bytes, bytes]:
    """Return the key-value metadata of a parquet file.

    Raises: ValueError with one line where the file is not sound parquet.
    """
    try:
        with _open(payload) as file:
            return file.schema_arrow.metadata or {}
    except (_arrow.ArrowException, OSError) as error:
        raise ValueError(str(error).splitlines()[0]) from error


def _rows(batch: Any) -> list[dict[str, Any]]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:  # pyarrow does not check text
        columns = [_texts(one) if _has_text(one) else one.to_pylist() for one in batch.columns]
        names: list[str] = batch.schema.names
        return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def _has_text(column: Any) -> bool:
    kind = column.type
    return _is_text(kind.value_type if _arrow.types.is_dictionary(kind) else kind)


def _texts(column: Any) -> list[str | None]:
    plain = column.dictionary_decode() if _arrow.types.is_dictionary(column.type) else column
    raw: list[bytes | None] = plain.cast(_arrow.large_binary()).to_pylist()
    return [None if one is None else one.decode(errors="surrogateescape") for one in raw]


def _open(source: BinaryIO | bytes, texts: list[str] | None = None) -> Any:
    file: Any = _arrow.BufferReader(source) if isinstance(source, bytes) else source
    return parquet.ParquetFile(file, read_dictionary=texts)


def kind_of(column: Any) -> ColumnKind:
    """Return what a column of a type of pyarrow holds."""
    types = _arrow.types
    if types.is_dictionary(column):
        return kind_of(column.value_type)
    plain = (_is_text, types.is_integer, types.is_floating, types.is_boolean, types.is_decimal)
    if any(check(column) for check in plain):
        return ColumnKind.plain
    raw = (types.is_binary, types.is_large_binary, types.is_fixed_size_binary, types.is_binary_view)
    return ColumnKind.binary if any(check(column) for check in raw) else ColumnKind.other


def _is_text(column: Any) -> bool:
    types = _arrow.types
    return any(
        check(column) for check in (types.is_string, types.is_large_string, types.is_string_view)
    )


def _leaves(schema: Any, columns: list[str]) -> dict[str, Any]:
    """Return the stored columns of some columns, by path: a nested column has several."""
    every = [schema.column(number) for number in range(len(schema))]
    return {
        leaf.path: leaf
        for leaf in every
        if any(leaf.path == name or leaf.path.startswith(f"{name}.") for name in columns)
    }


def _check_size(about: Any, leaves: dict[str, Any], max_rows: int, max_bytes: int) -> None:
    if about.num_rows > max_rows:
        raise ValueError(f"{about.num_rows} rows are over the limit of {max_rows}")
    if wide := [path for path, leaf in leaves.items() if leaf.length > MAX_FIXED_BYTES]:
        raise ValueError(f"column {wide[0]} has values of more than {MAX_FIXED_BYTES} bytes")
    _check_chunks(about)
    chunks = [chunk for chunk in _chunks(about) if chunk.path_in_schema in leaves]
    if (size := sum(chunk.total_uncompressed_size for chunk in chunks)) > max_bytes:
        raise ValueError(f"{size} bytes without compression are over the limit of {max_bytes}")
    for path in leaves:
        values = sum(chunk.num_values for chunk in chunks if chunk.path_in_schema == path)
        if values > MAX_VALUES:
            raise ValueError(f"column {path} holds {values} values, over {MAX_VALUES}")


def _chunks(about: Any) -> list[Any]:
    groups = [about.row_group(number) for number in range(about.num_row_groups)]
    return [group.column(number) for group in groups for number in range(group.num_columns)]


def _check_chunks(about: Any) -> None:
    """Raise ValueError where pyarrow cannot look at the chunks of a file.

    For statistics that do not fit their column it ends the process: let it end a copy of this one.
    """
    copy = os.fork()
    if copy == 0:
        with suppress(BaseException):
            faulthandler.disable()
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(LONGEST_LOOK_S)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            _chunks(about)
        os._exit(0)  # errors come again in this process
    if os.waitpid(copy, 0)[1]:
        raise ValueError("its statistics do not fit its columns")


def _check_cells(column: Any, limit: int) -> None:
    """Raise ValueError where a text of a batch's column, or of one nested in it, is too long."""
    kind, types = column.type, _arrow.types
    if types.is_dictionary(kind):
        _check_cells(column.dictionary, limit)
    elif types.is_struct(kind):
        for number in range(kind.num_fields):
            _check_cells(column.field(number), limit)
    elif types.is_list(kind) or types.is_large_list(kind) or types.is_map(kind):
        _check_cells(column.values, limit)
    elif _is_text(kind) or kind_of(kind) is ColumnKind.binary:
        plain = column.cast(_arrow.large_binary())
        longest = _compute.max(_compute.binary_length(plain)).as_py() or 0
        if longest > limit:
            raise ValueError(f"a text of {longest} bytes is over the limit of {limit}")
