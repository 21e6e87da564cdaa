"""Read the rows of parquet files, in memory that grows with the file and not with its claims.

Encodings repeat values: a file of 3 kB can hold a gigabyte of one text. Texts are therefore read as
dictionaries, a few rows at a time, and equal texts share their memory.
"""

import faulthandler
import os
import resource
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, BinaryIO

import pyarrow
from pyarrow import compute, parquet

_arrow: Any = pyarrow
"""The module without its types, which pyarrow does not declare."""
_compute: Any = compute

Columns = Mapping[str, bool]
"""Name of a column → whether it holds text, numbers or booleans."""

MAX_CELL_BYTES = 2**20
MAX_FIXED_BYTES = 64
"""Largest width of a column of fixed-size values, such as decimals."""
MAX_VALUES = 2**26
"""Largest number of values in a column; a column of lists holds several in a row."""
BATCH_ROWS = 256
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
    try:
        with _open(source) as file:
            columns = choose({column.name: _is_plain(column.type) for column in file.schema_arrow})
            leaves = _leaves(file.schema, columns)
            _check_size(file.metadata, leaves, max_rows, max_bytes)
            texts = [path for path, leaf in leaves.items() if leaf.physical_type == "BYTE_ARRAY"]
        seen: dict[str, str] = {}
        with _open(source, texts) as file:
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=columns):
                for column in batch.columns:
                    _check_cells(column)
                for row in _rows(batch):
                    yield {
                        name: seen.setdefault(value, value) if isinstance(value, str) else value
                        for name, value in row.items()
                    }
    except (_arrow.ArrowException, OSError, OverflowError) as error:
        raise ValueError(str(error).splitlines()[0]) from error


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


def _is_plain(column: Any) -> bool:
    types = _arrow.types
    numbers = (types.is_integer, types.is_floating, types.is_boolean)
    return _is_text(column) or any(check(column) for check in numbers)


def _is_text(column: Any) -> bool:
    return _arrow.types.is_string(column) or _arrow.types.is_large_string(column)


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


def _check_cells(column: Any) -> None:
    """Raise ValueError where a text of a batch's column, or of one nested in it, is too long."""
    kind, types = column.type, _arrow.types
    if types.is_dictionary(kind):
        _check_cells(column.dictionary)
    elif types.is_struct(kind):
        for number in range(kind.num_fields):
            _check_cells(column.field(number))
    elif types.is_list(kind) or types.is_large_list(kind) or types.is_map(kind):
        _check_cells(column.values)
    elif types.is_binary(kind) or types.is_string(kind):
        longest = _compute.max(_compute.binary_length(column)).as_py() or 0
        if longest > MAX_CELL_BYTES:
            raise ValueError(f"a text of {longest} bytes is over the limit of {MAX_CELL_BYTES}")
