"""Boxes in the tables of Open Images."""

from pathlib import Path

import pytest

from data.config import DataConfig, SourceConfig
from data.shards.account import Fate
from data.shards.annotations import Box, decode_boxes
from data.shards.codecs import BOXES
from data.sources.samples import RawSample
from data.sources.sources import open_source
from tests.support.data_sets import data_config, png

HEADER = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded"
ROWS = [
    "a,xclick,/m/01yrx,1,0.25,0.5,0.125,1.0,0",
    "b,xclick,/m/0bt9lr,1,0,1,0,0.5,0",
    "a,xclick,/m/0bt9lr,1,0.1,0.2,0.3,0.4,0",
    "z,xclick,/m/0bt9lr,1,0.1,0.2,0.3,0.4,0",
]
CLASSES = "/m/01yrx,Cat\n/m/0bt9lr,Dog\n/m/05czz6l,Airplane\n"


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    for number, name in enumerate("abc"):
        (tmp_path / f"{name}.png").write_bytes(png(number))
        (tmp_path / f"{name}.txt").write_text(name)
    (tmp_path / "annotations").mkdir()
    write(tmp_path, "train-annotations-bbox.csv", "\n".join([HEADER, *ROWS]))
    source = SourceConfig(path=str(tmp_path))
    return data_config(tmp_path / "out", boxes=True, source=source)


def write(folder: Path, name: str, text: str) -> None:
    (folder / "annotations" / name).write_text(text)


def boxes(config: DataConfig) -> dict[str, list[Box]]:
    samples = [item for item in open_source(config) if isinstance(item, RawSample)]
    return {one.name: decode_boxes(one.annotations[BOXES]) for one in samples if one.annotations}


@pytest.mark.parametrize("header", ["", "LabelName,DisplayName\n"])
def test_boxes_are_those_of_the_table(config: DataConfig, tmp_path: Path, header: str) -> None:
    write(tmp_path, "oidv7-class-descriptions-boxable.csv", header + CLASSES)
    assert boxes(config) == {
        "a.png": [Box("Cat", 0.25, 0.125, 0.5, 1.0), Box("Dog", 0.1, 0.3, 0.2, 0.4)],
        "b.png": [Box("Dog", 0.0, 0.0, 1.0, 0.5)],
    }
    assert open_source(config).labels.boxes == ["Cat", "Dog", "Airplane"]


def test_without_a_table_of_classes_labels_are_the_machines_names(config: DataConfig) -> None:
    assert [box.label for box in boxes(config)["a.png"]] == ["/m/01yrx", "/m/0bt9lr"]
    assert open_source(config).labels.boxes == []


def test_boxes_beside_an_image_come_first(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "a.boxes.json").write_text('[{"label": "x", "box": [0, 0, 1, 1]}]')
    assert boxes(config)["a.png"] == [Box("x", 0.0, 0.0, 1.0, 1.0)]


def test_tables_of_other_images_are_left_alone(config: DataConfig, tmp_path: Path) -> None:
    write(tmp_path, "test-annotations-bbox.csv", "\n".join([HEADER, ROWS[3]]))
    (alone,) = open_source(config).left_alone.entries()
    assert (alone.fate, alone.examples) == (
        Fate.left_alone,
        ["annotations/test-annotations-bbox.csv"],
    )


def test_tables_are_not_read_unless_boxes_are_asked_for(config: DataConfig, tmp_path: Path) -> None:
    write(tmp_path, "train-annotations-bbox.csv", "damaged")
    config.boxes = False
    assert all(not item.annotations for item in open_source(config) if isinstance(item, RawSample))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("train-annotations-bbox.csv", "", "StopIteration|no table of Open Images"),
        ("train-annotations-bbox.csv", "ImageID,XMin\na,1", "'LabelName' is not in list"),
        ("train-annotations-bbox.csv", f"{HEADER}\na,x,y,1,left,1,1,1,0", "left"),
        ("train-annotations-bbox.csv", f"{HEADER}\na,x", "list index out of range"),
        ("class-descriptions.csv", "/m/1\n", "list index out of range"),
    ],
)
def test_what_is_no_table_is_named(
    config: DataConfig, tmp_path: Path, name: str, text: str, message: str
) -> None:
    write(tmp_path, name, text)
    with pytest.raises(ValueError, match=rf"{name}: no table of Open Images.*({message})|{name}"):
        open_source(config)
