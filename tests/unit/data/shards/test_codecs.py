"""Decoders: faithful on sound members, one kind of error on all others, and nothing executed."""

import io
import json
import pickle
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from data.shards import codecs, formats
from data.shards.codecs import (
    BadSampleError,
    decode_image,
    decode_json,
    decode_npy,
    decode_text,
    encode_npy,
    encode_png,
    image_size,
)
from data.shards.transforms import crop_box, square
from data.storage import documents
from tests.support.pictures import HEIC_START, chunk, encoded


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def test_png_round_trips_exactly_and_jpeg_and_webp_decode() -> None:
    image = noise(9, 5)
    np.testing.assert_array_equal(decode_image(encode_png(image)), image)
    assert encode_png(image) == encode_png(image.copy())
    for image_format in ("JPEG", "WEBP"):
        assert decode_image(encoded(image, image_format)).size == (9, 5)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_becomes_white(mode: str) -> None:
    image = Image.new(mode, (2, 2), 0)
    assert decode_image(encoded(image, "PNG")).getpixel((0, 0)) == (255, 255, 255)


def test_a_transparent_palette_becomes_white() -> None:
    image = Image.new("P", (2, 2), 0)
    image.putpalette([10, 20, 30])
    payload = encoded(image, "PNG", transparency=0)
    assert decode_image(payload).getpixel((0, 0)) == (255, 255, 255)


def test_images_come_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(encoded(noise(8, 4), "JPEG", exif=exif)).size == (4, 8)


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(["PNG", "JPEG", "WEBP"]),
    st.integers(1, 9),
    st.tuples(st.integers(1, 30), st.integers(1, 30)),
)
def test_the_size_in_the_header_is_that_of_the_decoded_image(
    image_format: str, orientation: int, size: tuple[int, int]
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    for options in ({}, {"exif": exif}):
        payload = encoded(noise(*size), image_format, **options)
        assert image_size(payload) == decode_image(payload).size


def test_the_size_is_read_without_the_pixels() -> None:
    payload = encoded(noise(100, 50), "PNG")
    assert image_size(payload[:60]) == (100, 50)
    with pytest.raises(BadSampleError, match="cannot be decoded"):
        image_size(payload[:20])


def test_a_file_over_the_size_cap_is_no_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codecs, "MAX_IMAGE_BYTES", 100)
    for read in (decode_image, image_size):
        with pytest.raises(BadSampleError, match="over 100"):
            read(encoded(noise(20, 20), "PNG"))


@pytest.mark.filterwarnings("ignore:Image size")
def test_a_picture_over_the_pixel_cap_is_refused_before_it_is_decoded() -> None:
    header = struct.pack(">IIBBBBB", 2**14, 2**13, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IEND", b"")
    with pytest.raises(BadSampleError, match="16384x8192"):
        decode_image(bomb)


def damaged(payload: bytes, data: st.DataObject) -> bytes:
    """The payload with a few bytes changed, cut off anywhere."""
    changed = bytearray(payload)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    return bytes(changed[: data.draw(st.integers(0, len(payload)))])


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_a_damaged_image_is_a_bad_sample_and_nothing_worse(data: st.DataObject) -> None:
    kinds = {**dict.fromkeys(formats.OF_PILLOW, b""), "HEIF": HEIC_START, "JXL": formats.JXL_STREAM}
    image_format = data.draw(st.sampled_from(list(kinds)))
    formats.readers(kinds[image_format])  # a plugin also writes
    payload = encoded(noise(12, 12), image_format)
    try:
        image = decode_image(damaged(payload, data))
    except BadSampleError:
        return
    assert image.mode == "RGB"


@settings(deadline=None, max_examples=60)
@given(
    hnp.arrays(
        st.sampled_from([np.float16, np.float32, np.int64, np.uint8]),
        hnp.array_shapes(min_dims=0, max_dims=4, max_side=5),
    )
)
def test_arrays_round_trip_and_are_not_copied(array: np.ndarray) -> None:
    payload = encode_npy(array)
    decoded = decode_npy(payload)
    np.testing.assert_array_equal(decoded, array)
    assert decoded.dtype == array.dtype
    assert not decoded.flags.owndata


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a pickle was executed",))


def test_arrays_with_python_objects_are_refused_without_being_unpickled() -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([Payload()], object), allow_pickle=True)
    for payload in (buffer.getvalue(), pickle.dumps(Payload())):
        with pytest.raises(BadSampleError):
            decode_npy(payload)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_damaged_arrays_are_bad_samples_and_nothing_worse(data: st.DataObject) -> None:
    payload = encode_npy(np.zeros((2, 3), np.float16))
    try:
        array = decode_npy(damaged(payload, data))
    except BadSampleError:
        return
    assert array.nbytes <= len(payload)


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f2', 'fortran_order': True, 'shape': (4, 6)}",
        "{'descr': '<f2', 'fortran_order': False, 'shape': (-4, -6)}",
        "{'descr': '<f2', 'fortran_order': False, 'shape': (99999999, 99999999)}",
        "{'descr': '|O', 'fortran_order': False, 'shape': (6,)}",
        "{'descr': '|S0', 'fortran_order': False, 'shape': (6,)}",
        "{'descr': [], 'fortran_order': False, 'shape': (6,)}",
        "{'descr': '|S48', 'fortran_order': False, 'shape': (True,)}",
        "{'descr': '|S48', 'fortran_order': False, 'shape': " + f"({'1,' * 65})" + "}",
        "__import__('os').abort()",
    ],
)
def test_hostile_array_headers_are_refused(header: str) -> None:
    text = header.encode().ljust(245) + b"\n"
    payload = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(48)
    with pytest.raises(BadSampleError):
        decode_npy(payload)


@pytest.mark.parametrize(
    ("descr", "shape", "reason"),
    [
        ("<f2", (0, 10**30), "cannot be formed"),
        ("<f2", (0, 2**62, 4), "cannot be formed"),
        ("|S0", (10**12,), "not plain"),
        ([], (10**12,), "not plain"),
    ],
)
def test_arrays_of_absurd_shapes_and_no_bytes_are_refused(
    descr: object, shape: tuple[int, ...], reason: str
) -> None:
    text = str({"descr": descr, "fortran_order": False, "shape": shape}).encode().ljust(117)
    with pytest.raises(BadSampleError, match=reason):
        decode_npy(b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + text + b"\n")


def test_a_vast_array_header_is_refused_before_it_is_copied() -> None:
    payload = b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**24) + bytes(2**24)
    with pytest.raises(BadSampleError, match="array header of 16777228 bytes"):
        decode_npy(payload)


def test_an_array_over_the_size_cap_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codecs, "MAX_ARRAY_BYTES", 100)
    with pytest.raises(BadSampleError, match="over 100"):
        decode_npy(encode_npy(np.zeros(1)))


def test_text() -> None:
    assert decode_text(" a café \n".encode()) == "a café"
    assert decode_text(b"caf\xe9 ") == "caf\ufffd"
    assert decode_text(b"caf\xe9", "cp1252") == decode_text("café".encode("utf-16")) == "café"
    with pytest.raises(BadSampleError, match="over 65536"):
        decode_text(b"a" * 65537)


def test_json() -> None:
    assert decode_json(b'{"width": 3, "tags": ["a"]}') == {"width": 3, "tags": ["a"]}
    nested = {"leaf": 1}
    for _ in range(documents.MAX_JSON_DEPTH):
        nested = {"next": nested}
    hostile = [
        b"{",
        b"\xff",
        b"[" * 100_000,
        b"9" * 10_000,
        json.dumps(nested).encode(),
        b'"' + b"a" * documents.MAX_JSON_BYTES + b'"',
    ]
    for payload in hostile:
        with pytest.raises(BadSampleError):
            decode_json(payload)
    assert decode_json(json.dumps(nested["next"]).encode()) == nested["next"]


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_the_crop_is_the_largest_centred_square(width: int, height: int) -> None:
    left, top, right, bottom = crop_box(width, height)
    assert right - left == bottom - top == min(width, height)
    assert (left, top) == (width - right, height - bottom)


def test_square_keeps_an_image_of_that_size_and_resizes_others_as_pillow_does() -> None:
    image = noise(12, 12)
    np.testing.assert_array_equal(square(image, 12), image)
    wide = noise(40, 24)
    expected = wide.resize((20, 12), Image.Resampling.BICUBIC).crop((4, 0, 16, 12))
    np.testing.assert_array_equal(square(wide, 12), expected)
