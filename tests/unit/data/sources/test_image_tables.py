"""Tables that hold the images, as Hugging Face `datasets` writes them, and folders of classes."""

import json
import struct
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import ipc, parquet

from data.config import SourceConfig, SourceKind
from data.shards.account import Fate, total
from data.shards.codecs import REPLACED_BYTES
from data.shards.manifest import Rejected
from data.sources.image_tables import columns_of
from data.sources.samples import RawSample, Source
from data.sources.sources import open_source
from data.storage.arrow import ArrowTable
from tests.support.data_sets import data_config, png
from trainer.pack.proposal import find_kind

CLASSES = {"info": {"features": {"label": {"names": ["cat", "golden_retriever"]}}}}
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def table_of(start: int, number: int, **columns: Any) -> Any:
    images = [{"bytes": png(row), "path": None} for row in range(start, start + number)]
    captions = [f"caption {row}" for row in range(start, start + number)]
    labels = [row % 2 for row in range(start, start + number)]
    plain = {"image": pa.array(images, IMAGE), "text": captions, "label": labels}
    table = pa.table({**plain, **columns})
    return table.replace_schema_metadata({"huggingface": json.dumps(CLASSES)})


def write(path: Path, table: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        parquet.write_table(table, path, row_group_size=3)
    elif path.suffix == ".arrow":
        with ipc.new_stream(str(path), table.schema) as stream:
            stream.write_table(table, max_chunksize=2)
    else:
        with ipc.new_file(str(path), table.schema) as file:
            file.write_table(table, max_chunksize=2)


def source_of(folder: Path, kind: SourceKind = SourceKind.image_tables, **options: Any) -> Source:
    source = SourceConfig(kind=kind, path=str(folder), **options)
    return open_source(data_config(folder / "out", source=source))


def samples_of(source: Source) -> list[RawSample]:
    return [item for item in source if isinstance(item, RawSample)]


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_folder_of_tables_is_read(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / f"lang=en/data-0.{suffix}", table_of(0, 7))
    write(tmp_path / f"lang=de/data-1.{suffix}", table_of(7, 4))
    (tmp_path / "state.json").write_text("{}")
    source = source_of(tmp_path, label_field="label")
    samples = samples_of(source)
    assert len(source) == len(samples) == 11
    assert [one.caption for one in samples] == [
        f"caption {row}" for row in [7, 8, 9, 10, 0, 1, 2, 3, 4, 5, 6]
    ]
    assert [one.label for one in samples] == [1, 0, 1, 0, 0, 1, 0, 1, 0, 1, 0]
    assert samples[0].image == png(7)
    assert samples[0].metadata == {"lang": "de"}
    assert source.classes == ["cat", "golden_retriever"]
    assert [one.reason for one in source.left_alone.entries()] == [".json: no table"]


@pytest.mark.parametrize(
    ("names", "place"),
    [
        (["train/data-00000-of-00001.arrow", "test/data-00000-of-00001.arrow"], "train"),
        (["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"], "data/train*"),
        (["full/train/0000.parquet", "full/validation/0000.parquet"], "full/train"),
        (["test.parquet", "validation.parquet"], "test*"),
    ],
)
def test_splits_are_not_mixed_in_silence(tmp_path: Path, names: list[str], place: str) -> None:
    folder = tmp_path / "set"
    for number, name in enumerate(names):
        write(folder / name, table_of(10 * number, 3))
    with pytest.raises(ValueError, match=r"holds the splits .*; name one of them") as caught:
        source_of(folder)
    assert f"'data.source.path={folder}/{place}'" in str(caught.value)
    assert [one.image for one in samples_of(source_of(folder / place))] == [
        png(n) for n in range(3)
    ]
    (folder / names[0]).with_suffix(".md").write_text("x")
    pattern = Path(f"{tmp_path}/s*/**/*")
    both = source_of(pattern)
    assert len(samples_of(both)) == len(both) == 6
    assert total(both.left_alone.entries(), Fate.left_alone) == 1
    assert find_kind(str(pattern))[0] is SourceKind.image_tables
    assert columns_of(pattern) == ["image", "text", "label"]


def test_tables_of_one_split_need_no_choice(tmp_path: Path) -> None:
    write(tmp_path / "train-00000-of-00002.parquet", table_of(0, 3))
    write(tmp_path / "more/train-00001-of-00002.parquet", table_of(3, 3))
    write(tmp_path / "trainers.parquet", table_of(6, 3))
    assert len(samples_of(source_of(tmp_path))) == 9


def test_a_linked_folder_of_tables_is_told(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere" / "1.parquet", table_of(0, 2))
    write(tmp_path / "set" / "0.parquet", table_of(2, 3))
    (tmp_path / "set" / "more").symlink_to("../elsewhere")
    source = source_of(tmp_path / "set")
    items = list(source)
    assert len(items) == len(source) == 4
    (rejected,) = [one for one in items if isinstance(one, Rejected)]
    assert (rejected.key, rejected.reason[:18]) == ("more", "a link to a folder")


def test_the_file_format_of_arrow_is_read_too(tmp_path: Path) -> None:
    write(tmp_path / "x.feather", table_of(0, 5))
    with ArrowTable((tmp_path / "x.feather").open("rb")) as table:
        assert table.rows == 5
        assert [row["text"] for row in table.read(["text"])] == [f"caption {n}" for n in range(5)]


def test_what_datasets_saves_is_read(tmp_path: Path) -> None:
    """`datasets` itself is no dependency: this is what its version 3 wrote, by its own account."""
    folder = tmp_path / "saved"
    write(folder / "train" / "data-00000-of-00001.arrow", table_of(0, 4))
    (folder / "train" / "dataset_info.json").write_text("{}")
    (folder / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert len(samples_of(source_of(folder))) == 4


def test_names_of_classes_make_captions_where_there_are_none(tmp_path: Path) -> None:
    table = table_of(0, 2).drop_columns(["text"])
    write(tmp_path / "0.parquet", table)
    samples = samples_of(source_of(tmp_path, label_field="label"))
    assert [(one.label, one.caption) for one in samples] == [(0, "cat"), (1, "golden retriever")]
    texts = table.set_column(1, "label", pa.array(["b", "a"])).replace_schema_metadata(None)
    write(tmp_path / "0.parquet", texts)
    source = source_of(tmp_path, label_field="label")
    assert source.classes == ["a", "b"]
    assert [(one.label, one.caption) for one in samples_of(source)] == [(1, "b"), (0, "a")]


def test_rows_that_cannot_be_used_are_rejected(tmp_path: Path) -> None:
    images = [
        {"bytes": None, "path": "beside.png"},
        {"bytes": None, "path": "gone.png"},
        {"bytes": None, "path": "../outside.png"},
        {"bytes": b"no picture", "path": None},
        None,
        {"bytes": png(5), "path": None},
        {"bytes": png(6), "path": None},
    ]
    texts = [["a", "b"], ["x"], ["x"], ["x"], ["x"], None, ["c"]]
    folder = tmp_path / "set"
    write(
        folder / "0.parquet",
        pa.table(
            {"image": pa.array(images, IMAGE), "text": texts, "label": [0, 0, 0, 0, 0, None, 9]}
        ),
    )
    (folder / "beside.png").write_bytes(png(0))
    (tmp_path / "outside.png").write_bytes(png(1))
    source = source_of(folder)
    items = list(source)
    assert len(items) == len(source) == 7
    reasons = {item.key: item.reason for item in items if isinstance(item, Rejected)}
    nowhere = "image is a path that leads to no file here"
    assert reasons == {
        "0.parquet:1": nowhere,
        "0.parquet:2": nowhere,
        "0.parquet:3": "image cannot be decoded (UnidentifiedImageError)",
        "0.parquet:4": "no image",
        "0.parquet:5": "no caption",
    }
    first = samples_of(source)[0]
    assert (first.caption, first.metadata["captions"]) == ("a", ["a", "b"])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"image_field": "img"}, "image_field: .*0.parquet has no column img; its columns are"),
        ({"caption_field": "caption"}, "caption_field: .* no column caption; .* text"),
        ({"label_field": "class"}, "label_field: .* no column class"),
    ],
)
def test_a_column_that_is_missing_is_named(
    tmp_path: Path, option: dict[str, str], message: str
) -> None:
    write(tmp_path / "0.parquet", table_of(0, 1))
    with pytest.raises(ValueError, match=rf"data\.source\.{message}"):
        source_of(tmp_path, SourceKind.image_tables, **option)


def test_a_folder_without_tables_or_with_a_damaged_one_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data\.source\.path: no \.parquet or \.arrow"):
        source_of(tmp_path)
    for name in ("0.parquet", "0.arrow"):
        (tmp_path / name).write_bytes(b"nothing of the kind")
        with pytest.raises(ValueError, match=rf"data\.source\.path: .*{name}: [^\n]+$"):
            source_of(tmp_path)
        (tmp_path / name).unlink()


def test_offsets_that_lead_out_of_an_arrow_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "0.arrow"
    write(path, pa.table({"text": ["abcde", "fgh"]}))
    offsets, beyond = struct.pack("<3i", 0, 5, 8), struct.pack("<3i", 0, 5, 2**24)
    assert path.read_bytes().count(offsets) == 1
    path.write_bytes(path.read_bytes().replace(offsets, beyond))
    with path.open("rb") as file, pytest.raises(ValueError, match=r"^[^\n]+$"):
        ArrowTable(file)


def test_a_length_beyond_the_memory_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "0.arrow"
    table = pa.table({"text": ["abcde" * 100]})
    with pa.ipc.new_stream(path, table.schema) as stream:
        stream.write_table(table)
    content = path.read_bytes()
    schema, batch = pa.ipc.MessageReader.open_stream(content)
    assert schema.body.size == 0
    body: int = batch.body.size
    length = struct.pack("<q", body)
    assert content.count(length) == 1
    path.write_bytes(content.replace(length, struct.pack("<q", 2**60)))
    with path.open("rb") as file, pytest.raises(ValueError, match="larger than the memory"):
        ArrowTable(file)


@settings(max_examples=200)
@given(st.data())
def test_a_damaged_arrow_file_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("arrow") / "0.arrow"
    write(path, table_of(0, 3))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        with path.open("rb") as file:
            table = ArrowTable(file)
            list(table.read(list(table.columns)))
    except ValueError as error:
        assert "\n" not in str(error)


def test_class_folders_give_names_and_numbers(tmp_path: Path) -> None:
    for number, name in enumerate(["cat/0.png", "golden_retriever/deep/1.png", "cat/2.png"]):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png(number))
    (tmp_path / "cat" / "2.txt").write_text("a black cat")
    (tmp_path / "3.png").write_bytes(png(3))
    source = source_of(tmp_path, SourceKind.class_folders)
    assert source.classes == ["cat", "golden_retriever"]
    items = list(source)
    assert [(one.label, one.caption) for one in items if isinstance(one, RawSample)] == [
        (0, "cat"),
        (0, "a black cat"),
        (1, "golden retriever"),
    ]
    (rejected,) = [one for one in items if isinstance(one, Rejected)]
    assert (rejected.key, rejected.reason) == ("3.png", "in no folder of a class")


def test_folders_of_splits_are_no_classes(tmp_path: Path) -> None:
    for name in ("train/cat/0.png", "val/cat/1.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(png(0))
    with pytest.raises(
        ValueError, match=r"train, val, which are splits and no classes: set .*path=.*/train$"
    ):
        source_of(tmp_path, SourceKind.class_folders)
    for name in ("train", "val"):
        for path in (tmp_path / name / "cat").iterdir():
            path.rename(tmp_path / f"{name}.png")
    with pytest.raises(ValueError, match="has no folder with images"):
        source_of(tmp_path, SourceKind.class_folders)


@pytest.mark.parametrize("table", ["csv", "jsonl"])
@pytest.mark.parametrize("labels", [["dog", "cat"], ["1", "0"]])
def test_a_column_of_a_table_has_the_class(tmp_path: Path, table: str, labels: list[str]) -> None:
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(png(ord(name)))
    rows = [("a.png", labels[0]), ("b.png", labels[1])]
    if table == "csv":
        lines = ["file_name,text,kind", *(f"{name},,{label}" for name, label in rows)]
    else:
        values = [int(label) if label.isdigit() else label for _, label in rows]
        lines = [
            json.dumps({"file_name": name, "kind": value})
            for (name, _), value in zip(rows, values, strict=True)
        ]
    (tmp_path / f"metadata.{table}").write_text("\n".join(lines))
    source = source_of(tmp_path, SourceKind.folder, label_field="kind")
    named = labels[0] == "dog"
    assert source.classes == (["cat", "dog"] if named else [])
    assert [one.label for one in samples_of(source)] == [1, 0]
    assert [one.caption for one in samples_of(source)] == (["dog", "cat"] if named else ["", ""])


def test_names_that_are_numbers_are_their_own_numbers(tmp_path: Path) -> None:
    for name in range(12):
        (tmp_path / str(name)).mkdir()
        (tmp_path / str(name) / "x.png").write_bytes(png(name))
    source = source_of(tmp_path, SourceKind.class_folders)
    assert list(source.classes) == [str(number) for number in range(12)]
    assert {one.name.split("/")[0]: one.label for one in samples_of(source)} == {
        str(number): number for number in range(12)
    }


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        ("lion", "class is lion, neither a name nor a number"),
        (2, "class 2 is over the last one, 1"),
        (-1, "class is -1, neither a name nor a number"),
        (0.5, "class is 0.5, neither a name nor a number"),
    ],
)
def test_a_label_that_is_no_class_costs_its_sample(
    tmp_path: Path, label: object, reason: str
) -> None:
    write(tmp_path / "0.parquet", table_of(0, 1).set_column(2, "label", pa.array([label])))
    source = source_of(tmp_path, label_field="label")
    (rejected,) = source
    assert isinstance(rejected, Rejected)
    assert rejected.reason == reason


def test_bytes_of_captions_are_mended_and_fields_that_no_reader_takes_are_refused(
    tmp_path: Path,
) -> None:
    texts = pa.array([b"caf\xe9", b"x"])
    notes = pa.array(["", "y" * 1_020_000])
    images = [{"bytes": png(row), "path": None} for row in range(2)]
    columns = {"image": pa.array(images, IMAGE), "text": texts, "note": notes}
    write(tmp_path / "0.parquet", pa.table(columns))
    first, second = source_of(tmp_path)
    assert isinstance(first, RawSample)
    assert (first.caption, first.noted[REPLACED_BYTES]) == ("caf\ufffd", 1)
    assert isinstance(second, Rejected)
    assert second.reason.startswith("fields of 1020012 bytes are over")
