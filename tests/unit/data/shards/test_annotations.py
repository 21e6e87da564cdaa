"""Label maps and boxes: what is read is what was written, and what cannot be is named."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.config import SourceConfig
from data.shards.annotations import (
    AnnotationRule,
    Box,
    Found,
    Labels,
    decode_boxes,
    decode_map,
    encode_boxes,
    encode_map,
    read_names,
)
from data.shards.codecs import BOXES, MAP, BadSampleError
from tests.support.annotated import annotations, encoded
from tests.support.data_sets import data_config

RULE = AnnotationRule(maps=True, boxes=True)
SIZE = (8, 8)


def check(rule: AnnotationRule, members: dict[str, bytes]) -> Found:
    found = Found()
    rule.check(members.get, lambda: SIZE, found)
    return found


@st.composite
def boxes(draw: st.DrawFn) -> Box:
    low, high = st.floats(0, 0.5), st.floats(0.625, 1)
    label = draw(st.text(st.characters(codec="utf-8"), min_size=1, max_size=5))
    return Box(label, draw(low), draw(low), draw(high), draw(high))


@given(st.lists(boxes(), max_size=4))
def test_boxes_are_read_as_they_were_written(found: list[Box]) -> None:
    assert decode_boxes(encode_boxes(found)) == found


@settings(max_examples=200)
@given(boxes(), st.floats(0, 0.5), st.floats(0, 0.5), st.floats(0.25, 0.5))
def test_a_crop_keeps_what_is_inside(box: Box, left: float, top: float, side: float) -> None:
    """Against the pixels of the box, drawn on a grid finer than any of its edges' distances."""
    crop = left, top, left + side, top + side
    found = box.in_crop(crop)
    x = (max(box.left, crop[0]) - left) / side, (min(box.right, crop[2]) - left) / side
    y = (max(box.top, crop[1]) - top) / side, (min(box.bottom, crop[3]) - top) / side
    if x[0] >= x[1] or y[0] >= y[1]:
        assert found is None
    else:
        assert found is not None
        assert found.label == box.label
        np.testing.assert_allclose(found[1:], (x[0], y[0], x[1], y[1]), atol=1e-12)


@given(boxes())
def test_the_mirror_image_of_a_mirror_image_is_the_box(box: Box) -> None:
    mirrored = box.mirrored()
    assert mirrored.right - mirrored.left == pytest.approx(box.right - box.left)
    assert mirrored.left == 1 - box.right
    np.testing.assert_allclose(mirrored.mirrored()[1:], box[1:], atol=1e-12)


@pytest.mark.parametrize("mode", ["L", "P"])
def test_maps_of_both_modes_keep_their_numbers(mode: str) -> None:
    numbers = np.random.default_rng(0).integers(0, 256, (6, 8), np.uint8)
    image = Image.fromarray(numbers)
    if mode == "P":
        image = Image.fromarray(numbers, "P")
        image.putpalette(range(255, -1, -1))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    np.testing.assert_array_equal(decode_map(buffer.getvalue(), (8, 6)), numbers)
    np.testing.assert_array_equal(decode_map(encode_map(numbers), (8, 6)), numbers)


def box(*corners: Any) -> bytes:
    return json.dumps([{"label": "cat", "box": corners}]).encode()


OUTSIDE, FLAT = "a box of 'cat' is outside of [0, 1]", "a box of 'cat' has no area"


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"[", ".boxes.json: JSON cannot be read"),
        (b"{}", ".boxes.json is not a list"),
        (b'[{"label": "cat"}]', "without `label` and `box` of four numbers"),
        (box(0, 0, 1), "without `label` and `box` of four numbers"),
        (b'[{"label": 3, "box": [0, 0, 1, 1]}]', "without `label`"),
        (b"[3]", "without `label`"),
        (box(0, 0, 1.1, 1), OUTSIDE),
        (box(-0.5, 0, 1, 1), OUTSIDE),
        (box(float("nan"), 0, 1, 1), OUTSIDE),
        (box(0, 0, 1, "1"), OUTSIDE),
        (box(0, 0, 1, True), OUTSIDE),
        (box(0, 0, 10**400, 1), OUTSIDE),
        (box(0.5, 0, 0.5, 1), FLAT),
        (box(0, 1, 1, 0.5), FLAT),
        (b'[{"label": "bird", "box": [0, 0, 1, 1]}]', "label 'bird' in .boxes.json is no class"),
    ],
)
def test_boxes_that_cannot_be_are_named(payload: bytes, reason: str) -> None:
    rule = AnnotationRule(boxes=True, labels=Labels(boxes=("cat",)))
    check(rule, {BOXES: box(0, 0, 1, 1)})
    with pytest.raises(BadSampleError) as error:
        check(rule, {BOXES: payload})
    assert reason in str(error.value)


def test_a_box_that_passes_an_edge_by_rounding_is_clipped() -> None:
    payload = json.dumps([{"label": "cat", "box": [-0.0005, 0, 0.5, 1.0005]}]).encode()
    assert decode_boxes(payload) == [Box("cat", 0.0, 0.0, 0.5, 1.0)]


GREY = np.zeros((8, 8), np.uint8)
WRONG_MAPS = {
    "8x4 beside an image of 8x8": encode_map(GREY[:4]),
    "image is PNG of mode RGB, not PNG of mode L or P": encoded(np.zeros((8, 8, 3), np.uint8)),
    "of mode I;16": encoded(GREY.astype(np.uint16)),
    "of mode 1": encoded(GREY, "1"),
    "of mode LA": encoded(GREY, "LA"),
    "image cannot be decoded (OSError)": annotations(1)[MAP][:-30],
    "image cannot be decoded (UnidentifiedImageError)": b"GIF89a",
    "label 3 in .map.png: the classes are 0 to 2": encode_map(GREY + 3),
}


@pytest.mark.parametrize("reason", WRONG_MAPS)
def test_maps_that_cannot_be_are_named(reason: str) -> None:
    rule = AnnotationRule(maps=True, labels=Labels(maps=("sky", "sea", "sand")))
    assert check(rule, {MAP: encode_map(GREY + 2)}).maps == 3
    with pytest.raises(BadSampleError) as error:
        check(rule, {MAP: WRONG_MAPS[reason]})
    assert reason in str(error.value)


@pytest.mark.parametrize("missing", [MAP, BOXES])
def test_what_is_asked_for_must_be_there(missing: str) -> None:
    members = annotations(1)
    check(RULE, members)
    del members[missing]
    with pytest.raises(BadSampleError, match=f"no .{missing}"):
        check(RULE, members)
    check(AnnotationRule(maps=missing != MAP, boxes=missing != BOXES), members)


def test_classes_are_those_that_are_known_or_found() -> None:
    found = check(RULE, annotations(1))
    found.add(["ant"], 3)
    maps = [str(number) for number in range(found.maps)]
    assert found.maps == 16
    assert RULE.named(found) == Labels(maps, ["ant", "cat", "dog"])
    known = Labels(("sky",), ("dog", "cat"))
    assert AnnotationRule(maps=True, boxes=True, labels=known).named(found) == known
    assert AnnotationRule(maps=True).named(found) == Labels(maps, ())


def test_names_of_classes_come_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("sky\n sea \nsand\n")
    path = str(tmp_path / "names.txt")
    assert read_names(Path(path)) == ["sky", "sea", "sand"]
    source = SourceConfig(map_classes=path)
    config = data_config(tmp_path, maps=True, source=source)
    assert AnnotationRule.of(config, Labels(("other",), ("x",))).labels == Labels(
        ("sky", "sea", "sand"), ("x",)
    )
    for text, problem in (("a\n\nb", "line 2 is no name"), ("a\na", "line 2 is a repeated name")):
        (tmp_path / "names.txt").write_text(text)
        with pytest.raises(ValueError, match=rf"data\.source\.map_classes: .*{problem}"):
            AnnotationRule.of(config)
    (tmp_path / "names.txt").write_text("\n".join(map(str, range(257))))
    with pytest.raises(ValueError, match=r"data\.source\.map_classes: 257 classes"):
        AnnotationRule.of(config)
    config.source.map_classes = str(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"data\.source\.map_classes: no file at"):
        AnnotationRule.of(config)
