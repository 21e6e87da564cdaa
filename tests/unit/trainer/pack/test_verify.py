"""`verify` and `stats`: every difference is named, and a sound set is shown as it is."""

import dataclasses
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.config import DataConfig, FilterConfig, SourceConfig
from data.shards.codecs import BOXES, IMAGE_EXTENSIONS, MAP, BadSampleError, decode_npy, encode_npy
from data.shards.manifest import Kind, Manifest, Shard
from data.shards.reader import ShardReader
from data.shards.writer import ShardSetWriter
from tests.support.annotated import annotations
from tests.support.data_sets import SIZE, data_config, png
from trainer.cli import load_config
from trainer.pack.job import pack
from trainer.pack.stats import MAX_MEASURED, even_sample
from trainer.pack.verify import differences_of

config = load_config(["+experiment=emoji_autoencoder", "pack.max_rejected=1"])
DataSet = Callable[..., DataConfig]


def run(data: DataConfig, **options: bool) -> None:
    pack(dataclasses.replace(config, data=data, **options))


def change(path: Path, position: int, mask: int = 1) -> None:
    payload = bytearray(path.read_bytes())
    payload[position] ^= mask
    path.write_bytes(payload)


def place(data: DataConfig, number: int, extension: str) -> tuple[Path, int]:
    """The file and the offset of a sample's member."""
    manifest = Manifest.load(data.train, option="data.train")
    (stored,) = ShardReader(data.train, manifest).find(np.array([number]))
    offset = int(stored.shard.index[extension]["offset"][stored.row])
    return Path(data.train) / stored.shard.name, offset


def test_sound_sets_are_verified(
    image_set: DataSet, latent_set: DataSet, capsys: pytest.CaptureFixture[str]
) -> None:
    data = image_set()
    latent_set(samples=9)
    run(data, verify=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("data.train: verified: 3 shards, 20 samples, ")
    assert lines[1].startswith("data.latents: verified: 2 shards, 9 samples, ")


@pytest.mark.parametrize("workers", [1, 2])
def test_every_difference_has_a_line(
    image_set: DataSet, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    data = image_set(samples=34, source=SourceConfig(workers=workers))
    change(*place(data, 4, "txt"))
    change(*place(data, 3, "png"))
    change(place(data, 8, "png")[0], place(data, 8, "png")[1] - 500)
    folder = Path(data.train)
    (folder / "000002.tar").unlink()
    index = folder / "000003.tar.index.npy"
    index.write_bytes(index.read_bytes()[:-30])
    cut = folder / "000004.tar"
    cut.write_bytes(cut.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"verify: 15 differences in data\.train"):
        run(data, verify=True)
    lines = [line.removeprefix("data.train: ") for line in capsys.readouterr().out.splitlines()]
    size = Manifest.load(folder, option="data.train").shards[4].size_bytes
    assert lines == [
        "000000.tar: other bytes than those of the manifest",
        "000000.tar: sample 000000003: .png not as indexed",
        "000000.tar: sample 000000004: .txt not as indexed",
        "000001.tar: other bytes than those of the manifest",
        f"000001.tar: sample 000000008: no {' or '.join(IMAGE_EXTENSIONS)}",
        f"000002.tar: cannot be read: [Errno 2] No such file or directory: '{folder}/000002.tar'",
        "000003.tar: its index is not that of the manifest",
        "000003.tar: its index cannot be read",
        f"000004.tar: 1000 bytes, not {size}",
        "000004.tar: sample 000000028: no txt or cls",
        *(f"000004.tar: sample {number:09d}: not in the tar" for number in range(29, 33)),
        "000004.tar: and 1 samples more",
    ]


def test_an_edited_manifest_is_a_difference(
    image_set: DataSet, capsys: pytest.CaptureFixture[str]
) -> None:
    data = image_set()
    path = Path(data.train) / "manifest.json"
    path.write_text(path.read_text().replace('"samples": 7', '"samples": 6', 1))
    with pytest.raises(ValueError, match="verify: 1 differences"):
        run(data, verify=True)
    assert "its hash is not the one it states" in capsys.readouterr().out


def one_shard(image_set: DataSet, samples: int) -> tuple[DataConfig, Manifest, Shard]:
    """Images in a single shard."""
    data = image_set(samples=samples)
    manifest = Manifest.load(data.train, option="data.train")
    (shard,) = manifest.shards
    return data, manifest, shard


def test_a_forged_index_is_a_difference_though_all_hashes_agree(image_set: DataSet) -> None:
    data, manifest, shard = one_shard(image_set, 5)
    index = decode_npy((Path(data.train) / shard.index_name).read_bytes()).copy()
    index["txt"][1], index["png"]["crc"][2] = index["txt"][0], 7
    forged = replace_index(data, manifest, index[[0, 1, 2, 3]])
    found = differences_of(data.train, forged, forged.shards[0])
    assert found == [
        "sample 000000001: .txt not as indexed",
        "sample 000000002: .png not as indexed",
        "sample 000000004: not indexed",
    ]
    index["key"][3] = b"\xff"
    forged = replace_index(data, manifest, index)
    (found,) = differences_of(data.train, forged, forged.shards[0])
    assert found == "its index cannot be read"


@pytest.mark.parametrize(("option", "member"), [("maps", MAP), ("boxes", BOXES)])
def test_a_sample_without_its_annotation_is_a_difference_though_all_hashes_agree(
    image_set: DataSet, option: str, member: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def more(number: int) -> dict[str, bytes]:
        return {name: value for name, value in annotations(number).items() if number != 3}

    data = image_set(samples=5, more=more)
    run(data, verify=True)
    with pytest.raises(ValueError, match=r"verify: 1 differences in data\.train"):
        run(dataclasses.replace(data, **{option: True}), verify=True)
    line = f"data.train: 000000.tar: sample 000000003: no {member}"
    assert line in capsys.readouterr().out.splitlines()


def replace_index(data: DataConfig, manifest: Manifest, index: np.ndarray) -> Manifest:
    import hashlib

    payload = encode_npy(index)
    (shard,) = manifest.shards
    (Path(data.train) / shard.index_name).write_bytes(payload)
    digest = hashlib.sha256(payload).hexdigest()
    shard = dataclasses.replace(shard, samples=len(index), index_sha256=digest)
    return dataclasses.replace(manifest, shards=[shard])


def test_what_filters_left_out_is_no_difference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = tmp_path / "raw"
    with ShardSetWriter(raw, Kind.images, 9) as writer:
        for number in range(20):
            facts = json.dumps({"x": number}).encode()
            writer.write({"png": png(number), "txt": b"t", "json": facts})
    data = data_config(tmp_path, filters=[FilterConfig(name="x", min=3, max=15)])
    data.source.kind, data.source.path = data.source.kind.webdataset, str(raw)
    run(data)
    run(data, verify=True)
    assert "data.train: verified: 3 shards, 13 samples" in capsys.readouterr().out


def test_any_changed_byte_is_found_by_verify_and_never_read(image_set: DataSet) -> None:
    """512 places of a shard: headers, payloads, paddings and the end."""
    data, manifest, shard = one_shard(image_set, 7)
    path = Path(data.train) / shard.name
    whole = path.read_bytes()
    members = read_members(data, manifest)
    draws = random.Random(0)
    damaged = 0
    for position in draws.sample(range(len(whole)), 512):
        change(path, position, 1 << draws.randrange(8))
        assert "other bytes than those of the manifest" in differences_of(
            data.train, manifest, shard
        )
        found = read_members(data, manifest)
        for name, payload in members.items():
            assert found[name] in (payload, b"")
        lost = sum(payload == b"" for payload in found.values())
        assert lost == any(
            start <= position < start + len(payload) for (start, _), payload in members.items()
        )
        damaged += lost
        path.write_bytes(whole)
    assert 30 < damaged < 512


def read_members(data: DataConfig, manifest: Manifest) -> dict[tuple[int, str], bytes]:
    """(offset, extension) → payload, or nothing if it is refused."""
    found = {}
    for stored in ShardReader(data.train, manifest).find(np.arange(manifest.samples)):
        for extension in ("png", "txt"):
            offset = int(stored.shard.index[extension]["offset"][stored.row])
            try:
                found[offset, extension] = bytes(stored.payload(extension))
            except BadSampleError:
                found[offset, extension] = b""
    return found


def test_nothing_to_look_at_is_an_error(tmp_path: Path) -> None:
    for options in ({"verify": True}, {"stats": True}):
        with pytest.raises(ValueError, match=r"no data set at .*train.*: run trainer\.pack first"):
            run(data_config(tmp_path), **options)


def rows(text: str) -> dict[str, list[str]]:
    """Label → values of the printed table, where two spaces or more stand between them."""
    found = {}
    for line in text.splitlines():
        label, *values = [part.strip() for part in line.split("  ") if part.strip()]
        found.setdefault(label, values)
    return found


def test_stats_show_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    for number, (width, height) in enumerate([(20, 10), (30, 60), (12, 12), (40, 40)]):
        Image.new("RGB", (width, height), (255, 0, 0)).save(raw / f"{number}.png")
        (raw / f"{number}.txt").write_text("ü" * (number + 1))
    (raw / "lonely.png").write_bytes(png(0))
    data = data_config(tmp_path, source=SourceConfig(path=str(raw)))
    data.filters = [FilterConfig(name="width", max=35)]
    run(data)
    capsys.readouterr()
    run(data, stats=True)
    table = rows(capsys.readouterr().out)
    assert table["samples"] == ["3"]
    assert table["shards"] == ["1"]
    assert table["width (px)"] == ["12", "20", "30"]
    assert table["height (px)"] == ["10", "12", "60"]
    assert table["aspect"] == ["1.00", "2.00", "2.00"]
    assert table["caption (characters)"] == ["1", "2", "3"]
    assert table["found"] == ["5"]
    assert table["rejected"] == ["1", "no caption", "lonely.png"]
    assert table["dropped by a filter"] == ["1", "width <= 35 (3 kept)"]
    sheet = Image.open(Path(data.train) / "contact_sheet.png")
    assert table["contact sheet"] == [str(Path(data.train) / "contact_sheet.png")]
    red = (np.asarray(sheet) == (255, 0, 0)).all(-1)
    assert [red[:, part * 152 : part * 152 + 152].any() for part in range(4)] == [1, 1, 1, 0]


def test_stats_count_what_cannot_be_read(
    image_set: DataSet, capsys: pytest.CaptureFixture[str]
) -> None:
    data = image_set()
    change(*place(data, 4, "png"))
    run(data, stats=True)
    table = rows(capsys.readouterr().out)
    assert table["unreadable"] == ["1", "the checksum of .png does not match"]
    assert table["width (px)"] == [str(SIZE)] * 3


def test_stats_show_latents(latent_set: DataSet, capsys: pytest.CaptureFixture[str]) -> None:
    data = latent_set()
    run(data, stats=True)
    table = rows(capsys.readouterr().out)
    assert (table["samples"], table["shape"]) == (["20"], ["4 x 2 x 2"])
    assert (table["channel 3"], table["encoder"]) == (["0.0000", "1.0000"], ["e"])


def test_a_large_set_is_measured_on_an_even_sample(image_set: DataSet) -> None:
    manifest = Manifest.load(image_set().train, option="data.train")
    assert even_sample(manifest).tolist() == list(range(20))
    (shard, *_) = manifest.shards
    sizes = [0, 40_000, 10, *[10_000] * 997]
    shards = [dataclasses.replace(shard, name=f"{n}.tar", samples=s) for n, s in enumerate(sizes)]
    chosen = even_sample(dataclasses.replace(manifest, shards=shards))
    assert 0.9 * MAX_MEASURED < len(chosen) <= MAX_MEASURED
    assert np.all(np.diff(chosen) > 0)
    assert chosen[-1] < sum(sizes)
    opened = np.unique(np.searchsorted(np.cumsum(sizes), chosen, side="right"))
    assert len(opened) <= 32
    assert np.diff(opened).max() < 2 * 1000 / 32


def test_an_unfinished_copy_is_told(image_set: DataSet, tmp_path: Path) -> None:
    data = image_set()
    shutil.copytree(data.train, tmp_path / "copy", ignore=shutil.ignore_patterns("*.index.npy"))
    data.train = str(tmp_path / "copy")
    with pytest.raises(ValueError, match="verify: 3 differences"):
        run(data, verify=True)
