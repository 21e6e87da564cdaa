"""A sample cropped to a square: picture, label map and boxes stay together."""

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from data.config import PixelConfig
from data.shards.annotations import AnnotationRule, Box, encode_boxes, encode_map
from data.shards.codecs import BOXES, MAP, BadSampleError, encode_png
from data.shards.manifest import Kind, Manifest
from data.shards.reader import ShardReader
from data.shards.squares import Square, decode_square
from data.shards.stored import StoredSample
from data.shards.transforms import CENTRE, Crop, square
from data.shards.writer import ShardSetWriter
from tests.support.data_sets import png

RULE = AnnotationRule(maps=True, boxes=True)
SIDE = 16


def stored(folder: Path, members: dict[str, bytes]) -> StoredSample:
    with ShardSetWriter(folder, Kind.images, 1) as writer:
        writer.write({"txt": b"", **members})
    manifest = Manifest(kind=Kind.images, shards=writer.shards)
    (sample,) = ShardReader(str(folder), manifest).find(np.array([0]))
    return sample


def rectangle(size: tuple[int, int], corners: tuple[int, int, int, int]) -> NDArray[np.uint8]:
    """A white rectangle on black: [H, W]."""
    pixels = np.zeros(size[::-1], np.uint8)
    pixels[corners[1] : corners[3], corners[0] : corners[2]] = 255
    return pixels


def members_of(size: tuple[int, int], corners: tuple[int, int, int, int]) -> dict[str, bytes]:
    mask, (width, height) = rectangle(size, corners), size
    left, top, right, bottom = corners
    box = Box("cat", left / width, top / height, right / width, bottom / height)
    return {
        "png": encode_png(Image.fromarray(np.repeat(mask[..., None], 3, -1))),
        MAP: encode_map(mask // 255),
        BOXES: encode_boxes([box]),
    }


def assert_together(found: Square) -> None:
    """The bright pixels, those of class 1 and those of the box are the same ones."""
    assert found.labels is not None
    inside = np.zeros((SIDE, SIDE), bool)
    for box in found.boxes:
        left, top, right, bottom = (round(SIDE * edge) for edge in box[1:])
        inside[top:bottom, left:right] = True
    np.testing.assert_array_equal(found.labels == 1, inside)
    np.testing.assert_array_equal(found.pixels[..., 0] >= 128, inside)


CASES = st.tuples(
    st.sampled_from([(16, 16), (32, 48), (64, 32), (48, 48)]),
    st.tuples(*[st.integers(0, 3)] * 2),
    st.tuples(*[st.integers(1, 3)] * 2),
)


@settings(max_examples=25, deadline=None)
@given(CASES, st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.0, 0.5, 1.0]), st.booleans())
def test_picture_map_and_boxes_are_cropped_together(
    tmp_path_factory: pytest.TempPathFactory,
    case: tuple[tuple[int, int], tuple[int, int], tuple[int, int]],
    x: float,
    y: float,
    mirrored: bool,
) -> None:
    """Corners lie on a grid that both crop and resizing keep, so that no pixel is half covered."""
    size, start, length = case
    unit = min(size) // 4
    left, top = (min(place * unit, edge - unit) for place, edge in zip(start, size, strict=True))
    corners = left, top, min(left + length[0] * unit, size[0]), min(top + length[1] * unit, size[1])
    sample = stored(tmp_path_factory.mktemp("set"), members_of(size, corners))
    found = decode_square(sample, SIDE, PixelConfig(), RULE, crop=Crop(1.0, x, y))
    assert_together(found.mirrored() if mirrored else found)


def test_a_smaller_crop_is_a_part_of_the_picture(tmp_path: Path) -> None:
    sample = stored(tmp_path, members_of((32, 32), (8, 0, 32, 16)))
    found = decode_square(sample, SIDE, PixelConfig(), RULE, crop=Crop(0.5, 1.0, 0.0))
    assert found.boxes == [Box("cat", 0.0, 0.0, 1.0, 1.0)]
    assert found.labels is not None
    assert found.labels.all()
    below = decode_square(sample, SIDE, PixelConfig(), RULE, crop=Crop(0.5, 1.0, 1.0))
    assert below.boxes == []
    assert below.labels is not None
    assert not below.labels.any()


def test_maps_take_the_nearest_pixel(tmp_path: Path) -> None:
    numbers = np.random.default_rng(0).choice(np.array([0, 200], np.uint8), (40, 40))
    sample = stored(tmp_path, {"png": png(0, 40), MAP: encode_map(numbers)})
    found = decode_square(sample, SIDE, PixelConfig(), AnnotationRule(maps=True)).labels
    assert found is not None
    places = ((np.arange(SIDE) + 0.5) * 40 / SIDE).astype(int)
    np.testing.assert_array_equal(found, numbers[np.ix_(places, places)])


def test_nothing_more_is_read_than_asked_for(tmp_path: Path) -> None:
    sample = stored(tmp_path, {"png": png(0, SIDE), MAP: b"no map", BOXES: b"no boxes"})
    found = decode_square(sample, SIDE, PixelConfig(), AnnotationRule())
    assert (found.labels, found.boxes) == (None, [])
    with pytest.raises(BadSampleError, match=r"\.map\.png: image cannot be decoded"):
        decode_square(sample, SIDE, PixelConfig(), AnnotationRule(maps=True))


def test_the_centre_is_the_crop_of_the_default() -> None:
    image = Image.open(io.BytesIO(png(1, 24))).crop((0, 0, 24, 18))
    assert Crop(1.0, 0.5, 0.5) == CENTRE
    expected = image.resize((8, 8), Image.Resampling.BICUBIC, (3, 0, 21, 18))
    np.testing.assert_array_equal(square(image, 8), np.asarray(expected))
