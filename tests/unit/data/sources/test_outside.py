"""Tables with any text: a bad caption costs its sample, and never the packing."""

import csv
import json
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from data.config import SourceConfig
from data.shards.codecs import MAX_TEXT_BYTES
from data.shards.manifest import Rejected, encode_ledger
from data.sources.caption_tables import read_tables
from data.sources.files import FolderFiles
from data.sources.folder import FolderSource
from data.sources.samples import RawSample
from tests.support.data_sets import data_config, png
from trainer.pack.samples import members_of

ANY = st.text(st.characters(categories=None), max_size=20)
TABLES = ["captions.csv", "captions.parquet", "metadata.jsonl"]


def write_table(folder: Path, table: str, rows: list[dict[str, bytes]]) -> None:
    """Write rows of any bytes: {column: value}."""
    if table == "captions.parquet":
        names = list(rows[0])
        columns = [pa.array([row[name] for row in rows], pa.binary()) for name in names]
        texts = [pa.StringArray.from_buffers(len(one), *one.buffers()[1:]) for one in columns]
        parquet.write_table(pa.table(dict(zip(names, texts, strict=True))), folder / table)
        return
    with (folder / table).open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        decoded = [{k: v.decode(errors="surrogateescape") for k, v in row.items()} for row in rows]
        if table == "captions.csv":
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(decoded)
        else:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in decoded)


def packed(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Captions and reasons by name, of what can be written to shards and ledgers."""
    source = FolderSource(data_config(folder, source=SourceConfig(path=str(folder))))
    items = list(source)
    lines = encode_ledger(item for item in items if isinstance(item, Rejected)).splitlines()
    reasons = {line["key"]: line["reason"] for line in map(json.loads, lines)}
    samples = [item for item in items if isinstance(item, RawSample)]
    return {item.name: members_of(item)["txt"].decode() for item in samples}, reasons


@pytest.mark.parametrize("table", TABLES)
def test_bytes_that_are_no_text_cost_their_sample(tmp_path: Path, table: str) -> None:
    for name in ("a.png", "b.png", "c.png"):
        (tmp_path / name).write_bytes(png(0))
    rows = [(b"a.png", b"fine", b"x"), (b"b.png", b"caf\xe9", b"x"), (b"c.png", b"c", b"\xff")]
    rows += [(b"\xe9.png", b"x", b"x")]
    columns = ("file_name", "text", "licence")
    write_table(tmp_path, table, [dict(zip(columns, row, strict=True)) for row in rows])
    captions, reasons = packed(tmp_path)
    assert captions == {"a.png": "fine", "b.png": "caf\ufffd", "c.png": "c"}
    assert reasons == {
        "\\udce9.png": "captioned, but no such image",
    }


def test_half_of_a_surrogate_pair_costs_its_sample(tmp_path: Path) -> None:
    for name in ("1.png", "2.png", "3.png"):
        (tmp_path / name).write_bytes(png(0))
        (tmp_path / name).with_suffix(".txt").write_text("fine")
    rows = ['{"file_name": "1.png", "text": "bad \\ud800 caption"}']
    rows += ['{"file_name": "2.png", "text": "fine", "author": {"\\udfff": 1}, "a": "\\udfff"}']
    rows += ['{"file_name": "\\ud800.png", "text": "x"}']
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    captions, reasons = packed(tmp_path)
    assert captions == {"3.png": "fine"}
    assert reasons == {
        **dict.fromkeys(["1.png", "2.png"], "text is not Unicode"),
        "\\ud800.png": "captioned, but no such image",
    }


@pytest.mark.parametrize("table", TABLES)
def test_a_caption_over_the_limit_costs_its_sample(tmp_path: Path, table: str) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(png(0))
    rows = [(b"a.png", b"x" * 200_000), (b"b.png", b"fine"), (b"c" * 200_000, b"x")]
    write_table(tmp_path, table, [{"file_name": name, "text": text} for name, text in rows])
    captions, reasons = packed(tmp_path)
    assert captions == {"b.png": "fine"}
    assert reasons["a.png"] == f"text of 200000 bytes is over {MAX_TEXT_BYTES}"
    assert max(map(len, reasons)) <= 200


@given(
    st.lists(st.fixed_dictionaries({"file_name": ANY, "text": ANY}, optional={"more": ANY})),
    st.sampled_from(["1.png", "2.png"]),
    ANY,
)
@settings(max_examples=250, deadline=None)
def test_no_text_ends_the_packing(rows: list[dict[str, Any]], name: str, caption: str) -> None:
    with tempfile.TemporaryDirectory() as base:
        folder = Path(base)
        (folder / "1.png").write_bytes(png(0))
        rows = [*rows, {"file_name": name, "text": caption}]
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        captions, reasons = packed(folder)
    assert captions.keys() <= {"1.png"}
    assert len(captions) + len(reasons) >= 1


@given(st.binary(max_size=200))
@settings(max_examples=250, deadline=None)
def test_no_bytes_break_a_csv_of_captions(payload: bytes) -> None:
    with tempfile.TemporaryDirectory() as base:
        (Path(base) / "captions.csv").write_bytes(b"file_name,text\n" + payload)
        rows = read_tables(FolderFiles(Path(base)).open, base, data_config(Path(base)))
    assert all(isinstance(name, str) for name in rows)
