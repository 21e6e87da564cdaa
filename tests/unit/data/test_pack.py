"""`trainer.pack`: complete, split by concept, idempotent, careful with what is there."""

import dataclasses
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data.config import DataConfig, SourceConfig, SourceKind
from data.manifest import Manifest, ManifestError
from data.reader import ShardReader
from data.stream import ImageStream
from tests.unit.data.conftest import data_config, png
from trainer.cli import load_config
from trainer.packing import pack

config = load_config(["+experiment=emoji_autoencoder"])


def run(data: DataConfig) -> None:
    pack(dataclasses.replace(config, data=data))


def folder_config(tmp_path: Path, samples: int = 30, **source) -> DataConfig:
    raw = tmp_path / "raw"
    raw.mkdir()
    for number in range(samples):
        (raw / f"{number:02d}.png").write_bytes(png(number))
        (raw / f"{number:02d}.txt").write_text(f"caption {number}")
    options = {"path": str(raw), "shard_samples": 10, "val_share": 0.2}
    return data_config(tmp_path, source=SourceConfig(**(options | source)))


def contents(folder: str) -> list[tuple[bytes, str, dict]]:
    manifest = Manifest.load(folder, option="data.train")
    return [
        (
            bytes(stored.payload("png")),
            str(stored.payload("txt"), "utf-8"),
            json.loads(bytes(stored.payload("json"))),
        )
        for stored in ShardReader(folder, manifest).find(np.arange(manifest.samples))
    ]


def snapshot(folder: str) -> dict[str, tuple[int, bytes]]:
    return {
        file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in Path(folder).iterdir()
    }


def test_a_folder_is_packed_whole_and_split(tmp_path, capsys):
    data = folder_config(tmp_path)
    (tmp_path / "raw" / "broken.png").write_bytes(b"no image")
    (tmp_path / "raw" / "broken.txt").write_text("x")
    run(data)
    train, val = contents(data.train), contents(data.val)
    assert len(val) > 0
    packed = sorted(train + val, key=lambda sample: sample[2]["source"])
    assert [(image, caption) for image, caption, _ in packed] == [
        (png(number), f"caption {number}") for number in range(30)
    ]
    assert packed[3][2]["width"] == 8
    manifest = Manifest.load(data.train, option="data.train")
    assert [shard.samples for shard in manifest.shards][:-1] == [10] * (len(manifest.shards) - 1)
    assert manifest.rejected == {"image cannot be decoded (UnidentifiedImageError)": 1}
    (line,) = (Path(data.train) / "rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["key"] == "broken.png"
    said = capsys.readouterr().out
    assert f"data.train: {len(train)} samples in {len(manifest.shards)} shards" in said
    assert f"data.val: {len(val)} samples" in said
    assert "rejected 1: image cannot be decoded" in said


def test_a_second_run_changes_nothing_and_says_so(tmp_path, capsys):
    data = folder_config(tmp_path)
    run(data)
    before = snapshot(data.train) | snapshot(data.val)
    capsys.readouterr()
    run(data)
    assert snapshot(data.train) | snapshot(data.val) == before
    assert "Already packed" in capsys.readouterr().out


@pytest.mark.parametrize("lost", ["000001.tar", "000000.tar.index.npy", "manifest.json"])
def test_a_damaged_set_is_made_again_to_the_byte(tmp_path, lost):
    data = folder_config(tmp_path)
    run(data)
    before = {name: payload for name, (_, payload) in snapshot(data.train).items()}
    (Path(data.train) / lost).unlink()
    run(data)
    assert {name: payload for name, (_, payload) in snapshot(data.train).items()} == before


def test_a_shard_that_was_cut_off_is_made_again(tmp_path):
    data = folder_config(tmp_path)
    run(data)
    shard = Path(data.train) / "000000.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:1000])
    run(data)
    assert shard.read_bytes() == whole


def test_another_data_set_is_never_overwritten(tmp_path):
    data = folder_config(tmp_path)
    run(data)
    before = snapshot(data.train)
    (tmp_path / "raw" / "00.txt").write_text("another caption")
    with pytest.raises(ManifestError, match=r"data\.train: .* made from another source"):
        run(data)
    assert snapshot(data.train) == before


def test_no_validation_set_unless_asked_for(tmp_path):
    data = folder_config(tmp_path, val_share=0.0)
    run(data)
    assert len(contents(data.train)) == 30
    assert not Path(data.val).exists()


def test_a_source_without_one_usable_sample_is_an_error(tmp_path):
    data = folder_config(tmp_path, samples=1)
    (tmp_path / "raw" / "00.txt").unlink()
    with pytest.raises(ValueError, match=r"nothing usable to train on; .*no caption"):
        run(data)
    assert not (Path(data.train) / "manifest.json").exists()


def foreign_tars(folder: Path, tars: int = 4) -> None:
    """Shards as another tool makes them: GNU format, extra members, one sample uncaptioned."""
    folder.mkdir(parents=True)
    for number in range(tars):
        for row in range(5):
            stem = folder / f"{number}{row:03d}"
            stem.with_suffix(".png").write_bytes(png(10 * number + row))
            stem.with_suffix(".txt").write_text(f"caption {number} {row}")
            stem.with_suffix(".exe").write_text("never read")
        if number == 1:
            (folder / "1002.txt").unlink()
        with tarfile.open(folder / f"{number:05d}.tar", "w", format=tarfile.GNU_FORMAT) as tar:
            for file in sorted(folder.glob(f"{number}[0-9][0-9][0-9].*")):
                tar.add(file, file.name)
                file.unlink()


@pytest.mark.parametrize("beside", [False, True])
def test_tars_are_used_where_they_lie(tmp_path, beside):
    data = data_config(tmp_path)
    folder = Path(data.train) if beside else tmp_path / "elsewhere"
    foreign_tars(folder)
    before = {file.name: file.read_bytes() for file in folder.glob("*.tar")}
    data.source = SourceConfig(kind=SourceKind.webdataset, path=str(folder))
    run(data)
    manifest = Manifest.load(data.train, option="data.train")
    assert manifest.base == ("" if beside else str(folder))
    assert manifest.samples == 19
    assert manifest.rejected == {"no txt or cls": 1}
    assert {file.name: file.read_bytes() for file in folder.glob("*.tar")} == before
    stream = ImageStream(data.train, data, seed=0, global_batch=4, micro_batch=4, rank=0, world=1)
    assert stream.read(np.array([6])).captions == ["caption 1 1"]
    if beside:
        moved = tmp_path / "moved"
        shutil.move(folder, moved)
        assert Manifest.load(moved, option="data.train").hash == manifest.hash
        run_again = dataclasses.replace(data, train=str(moved))
        stream = ImageStream(
            run_again.train, run_again, seed=0, global_batch=4, micro_batch=4, rank=0, world=1
        )
        assert stream.read(np.array([0])).captions == ["caption 0 0"]


def test_validation_takes_whole_tars(tmp_path, capsys):
    foreign_tars(tmp_path / "tars")
    data = data_config(tmp_path)
    data.source = SourceConfig(
        kind=SourceKind.webdataset, path=f"{tmp_path}/tars/{{00000..00003}}.tar", val_share=0.25
    )
    run(data)
    names = [
        {shard.name for shard in Manifest.load(folder, option="data").shards}
        for folder in (data.train, data.val)
    ]
    assert [len(group) for group in names] == [3, 1]
    assert names[0].isdisjoint(names[1])
    run(data)
    assert "Already packed" in capsys.readouterr().out


def test_tars_that_cannot_serve_are_named(tmp_path):
    foreign_tars(tmp_path / "tars", tars=1)
    data = data_config(tmp_path)
    data.source = SourceConfig(
        kind=SourceKind.webdataset, path=str(tmp_path / "tars"), val_share=0.5
    )
    with pytest.raises(ValueError, match=r"data\.source\.val_share: 1 tar"):
        run(data)
    data.source.path = f"{tmp_path}/tars/{{00000..00001}}.tar"
    with pytest.raises(FileNotFoundError, match=r"data\.source\.path: no such tar: .*00001\.tar"):
        run(data)


def test_the_emoji_set(tmp_path):
    """Every concept is on one side, and the set that the documentation promises comes out."""
    data = data_config(
        tmp_path,
        image_size=16,
        source=SourceConfig(
            kind=SourceKind.openmoji, shard_samples=500, val_share=0.08, skin_tone_share=0.1
        ),
    )
    run(data)
    train, val = contents(data.train), contents(data.val)
    concepts = [{facts["concept"] for _, _, facts in split} for split in (train, val)]
    assert concepts[0].isdisjoint(concepts[1])
    assert (len(train), len(val)) == (1933, 192)
    assert len({image for image, _, _ in val}) > 180
    manifest = Manifest.load(data.train, option="data.train")
    assert manifest.rejected == {"code points without a name": 542}
    assert manifest.image_size == 16
    assert "OpenMoji" in manifest.licence
    captions = {caption for _, caption, _ in train}
    assert {"flag of France", "red apple", "woman firefighter"} <= captions | {
        caption for _, caption, _ in val
    }
    assert not any("_" in caption or ":" in caption for caption in captions)
