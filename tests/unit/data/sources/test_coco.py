"""Annotations of COCO beside images."""

import json
from pathlib import Path
from typing import Any

import pytest

from data.config import SourceConfig
from data.shards.account import Fate
from data.sources.samples import RawSample, Source
from data.sources.sources import open_source
from tests.support.data_sets import data_config, png

IMAGES = [{"id": 7, "file_name": "a.png", "width": 8}, {"id": 9, "file_name": "b.png"}]
CAPTIONS = [
    {"id": 1, "image_id": 7, "caption": "a cat "},
    {"id": 2, "image_id": 9, "caption": "a dog"},
    {"id": 3, "image_id": 7, "caption": "a feline"},
]
OBJECTS = [{"image_id": 7, "category_id": 3, "bbox": [1, 2, 3, 4], "segmentation": [[0]]}]


def write(folder: Path, name: str, **document: Any) -> None:
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    (folder / "annotations" / name).write_text(json.dumps(document))


def source_of(folder: Path) -> Source:
    return open_source(data_config(folder / "out", source=SourceConfig(path=str(folder))))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, name in enumerate(["val/a.png", "val/b.png"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png(number))
    return tmp_path


def test_captions_and_objects_are_joined_by_name(folder: Path) -> None:
    write(folder, "captions_val.json", images=IMAGES, annotations=CAPTIONS)
    categories = [{"id": 3, "name": "cat"}]
    write(folder, "instances_val.json", images=IMAGES, annotations=OBJECTS, categories=categories)
    write(folder, "captions_train.json", images=[{"id": 1, "file_name": "z.png"}], annotations=[])
    source = source_of(folder)
    first, second = (item for item in source if isinstance(item, RawSample))
    assert (first.name, first.caption) == ("val/a.png", "a cat")
    assert first.metadata == {
        "captions": ["a cat", "a feline"],
        "objects": [{"category": "cat", "bbox": [1, 2, 3, 4]}],
    }
    assert (second.caption, second.metadata) == ("a dog", {})
    (alone,) = source.left_alone.entries()
    assert (alone.fate, alone.reason) == (Fate.left_alone, "annotations of other images")
    assert alone.examples == ["annotations/captions_train.json"]


def test_an_image_that_is_described_but_missing_is_counted(folder: Path) -> None:
    write(folder, "captions_val.json", images=IMAGES, annotations=CAPTIONS)
    (folder / "val" / "b.png").unlink()
    items = list(source_of(folder))
    assert [item.reason for item in items if not isinstance(item, RawSample)] == [
        "captioned, but no such image"
    ]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"images": IMAGES}, "it has no list of annotations"),
        ({"annotations": []}, "'images'"),
        ({"images": IMAGES, "annotations": [{"image_id": 1, "caption": "x"}]}, "1"),
        ({"images": 3, "annotations": []}, "not iterable"),
    ],
)
def test_what_is_no_annotation_is_named(
    folder: Path, document: dict[str, Any], message: str
) -> None:
    write(folder, "captions_val.json", **document)
    with pytest.raises(ValueError, match=rf"captions_val\.json: no annotations of COCO.*{message}"):
        source_of(folder)


def test_two_images_of_one_name_cannot_be_told_apart(folder: Path) -> None:
    (folder / "a.png").write_bytes(png(5))
    write(folder, "captions_val.json", images=IMAGES, annotations=CAPTIONS)
    with pytest.raises(ValueError, match=r"a\.png and val/a\.png have one name"):
        source_of(folder)
