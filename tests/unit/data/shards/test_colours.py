"""Colours: one path from any mode, depth and profile to 8-bit sRGB, as libvips has it."""

import io
import struct
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageCms
from skimage.color import deltaE_ciede2000, rgb2lab

from data.config import PixelConfig, Truncated
from data.shards import codecs, formats
from data.shards.codecs import BROKEN_EXIF, CUT_OFF, BadSampleError, decode_image, image_size
from data.shards.colours import BROKEN_PROFILE
from data.shards.transforms import transform_name
from tests.support.pictures import (
    BROKEN,
    DISPLAY_P3,
    HEIC_START,
    SRGB,
    chunk,
    corpus,
    decode_by_vips,
    deep,
    encoded,
    layers,
    scene,
    turned,
)
from trainer.cli import load_config

GREY = np.repeat((deep() >> 8).astype(np.uint8)[..., None], 3, axis=-1)
"""The ramp of 16 bits in 8 bits of RGB."""


def pixels(payload: bytes, **options: Any) -> NDArray[np.uint8]:
    return np.asarray(decode_image(payload, PixelConfig(**options)))


def test_every_picture_has_the_colours_that_libvips_shows() -> None:
    count, worst, deepest = 0, 0, 0.0
    for name, payload in corpus():
        mine, other = np.asarray(decode_image(payload)), decode_by_vips(payload)
        assert mine.shape == other.shape, name
        assert image_size(payload) == (mine.shape[1], mine.shape[0]), name
        most = int(np.abs(mine.astype(int) - other).max())
        difference = deltaE_ciede2000(rgb2lab(mine), rgb2lab(other)).max()
        print(f"{name:44} greatest difference {most}, ΔE2000 {difference:.2f}")
        assert most <= 2 and difference < 1, name
        count, worst, deepest = count + 1, max(worst, most), max(deepest, difference)
    print(f"{count} files: greatest difference {worst} of 255, greatest ΔE2000 {deepest:.2f}")
    assert count >= 70


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA"])
def test_bmp(mode: str) -> None:
    layer = layers()[mode]  # Pillow writes no opacity
    np.testing.assert_array_equal(pixels(encoded(layer, "BMP")), layer.convert("RGB"))


def test_colours_of_prints_and_of_light_without_a_profile() -> None:
    cmyk = np.asarray(layers()["CMYK"], float) / 255
    ink = (1 - cmyk[..., :3]) * (1 - cmyk[..., 3:]) * 255
    for image_format, most in (("TIFF", 1), ("JPEG", 90)):
        difference = np.abs(pixels(encoded(layers()["CMYK"], image_format)) - ink)
        assert difference.max() <= most and difference.mean() < 3
    light = encoded(scene().convert("YCbCr"), "TIFF")
    assert np.abs(pixels(light).astype(int) - np.asarray(scene())).max() <= 3
    lab = ImageCms.profileToProfile(
        scene(),
        ImageCms.createProfile("sRGB"),
        ImageCms.createProfile("LAB"),
        outputMode="LAB",
    )
    assert lab is not None
    found = pixels(encoded(lab, "TIFF"))
    assert deltaE_ciede2000(rgb2lab(found), rgb2lab(np.asarray(scene()))).max() < 3


@pytest.mark.parametrize(
    "values",
    [
        deep().astype(np.int32),
        deep().astype(np.int32) << 15,
        deep().astype(np.float32) / 65535,
        deep().astype(np.float32) / 257,
        deep().astype(np.float32),
    ],
    ids=["16 of 32 bits", "31 bits", "up to 1", "up to 255", "up to 65535"],
)
def test_32_bits_are_scaled_by_their_range(values: np.ndarray) -> None:
    found = pixels(encoded(Image.fromarray(values), "TIFF"))
    assert np.abs(found.astype(int) - GREY).max() <= 1


def test_unsigned_32_bits_and_12_bits_have_the_white_of_their_depth() -> None:
    def tiff(bits: int, raster: bytes) -> bytes:
        tags = {256: 40, 257: 24, 258: bits, 259: 1, 262: 1, 273: 122, 277: 1, 278: 24}
        tags |= {279: len(raster)}
        entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
        head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
        return head + raster

    assert len(tiff(32, b"")) == 122
    full = tiff(32, (deep().astype("<u4") * 65537).tobytes())
    assert np.abs(pixels(full).astype(int) - GREY).max() <= 1
    twelve = (deep().ravel() >> 4).astype(np.uint32).reshape(-1, 2)
    pairs = twelve[:, 0] << 12 | twelve[:, 1]
    raster = np.stack([pairs >> 16, pairs >> 8 & 255, pairs & 255], -1).astype(np.uint8)
    np.testing.assert_array_equal(pixels(tiff(12, raster.tobytes())), GREY)


@pytest.mark.parametrize("values", [[0, 1.5], [-0.1, 0.5], [0, np.nan], [0, 1e6], [0, np.inf]])
def test_floats_of_an_unknown_range_are_refused(values: list[float]) -> None:
    payload = encoded(Image.fromarray(np.array([values], np.float32)), "TIFF")
    with pytest.raises(BadSampleError, match="have no known white"):
        decode_image(payload)


def test_negative_integers_are_refused() -> None:
    payload = encoded(Image.fromarray(np.array([[-5, 9]], np.int32)), "TIFF")
    with pytest.raises(BadSampleError, match="from -5 to 9 have no known black"):
        decode_image(payload)


def test_the_background_is_an_option() -> None:
    for mode in ("RGBA", "LA"):
        payload = encoded(Image.new(mode, (2, 2), 0), "PNG")
        assert pixels(payload)[0, 0].tolist() == [255, 255, 255]
        assert pixels(payload, background="#102030")[0, 0].tolist() == [16, 32, 48]
    default = load_config(["+experiment=emoji"]).data.pixels
    assert transform_name(64, default) == "centre crop, bicubic to 64"
    other = load_config(["+experiment=emoji", "data.pixels.background='#000000'"]).data.pixels
    assert transform_name(64, other) == "centre crop, bicubic to 64, background #000000"
    with pytest.raises(ValueError, match=r"data\.pixels\.background=white must be .* #rrggbb"):
        load_config(["+experiment=emoji", "data.pixels.background=white"])


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("profile", [BROKEN, SRGB[:200], b"x"], ids=["text", "cut", "byte"])
def test_a_broken_profile_is_counted_and_taken_as_srgb(mode: str, profile: bytes) -> None:
    noted: Counter[str] = Counter()
    plain = encoded(layers()[mode], "JPEG")
    found = decode_image(encoded(layers()[mode], "JPEG", icc_profile=profile), noted=noted)
    np.testing.assert_array_equal(found, decode_image(plain))
    assert noted == {BROKEN_PROFILE: 1}


def test_a_profile_of_other_colours_is_counted_and_a_huge_one_is_not_parsed() -> None:
    noted: Counter[str] = Counter()
    for profile in (DISPLAY_P3, SRGB + bytes(2**22)):
        decode_image(encoded(layers()["CMYK"], "TIFF", icc_profile=profile), noted=noted)
    assert noted == {BROKEN_PROFILE: 2}


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_damaged_profile_never_rejects_a_picture(data: st.DataObject) -> None:
    profile = bytearray(data.draw(st.sampled_from([SRGB, DISPLAY_P3])))
    for _ in range(data.draw(st.integers(1, 6))):
        profile[data.draw(st.integers(0, len(profile) - 1))] = data.draw(st.integers(0, 255))
    payload = encoded(scene(), "PNG", icc_profile=bytes(profile))
    assert decode_image(payload).mode == "RGB"


def test_an_srgb_profile_leaves_the_pixels_alone() -> None:
    payload = encoded(scene(), "PNG", icc_profile=SRGB)
    np.testing.assert_array_equal(pixels(payload), scene())


@pytest.mark.parametrize("exif", [b"Exif\0\0no exif at all", b"Exif\0\0II*\0", b"\0\x08\0\x02"])
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_broken_exif_is_ignored(exif: bytes, image_format: str) -> None:
    noted: Counter[str] = Counter()
    payload = encoded(scene(), image_format, exif=exif)
    assert decode_image(payload, noted=noted).size == image_size(payload) == scene().size
    assert noted in ({}, {BROKEN_EXIF: 1})


def test_exif_after_the_pixels_of_a_png_counts() -> None:
    payload = encoded(scene(), "PNG")
    end = chunk(b"IEND", b"")
    late = payload.removesuffix(end) + chunk(b"eXIf", turned(6).tobytes()[6:]) + end
    assert decode_image(late).size == image_size(late) == (24, 40)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_that_is_cut_off_follows_the_rule(progressive: bool) -> None:
    large = scene().resize((400, 240))
    whole = encoded(large, "JPEG", progressive=progressive)
    cut, noted = whole[: len(whole) * 3 // 4], Counter[str]()
    with pytest.raises(BadSampleError, match=r"cut off \(data\.pixels\.truncated=fill"):
        decode_image(cut)
    found = decode_image(cut, PixelConfig(truncated=Truncated.fill), noted)
    assert noted == {CUT_OFF: 1}
    top = np.abs(np.asarray(found, int)[:120] - np.asarray(large)[:120])
    assert found.size == large.size and top.mean() < 12
    for payload in (whole[:20], encoded(scene(), "PNG")[:90]):
        with pytest.raises(BadSampleError, match="cannot be decoded"):
            decode_image(payload, PixelConfig(truncated=Truncated.fill))


def test_jpeg_xl_and_heic_are_read_by_their_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    colour, layered = scene(), layers()["RGBA"]
    on_white = Image.new("RGBA", layered.size, "white")
    on_white.alpha_composite(layered)
    for head, image_format, options in (
        (b"\xff\x0a", "JXL", {"lossless": True}),
        (b"\0\0\0\x0c", "JXL", {"lossless": True, "use_container": True}),
        (b"\0\0\0", "HEIF", {"quality": -1, "matrix_coefficients": 0, "chroma": 444}),
    ):
        # the plugin has to be loaded before Pillow can write the format
        formats.readers(HEIC_START if image_format == "HEIF" else formats.JXL_STREAM)
        payload = encoded(colour, image_format, **options)
        assert payload.startswith(head) and image_size(payload) == colour.size
        np.testing.assert_array_equal(pixels(payload), colour)
        found = pixels(encoded(layered, image_format, **options)).astype(int)
        assert np.abs(found - np.asarray(on_white.convert("RGB"))).max() <= 1
        monkeypatch.setattr(codecs, "MAX_PIXELS", 100)
        with pytest.raises(BadSampleError, match="image of 40x24 is over"):
            decode_image(payload)
        monkeypatch.undo()


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 300), st.integers(1, 300), st.booleans())
def test_the_header_of_a_jpeg_xl_tells_its_size(width: int, height: int, boxed: bool) -> None:
    formats.readers(formats.JXL_STREAM)
    drawn = Image.new("L", (width, height))
    payload = encoded(drawn, "JXL", use_container=boxed, effort=1)
    assert formats.jxl_size(payload) == (width, height)


def test_a_jpeg_xl_is_turned_once() -> None:
    formats.readers(formats.JXL_STREAM)
    payload = encoded(scene(), "JXL", lossless=True, use_container=True, exif=turned(6).tobytes())
    np.testing.assert_array_equal(pixels(payload), scene())


@pytest.mark.parametrize(
    "payload", [b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n", b"\0\0\0\x1cftypheic"]
)
def test_formats_without_their_plugin_are_named(
    payload: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BadSampleError, match="cannot be decoded"):
        decode_image(payload)
    monkeypatch.setattr(formats, "find_spec", lambda name: None)
    with pytest.raises(BadSampleError, match=r"needs pillow-\S+: pip install -e '\.\[formats\]'"):
        decode_image(payload)


@pytest.mark.parametrize("image_format", ["PPM", "TGA", "ICO", "PCX", "EPS"])
def test_formats_that_are_not_on_the_list_are_refused(image_format: str) -> None:
    with pytest.raises(BadSampleError, match="cannot be decoded"):
        decode_image(encoded(scene(), image_format))


def test_a_picture_without_transparency_is_not_copied() -> None:
    opened = Image.open(io.BytesIO(encoded(scene(), "JPEG")))
    opened.load()
    assert codecs.to_srgb(opened, "#ffffff", Counter()) is opened
