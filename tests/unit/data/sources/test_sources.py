"""Raw data: every image with its caption once, in a fixed order, and a reason for each left out."""

import json
import math
import os
import zlib
from pathlib import Path

import emoji
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from data.config import SourceConfig, SourceKind
from data.shards import splits
from data.shards.manifest import Rejected
from data.sources import emoji_names
from data.sources.folder import FolderSource
from data.sources.openmoji import OpenMojiSource
from data.sources.samples import NotChosen, RawSample, hash_share
from data.sources.sources import open_source
from tests.support.data_sets import data_config, pixels_of, png


def folder_source(folder: Path) -> FolderSource:
    source = open_source(data_config(folder, source=SourceConfig(path=str(folder))))
    assert isinstance(source, FolderSource)
    return source


def read(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Captions and reasons by name."""
    source = folder_source(folder)
    items = list(source)
    assert len(items) == len(source)
    captions = {item.name: item.caption for item in items if isinstance(item, RawSample)}
    reasons = {item.key: item.reason for item in items if isinstance(item, Rejected)}
    assert list(captions) == sorted(captions)
    return captions, reasons


def test_a_folder_with_captions_beside_the_images(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for number, name in enumerate(["b.png", "a.PNG", "deep/c.png"]):
        (tmp_path / name).write_bytes(png(number))
        (tmp_path / name).with_suffix(".txt").write_text(f" caption {number}\n")
    (tmp_path / "lonely.png").write_bytes(png(3))
    (tmp_path / "broken.png").write_bytes(png(4)[:60])
    (tmp_path / "broken.txt").write_text("broken")
    (tmp_path / "latin.png").write_bytes(png(5))
    (tmp_path / "latin.txt").write_bytes(b"\xff")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "gone.txt").write_text("gone")
    captions, reasons = read(tmp_path)
    assert captions == {
        "a.PNG": "caption 1",
        "b.png": "caption 0",
        "deep/c.png": "caption 2",
        "latin.png": "\ufffd",
    }
    assert reasons.keys() == {"lonely.png", "broken.png", "gone.png"}
    assert reasons["lonely.png"] == "no caption"
    assert "cannot be decoded" in reasons["broken.png"]
    assert "cannot be read" in reasons["gone.png"]


def test_a_raw_sample_keeps_the_original_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(0, size=9))
    (tmp_path / "a.txt").write_text("x")
    (sample,) = folder_source(tmp_path)
    assert isinstance(sample, RawSample)
    assert (sample.image, sample.extension) == (png(0, size=9), "png")
    assert (sample.width, sample.height) == (9, 9)
    assert sample.draw == splits.draws([len(sample.image)], [zlib.crc32(sample.image)]).item()


@pytest.mark.parametrize("table", ["captions.csv", "captions.parquet", "metadata.jsonl"])
def test_a_folder_with_a_table(tmp_path: Path, table: str) -> None:
    for number, name in enumerate(["a.png", "b.png", "c.png"]):
        (tmp_path / name).write_bytes(png(number))
    (tmp_path / "c.txt").write_text("beside")
    rows = [("a.png", 'a "quoted", café'), ("b.png", ""), ("missing.png", "x")]
    if table == "captions.csv":
        lines = [
            "file_name,text",
            *(f'{name},"{text.replace(chr(34), chr(34) * 2)}"' for name, text in rows),
        ]
        (tmp_path / table).write_text("\n".join(lines) + "\n", "utf-8-sig")
    elif table == "metadata.jsonl":
        lines = [json.dumps({"file_name": name, "text": text}) for name, text in rows]
        (tmp_path / table).write_text("\n".join(lines) + "\n", "utf-8")
    else:
        names, texts = zip(*rows, strict=True)
        parquet.write_table(pa.table({"file_name": names, "text": texts}), tmp_path / table)
    captions, reasons = read(tmp_path)
    assert captions == {"a.png": 'a "quoted", café', "c.png": "beside"}
    assert reasons == {"b.png": "no caption", "missing.png": "captioned, but no such image"}


def test_tables_carry_other_fields_and_the_last_word_has_the_jsonl(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        (tmp_path / name).write_bytes(png(0))
    (tmp_path / "captions.csv").write_text("file_name,text,score\na.png,csv,1\nb.png,csv,2\n")
    columns = {
        "file_name": ["b.png", "c.png"],
        "text": ["parquet", None],
        "score": [0.5, math.nan],
        "picture": [b"x", b"y"],
        "words": [["x"], []],
    }
    parquet.write_table(pa.table(columns), tmp_path / "captions.parquet")
    line = {"file_name": "c.png", "text": "jsonl", "score": None, "ok": True, "deep": {"x": 1}}
    line |= {"captions": ["one", "two"], "words": ["x"]}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line))
    samples = [sample for sample in folder_source(tmp_path) if isinstance(sample, RawSample)]
    assert [(sample.caption, sample.metadata) for sample in samples] == [
        ("csv", {"score": "1"}),
        ("parquet", {"score": 0.5, "words": ["x"]}),
        ("jsonl", {"ok": True, "deep": {"x": 1}, "captions": ["one", "two"], "words": ["x"]}),
    ]


@pytest.mark.parametrize(
    ("table", "text", "message"),
    [
        (
            "captions.csv",
            "image;caption\na.png;x\n",
            r"no column data\.source\.file_field=file_name and none "
            r"data\.source\.caption_field=text; its columns are image, caption",
        ),
        ("captions.parquet", "PAR1 and no more", "Parquet"),
        (
            "metadata.jsonl",
            '{"file_name": "a.png", "text": "x"}\n{"file": 1}\n',
            r"line 2: it has no column data\.source\.file_field=file_name; its columns are file",
        ),
        ("metadata.jsonl", "[]\n", "line 1"),
        ("metadata.jsonl", "[" * 100_000 + "\n", "line 1"),
    ],
)
def test_a_table_that_cannot_be_read_is_named(
    tmp_path: Path, table: str, text: str, message: str
) -> None:
    (tmp_path / "a.png").write_bytes(png(0))
    (tmp_path / table).write_text(text)
    with pytest.raises(ValueError, match=rf"{table}.*{message}"):
        folder_source(tmp_path)


def test_a_table_without_its_columns_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(0))
    parquet.write_table(pa.table({"file_name": ["a.png"]}), tmp_path / "captions.parquet")
    with pytest.raises(ValueError, match=r"captions\.parquet: .*no column .*caption_field=text"):
        folder_source(tmp_path)


def test_files_that_are_no_files_and_names_that_are_no_text_are_rejected(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for name in (b"\xff.png", b"\xff.txt"):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(png(0))
    for name in ("pipe.txt", "long.txt"):
        (tmp_path / name).write_text("x")
    (tmp_path / "long.png").write_bytes(png(0))
    (tmp_path / "long.txt").write_text("x" * 2**17)
    captions, reasons = read(tmp_path)
    assert captions == {}
    assert reasons == {
        "pipe.png": "not read: this is no regular file, and is not opened",
        "\ufffd.png": "file name is not UTF-8 text",
        "long.png": "text of 65537 bytes is over 65536",
    }
    assert len(folder_source(tmp_path).fingerprint()) == 64


def test_links_that_lead_out_of_the_folder_are_rejected_with_a_reason(tmp_path: Path) -> None:
    source, secret = tmp_path / "source", tmp_path / "secret.txt"
    source.mkdir()
    secret.write_text("TOPSECRET")
    for number, name in enumerate("abc"):
        (source / f"{name}.png").write_bytes(png(number))
        (source / f"{name}.txt").write_text(name)
    (tmp_path / "private.png").write_bytes(png(9))
    (source / "d.png").symlink_to("../private.png")
    (source / "d.txt").write_text("d")
    (source / "b.txt").unlink()
    (source / "b.txt").symlink_to(secret)
    (source / "c.txt").unlink()
    (source / "c.txt").symlink_to("a.txt")
    (tmp_path / "more").mkdir()
    (source / "more").symlink_to("../more")
    captions, reasons = read(source)
    assert captions == {"a.png": "a", "c.png": "a"}
    assert reasons.keys() == {"b.png", "d.png", "more"}
    assert "leads out" in reasons["b.png"] and "leads out" in reasons["d.png"]
    assert reasons["more"].startswith("a link to a folder, which is not followed")


@pytest.mark.parametrize("name", ["captions.csv", "captions.parquet", "metadata.jsonl"])
@pytest.mark.parametrize("kind", ["link", "fifo"])
def test_a_table_is_a_file_of_the_folder(tmp_path: Path, name: str, kind: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.png").write_bytes(png(0))
    if kind == "link":
        (tmp_path / "secret").write_text("file_name,text\na.png,TOPSECRET\n")
        (source / name).symlink_to("../secret")
    else:
        os.mkfifo(source / name)
    with pytest.raises(OSError, match=name):
        folder_source(source)


def test_a_line_without_an_end_is_not_read_whole(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(0))
    (tmp_path / "metadata.jsonl").write_text("\0")
    os.truncate(tmp_path / "metadata.jsonl", 2**40)
    with pytest.raises(ValueError, match=r"metadata\.jsonl, line 1: JSON of \d+ bytes is over"):
        folder_source(tmp_path)


def test_a_folder_that_is_missing_or_empty_is_named(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(FileNotFoundError, match=r"data\.source\.path: no"):
            folder_source(folder)
    with pytest.raises(FileNotFoundError, match=r"data\.source\.path"):
        open_source(data_config(tmp_path))


def test_the_fingerprint_of_a_folder_follows_its_files(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(0))
    prints = [folder_source(tmp_path).fingerprint() for _ in range(2)]
    (tmp_path / "a.txt").write_text("x")
    prints.append(folder_source(tmp_path).fingerprint())
    assert prints[0] == prints[1] != prints[2]


def codes(text: str) -> list[int]:
    return [ord(character) for character in text]


@pytest.mark.parametrize(
    ("shortcode", "caption", "concept"),
    [
        (":woman_firefighter:", "woman firefighter", "firefighter"),
        (":man_firefighter:", "man firefighter", "firefighter"),
        (":firefighter:", "firefighter", "firefighter"),
        (
            ":woman_firefighter_medium-dark_skin_tone:",
            "woman firefighter, medium-dark skin tone",
            "firefighter",
        ),
        (
            ":men_holding_hands_light_skin_tone_dark_skin_tone:",
            "men holding hands, light and dark skin tones",
            "holding hands",
        ),
        (":man_light_skin_tone_red_hair:", "man with red hair, light skin tone", "red hair"),
        (":woman_beard:", "woman with a beard", "beard"),
        (":kiss_woman_man:", "kiss, woman and man", "kiss"),
        (":family_man_woman_girl_boy:", "family, man, woman, girl and boy", "family"),
        (":man_running_facing_right:", "man running facing right", "running"),
        (":mermaid:", "mermaid", "merperson"),
        (":woman:", "woman", "person"),
        (":France:", "flag of France", "flag of France"),
        (":Scotland:", "flag of Scotland", "flag of Scotland"),
        (":fork_and_knife:", "fork and knife", "fork knife"),
    ],
)
def test_emoji_are_named_in_plain_english(shortcode: str, caption: str, concept: str) -> None:
    characters = codes(emoji.emojize(shortcode))
    name = emoji_names.plain_name(characters)
    assert emoji_names.caption_of(characters) == caption
    assert name is not None
    assert emoji_names.concept(name) == concept


def test_code_points_without_a_name_have_none() -> None:
    for text in ("A", "\ue000", "\U0001f1e6", "🐶🐱"):
        assert emoji_names.plain_name(codes(text)) is None
        assert emoji_names.caption_of(codes(text)) is None


def test_openmoji(tmp_path: Path) -> None:
    source = OpenMojiSource(
        data_config(
            tmp_path,
            image_size=32,
            source=SourceConfig(kind=SourceKind.openmoji, skin_tone_share=0.1),
        )
    )
    everything = OpenMojiSource(
        data_config(tmp_path, image_size=32, source=SourceConfig(kind=SourceKind.openmoji))
    )
    assert len(source) == len(everything)
    assert source.fingerprint() != everything.fingerprint()
    assert "CC BY-SA 4.0" in source.licence
    first = [item for item, _ in zip(source, range(60), strict=False)]
    left_out = {item.reason for item in first if isinstance(item, NotChosen)}
    samples = [item for item in first if isinstance(item, RawSample)]
    assert left_out <= {"code points without a name", "data.source.skin_tone_share"}
    assert samples[0].caption == "keycap #"
    pixels = pixels_of(samples[0].image)
    assert pixels.shape == (32, 32, 3)
    assert np.all(pixels[0, 0] == 255)
    assert pixels.min() < 50


def test_hash_shares_are_uniform_and_fixed() -> None:
    shares = [hash_share(str(number)) for number in range(4000)]
    assert abs(np.mean(np.array(shares) < 0.1) - 0.1) < 0.02
    assert hash_share("cat") == pytest.approx(0.46752116347640477)


def test_captions_may_be_missing_where_no_model_reads_them(tmp_path: Path) -> None:
    (tmp_path / "lonely.png").write_bytes(png(3))
    options = SourceConfig(path=str(tmp_path), require_captions=False)
    (sample,) = open_source(data_config(tmp_path, source=options))
    assert isinstance(sample, RawSample)
    assert sample.caption == ""
