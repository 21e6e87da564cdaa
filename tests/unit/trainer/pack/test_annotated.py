"""Packing label maps and boxes: from every source, and whatever is wrong with one is counted."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.config import DataConfig, SourceConfig, SourceKind
from data.order.batches import Share
from data.shards.annotations import Box, encode_boxes, encode_map
from data.shards.codecs import BOXES, MAP
from data.shards.manifest import Manifest, ManifestError
from data.streams.images import ImageStream
from tests.support.annotated import annotations, boxes_of, map_of
from tests.support.data_sets import data_config, png
from tests.support.packing import read_captions, run

BAD = {
    "of mode RGB": {MAP: png(0)},
    "4x4 beside an image of 8x8": {MAP: encode_map(map_of(0, 4))},
    "no .map.png": {MAP: b""},
    "has no area": {BOXES: encode_boxes([Box("cat", 0.5, 0, 0.5, 1)])},
    "outside": {BOXES: encode_boxes([Box("cat", 0.5, 0, 1.5, 1)])},
    "no .boxes.json": {BOXES: b""},
    "'bird' in .boxes.json is no class": {BOXES: encode_boxes([Box("bird", 0, 0, 1, 1)])},
    "label 99 in .map.png": {MAP: encode_map(np.full((8, 8), 99, np.uint8))},
}
"""Reason → members of a sample that is bad for it; empty: it lacks the member."""


def samples() -> dict[str, dict[str, bytes]]:
    """Five good samples, and the bad ones: {key: members}."""
    found: dict[str, dict[str, bytes]] = {}
    for number in range(5 + len(BAD)):
        members = {"png": png(number), "txt": b"caption", **annotations(number)}
        if number >= 5:
            members |= list(BAD.values())[number - 5]
        found[f"{number:02d}"] = {name: payload for name, payload in members.items() if payload}
    return found


def in_folder(folder: Path) -> None:
    for key, members in samples().items():
        for extension, payload in members.items():
            (folder / f"{key}.{extension}").write_bytes(payload)
    (folder / "lonely.map.png").write_bytes(annotations(0)[MAP])


def in_tar(folder: Path) -> None:
    with tarfile.open(folder / "0.tar", "w") as tar:
        for key, members in samples().items():
            for extension, payload in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(payload)
                tar.addfile(info, io.BytesIO(payload))


@pytest.fixture(params=["folder", "webdataset"])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> DataConfig:
    raw = tmp_path / "raw"
    raw.mkdir()
    {"folder": in_folder, "webdataset": in_tar}[request.param](raw)
    (tmp_path / "maps.txt").write_text("\n".join(f"class {number}" for number in range(16)))
    (tmp_path / "boxes.txt").write_text("dog\ncat")
    source = SourceConfig(
        kind=SourceKind(request.param),
        path=str(raw),
        map_classes=str(tmp_path / "maps.txt"),
        box_classes=str(tmp_path / "boxes.txt"),
    )
    return data_config(tmp_path, maps=True, boxes=True, source=source)


def stream_of(config: DataConfig) -> ImageStream:
    return ImageStream.open(config, "train", Share(seed=0, global_batch=4, micro_batch=4))


def test_good_ones_are_packed_and_bad_ones_counted(config: DataConfig) -> None:
    run(config)
    manifest = Manifest.load(config.train, option="data.train")
    assert manifest.map_classes == [f"class {number}" for number in range(16)]
    assert manifest.box_classes == ["dog", "cat"]
    assert (manifest.samples, manifest.found) == (5, 5 + len(BAD))
    assert sum(manifest.rejected.values()) == len(BAD)
    found = [reason.replace(" .", " ") for reason in manifest.rejected]  # of tars, without a dot
    for reason in BAD:
        assert any(reason.replace(" .", " ") in one for one in found), reason
    batch = stream_of(config).read(np.arange(5))
    for number in range(5):
        np.testing.assert_array_equal(batch.arrays["map"][number].numpy(), map_of(number))
        assert batch.boxes[number] == boxes_of(number)
    run(config, verify="full")


def test_classes_without_names_are_those_that_are_found(config: DataConfig) -> None:
    config.source.map_classes = config.source.box_classes = ""
    run(config)
    manifest = Manifest.load(config.train, option="data.train")
    assert manifest.map_classes == [str(number) for number in range(100)]
    assert manifest.box_classes == ["bird", "cat", "dog"]
    assert manifest.samples == 7


def test_sets_without_annotations_are_packed_as_before(config: DataConfig) -> None:
    config.maps = config.boxes = False
    run(config)
    document = json.loads((Path(config.train) / "manifest.json").read_text())
    assert not {"map_classes", "box_classes"} & document.keys()
    assert "data.maps" not in document["source"]
    config.maps = True
    with pytest.raises(ManifestError, match=r"data\.maps was null and is true"):
        run(config)


def test_objects_of_coco_become_boxes(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    notes: list[dict[str, Any]] = []
    wanted: dict[int, Any] = {
        0: [[1, 2, 3, 4]],
        1: [],
        2: [[0, 0, 0, 4]],
        3: [[0, 0, 9, 4]],
        4: None,
        5: [[0, 0, 8, 8]],
    }
    for number, boxes in wanted.items():
        (raw / f"{number}.png").write_bytes(png(number))
        (raw / f"{number}.txt").write_text("caption")
        about = {"image_id": number, "category_id": 3 + number // 5}
        notes += [{**about, "bbox": bbox} for bbox in boxes or []]
    notes.append({"image_id": 3, "category_id": 3, "bbox": None})
    document = {
        "images": [{"id": n, "file_name": f"{n}.png"} for n in wanted if n != 4],
        "annotations": notes,
        "categories": [{"id": 3, "name": "cat"}, {"id": 9, "name": "ant"}],
    }
    (raw / "instances_val.json").write_text(json.dumps(document))
    config = data_config(tmp_path, boxes=True, source=SourceConfig(path=str(raw)))
    run(config)
    manifest = Manifest.load(config.train, option="data.train")
    assert manifest.box_classes == ["cat", "ant"]
    assert sorted(manifest.rejected) == [
        "a box of 'cat' has no area in .boxes.json",
        "a box of 'cat' is outside of [0, 1] in .boxes.json",
        "label 'category 4' in .boxes.json is no class",
        "no .boxes.json",
    ]
    stream = stream_of(config)
    assert stream.read(np.arange(2)).boxes == [[Box("cat", 1 / 8, 1 / 4, 1 / 2, 3 / 4)], []]
    assert len(read_captions(config)) == 2


def test_scenes_are_packed(tmp_path: Path) -> None:
    source = SourceConfig(
        kind=SourceKind.scenes, count=12, emoji=["turtle", "owl", "red heart"], val_share=0.3
    )
    config = data_config(tmp_path, maps=True, boxes=True, image_size=16, source=source)
    run(config)
    train, val = (
        Manifest.load(folder, option="data.train") for folder in (config.train, config.val)
    )
    assert train.samples + val.samples == 12
    assert train.map_classes == val.map_classes
    assert train.map_classes[-3:] == train.box_classes == ["turtle", "owl", "red heart"]
    batch = stream_of(config).read(np.arange(train.samples))
    assert all(batch.boxes)
    assert batch.arrays["map"].max() <= 9
    config.source.seed = 1
    with pytest.raises(ManifestError, match=r"other files at data\.source\.path"):
        run(config)
