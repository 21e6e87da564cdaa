"""Parquet files of strangers: their rows in bounded memory, or one line."""

import io
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.storage import parquet
from data.storage.parquet import read_file_metadata, read_parquet


def encoded(table: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **options)
    return buffer.getvalue()


def repeated(text: str, rows: int) -> bytes:
    """One text in every row, stored once."""
    column = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, "int32")), pa.array([text]))
    return encoded(pa.table({"text": column}), compression="zstd", store_schema=False)


ROWS = st.fixed_dictionaries(
    {
        "text": st.none() | st.text(max_size=20),
        "number": st.integers(-(2**63), 2**63 - 1),
        "nested": st.fixed_dictionaries({"a": st.text(max_size=5), "b": st.booleans()}),
        "list": st.lists(st.text(max_size=5), max_size=3),
    }
)
SCHEMA = pa.schema(
    {
        "text": pa.string(),
        "number": pa.int64(),
        "nested": pa.struct({"a": pa.string(), "b": pa.bool_()}),
        "list": pa.list_(pa.string()),
    }
)


@settings(max_examples=200, deadline=None)
@given(st.lists(ROWS, max_size=20), st.booleans())
def test_rows_are_read_as_they_were_written(rows: list[dict[str, Any]], is_file: bool) -> None:
    payload = encoded(pa.Table.from_pylist(rows, SCHEMA))
    source = io.BytesIO(payload) if is_file else payload
    assert list(read_parquet(source, list, max_rows=20)) == rows


def test_many_batches_keep_the_order() -> None:
    payload = encoded(pa.table({"a": range(1000), "b": map(str, range(1000))}), row_group_size=300)
    found = [(row["a"], row["b"]) for row in read_parquet(payload, list, max_rows=1000)]
    assert found == [(number, str(number)) for number in range(1000)]


def test_a_text_that_is_stored_once_is_held_once() -> None:
    payload = repeated("x" * 20_000, 20_000)
    assert len(payload) < 10_000
    tracemalloc.start()
    rows = list(read_parquet(payload, list, max_rows=20_000))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(rows) == 20_000
    assert peak < 40e6, "dictionaries of one entry, and not 400 MB of text"


HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "long text": (lambda: repeated("x" * 2**21, 1000), "a text of 2097152 bytes is over"),
    "long text in a list": (
        lambda: encoded(pa.table({"a": [["x" * 2**21]]})),
        "a text of 2097152 bytes is over",
    ),
    "many rows": (lambda: repeated("x", 100_001), "100001 rows are over the limit of 100000"),
    "zeros": (
        lambda: encoded(
            pa.table({str(n): np.zeros(90_000) for n in range(6)}), use_dictionary=False
        ),
        "bytes without compression are over the limit of 4194304",
    ),
    "wide values": (
        lambda: encoded(pa.table({"a": pa.array([b"x" * 65], pa.binary(65))})),
        "column a has values of more than 64 bytes",
    ),
    "no parquet": (lambda: b"PAR1" * 9, "."),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_are_one_line(kind: str) -> None:
    make, reason = HOSTILE[kind]
    with pytest.raises(ValueError, match=reason) as caught:
        list(read_parquet(make(), list, max_rows=100_000, max_bytes=2**22))
    assert "\n" not in str(caught.value)


def test_long_lists_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "MAX_VALUES", 1000)
    payload = encoded(pa.table({"a": [[0] * 1001]}))
    with pytest.raises(ValueError, match=r"column a\.list\.element holds 1001 values"):
        list(read_parquet(payload, list, max_rows=1000))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damage_is_one_kind_of_error(data: st.DataObject) -> None:
    sound = encoded(pa.table({"a": ["x", "y"], "b": [1, 2]}))
    place, value = data.draw(st.integers(0, len(sound) - 1)), data.draw(st.integers(0, 255))
    damaged = sound[:place] + bytes([value]) + sound[place + 1 :]
    for payload in (damaged, sound[:place]):
        try:
            rows = list(read_parquet(payload, list, max_rows=10))
        except ValueError as error:
            assert "\n" not in str(error)
        else:
            assert len(rows) <= 10


def test_statistics_that_do_not_fit_end_no_process() -> None:
    """pyarrow ends its process for some of these."""
    sound = encoded(pa.table({"a": ["x", "y"], "b": [1, 2]}))
    refused: set[str] = set()
    for place in range(len(sound) // 5, len(sound) // 2):  # the first chunk's part of the footer
        damaged = sound[:place] + b"\0" + sound[place + 1 :]
        try:
            list(read_parquet(damaged, list, max_rows=10))
        except ValueError as error:
            refused.add(str(error))
    assert "its statistics do not fit its columns" in refused


def test_metadata(tmp_path: Path) -> None:
    table = pa.table({"a": [1]}).replace_schema_metadata({"key": "value"})
    assert read_file_metadata(encoded(table))[b"key"] == b"value"
    with pytest.raises(ValueError):
        read_file_metadata(b"")
