"""Captions of a folder: of any type, from tables, texts and JSON, in any encoding."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from data.config import SourceConfig
from data.shards.codecs import REPLACED_BYTES
from data.sources.making import SEVERAL_CAPTIONS
from data.sources.samples import RawSample
from data.sources.sources import open_source
from tests.support.data_sets import data_config, png


def raw_samples(folder: Path, **options: Any) -> list[RawSample]:
    config = data_config(folder, source=SourceConfig(path=str(folder), **options))
    return [sample for sample in open_source(config) if isinstance(sample, RawSample)]


@pytest.mark.parametrize(
    ("value", "caption", "listed"),
    [
        (["a cat", "a feline"], "a cat", ["a cat", "a feline"]),
        ({"en": "a cat", "de": "Katze"}, "a cat", ["a cat", "Katze"]),
        (7, "7", None),
        (["a cat"], "a cat", None),
    ],
)
def test_a_caption_of_another_type_is_read(
    tmp_path: Path, value: object, caption: str, listed: list[str] | None
) -> None:
    (tmp_path / "a.png").write_bytes(png(0))
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": value}))
    (sample,) = raw_samples(tmp_path)
    assert (sample.caption, sample.metadata.get("captions")) == (caption, listed)
    assert sample.metadata.get("text") == (value if isinstance(value, dict) else None)
    assert (SEVERAL_CAPTIONS in sample.noted) is (listed is not None)


COLUMNS = {
    "categorical": pa.array(["a cat", "a dog"]).dictionary_encode(),
    "binary": pa.array([b"a cat", b"a dog"]),
    "large": pa.array(["a cat", "a dog"], pa.large_string()),
    "view": pa.array(["a cat", "a dog"], pa.string_view()),
    "list": pa.array([["a cat", "a feline"], ["a dog"]]),
    "struct": pa.array([{"en": "a cat"}, {"en": "a dog"}]),
    "map": pa.array([[("en", "a cat")], [("en", "a dog")]], pa.map_(pa.string(), pa.string())),
}


@pytest.mark.parametrize("kind", COLUMNS)
def test_captions_come_from_parquet_columns_of_any_type(tmp_path: Path, kind: str) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(png(ord(name[0])))
    table = pa.table({"file_name": ["a.png", "./b.png"], "text": COLUMNS[kind]})
    parquet.write_table(table, tmp_path / "captions.parquet")
    assert [sample.caption for sample in raw_samples(tmp_path)] == ["a cat", "a dog"]


def test_a_table_of_tabs_may_have_commas_in_its_names(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(0))
    (tmp_path / "metadata.tsv").write_text(
        "file_name\ttext\tred, green, blue\na.png\ta, b\t1,2,3\n"
    )
    (sample,) = raw_samples(tmp_path)
    assert (sample.caption, sample.metadata) == ("a, b", {"red, green, blue": "1,2,3"})


def test_all_rows_of_an_image_count(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(0))
    text = "image;caption;by\n" + "".join(f"a.png;caption {n};{n}\n" for n in range(5))
    (tmp_path / "metadata.csv").write_text(text)
    (sample,) = raw_samples(tmp_path, file_field="image", caption_field="caption")
    assert sample.metadata == {"captions": [f"caption {n}" for n in range(5)], "by": "0"}


def test_the_json_of_an_image_has_captions_and_fields(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(png(0))
    (tmp_path / "a.JSON").write_text('{"caption": ["one", "two"], "score": 0.5}')
    (tmp_path / "b.json").write_text('{"caption": "not read", "score": 1}')
    (tmp_path / "b.TXT").write_text("three")
    (tmp_path / "c.json").write_text("{}")
    config = data_config(tmp_path, source=SourceConfig(path=str(tmp_path), caption_field="caption"))
    source = open_source(config)
    samples = [sample for sample in source if isinstance(sample, RawSample)]
    assert [(sample.caption, sample.metadata["score"]) for sample in samples] == [
        ("one", 0.5),
        ("three", 1),
    ]
    assert samples[0].metadata["captions"] == ["one", "two"]
    assert source.left_alone.entries()[0].reason == ".json: no image of this name"


def test_bytes_of_another_encoding_are_replaced_and_counted_or_the_option_names_it(
    tmp_path: Path,
) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(png(0))
    (tmp_path / "captions.csv").write_bytes("file_name,text\na.png,café\n".encode("cp1252"))
    (tmp_path / "b.txt").write_bytes("naïve".encode("cp1252"))
    samples = raw_samples(tmp_path)
    assert [sample.caption for sample in samples] == ["caf\ufffd", "na\ufffdve"]
    assert all(sample.noted[REPLACED_BYTES] == 1 for sample in samples)
    config = data_config(tmp_path, source=SourceConfig(path=str(tmp_path)), encoding="cp1252")
    found = [one.caption for one in open_source(config) if isinstance(one, RawSample)]
    assert found == ["café", "naïve"]
