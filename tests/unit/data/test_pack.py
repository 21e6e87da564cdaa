"""`trainer.pack`: complete, split by concept, idempotent, careful with what is there."""

import dataclasses
import functools
import http.server
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import tarfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from data.config import DataConfig, FilterConfig, SourceConfig, SourceKind
from data.image_stream import ImageStream
from data.manifest import FilterCount, Manifest, ManifestError, Rejected
from data.reader import ShardReader
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


def img2dataset(folder: Path, tars: int = 3, rows: int = 8) -> None:
    """What img2dataset writes: for each tar a parquet with failures, too, and counts."""
    folder.mkdir()
    for number in range(tars):
        table = []
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for row in range(rows):
                key = f"{number:05d}{row:04d}"
                caption = f"caption {number} {row}" + " and more" * row
                facts = {"key": key, "caption": caption, "width": 8, "height": 8, "similarity": row}
                fetched = row != 5
                table.append(
                    {
                        **facts,
                        "status": "success" if fetched else "failed_to_download",
                        "original_width": 100 * row,
                        "AESTHETIC_SCORE": None if row == 2 else row / 2,
                        "LANGUAGE": "en" if row % 2 else "de",
                    }
                )
                members = {"png": png(100 * number + row), "txt": caption.encode()}
                members["json"] = json.dumps(facts).encode()
                for extension, payload in members.items() if fetched else ():
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size = len(payload)
                    tar.addfile(info, io.BytesIO(payload))
        parquet.write_table(pa.Table.from_pylist(table), folder / f"{number:05d}.parquet")
        counts = {"count": rows, "successes": rows - 1, "failed_to_download": 1}
        counts |= {"failed_to_resize": 0, "duration": 1.5, "status_dict": {"success": rows - 1}}
        (folder / f"{number:05d}_stats.json").write_text(json.dumps(counts))


def webdataset(tmp_path: Path, path: str, *rules: FilterConfig, **source) -> DataConfig:
    options = SourceConfig(kind=SourceKind.webdataset, path=path, **source)
    return data_config(tmp_path, source=options, filters=list(rules), max_rejected_share=1.0)


def read_captions(data: DataConfig) -> list[str]:
    stream = ImageStream(data.train, data, seed=0, global_batch=4, micro_batch=4, rank=0, world=1)
    return stream.read(np.arange(stream.num_samples)).captions


def test_what_img2dataset_wrote_is_used_as_it_lies(tmp_path, capsys):
    img2dataset(tmp_path / "raw")
    before = snapshot(str(tmp_path / "raw"))
    data = webdataset(tmp_path, str(tmp_path / "raw"))
    run(data)
    assert snapshot(str(tmp_path / "raw")) == before
    manifest = Manifest.load(data.train, option="data.train")
    assert manifest.samples == 21
    assert manifest.rejected == {}
    counts = {"count": 24, "successes": 21, "failed_to_download": 3, "failed_to_resize": 0}
    assert manifest.downloads == counts
    assert "img2dataset: count 24, successes 21, failed_to_download 3" in capsys.readouterr().out
    assert read_captions(data)[:2] == ["caption 0 0", "caption 0 1 and more"]


def test_filters_read_the_parquet_the_json_and_the_sample(tmp_path, capsys):
    img2dataset(tmp_path / "raw")
    rules = [
        FilterConfig(name="AESTHETIC_SCORE", min=0.5),
        FilterConfig(name="LANGUAGE", allowed=["en"]),
        FilterConfig(name="similarity", max=6),
        FilterConfig(name="caption_length", max=30),
        FilterConfig(name="width", min=8),
        FilterConfig(name="aspect", max=1),
    ]
    data = webdataset(tmp_path, str(tmp_path / "raw"), *rules)
    run(data)
    assert read_captions(data) == [f"caption {number} 1 and more" for number in range(3)]
    manifest = Manifest.load(data.train, option="data.train")
    kept_and_dropped = [(count.kept, count.dropped) for count in manifest.filters]
    assert kept_and_dropped == [(15, 6), (9, 6), (6, 3), (3, 3), (3, 0), (3, 0)]
    assert manifest.filters[1] == FilterCount(rule="LANGUAGE in [en]", kept=9, dropped=6)
    assert "filter AESTHETIC_SCORE >= 0.5: 15 kept, 6 dropped" in capsys.readouterr().out


def test_the_identity_follows_what_filters_leave_and_other_filters_are_refused(tmp_path):
    img2dataset(tmp_path / "raw")
    hashes = []
    for number, rules in enumerate(
        ([], [FilterConfig(name="width", min=1)], [FilterConfig(name="similarity", min=1)])
    ):
        data = webdataset(tmp_path / str(number), str(tmp_path / "raw"), *rules)
        run(data)
        hashes.append(Manifest.load(data.train, option="data.train").hash)
    assert hashes[0] == hashes[1] != hashes[2]
    with pytest.raises(ManifestError, match=r"data\.train: .* other options"):
        run(webdataset(tmp_path / "2", str(tmp_path / "raw"), FilterConfig(name="width", min=1)))


def test_what_no_rule_can_judge_is_rejected(tmp_path):
    tar_file = tmp_path / "raw" / "0.tar"
    tar_file.parent.mkdir()
    with tarfile.open(tar_file, "w") as tar:
        for key, facts in (("a", b'{"x": 1}'), ("b", b"[" * 50_000), ("c", b'{"x": 2}')):
            for extension, payload in (("png", png(0)), ("txt", b"t"), ("json", facts)):
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(payload)
                tar.addfile(info, io.BytesIO(payload))
    data = webdataset(tmp_path, str(tar_file), FilterConfig(name="x", max=1))
    run(data)
    manifest = Manifest.load(data.train, option="data.train")
    assert manifest.samples == 1
    assert manifest.filters == [FilterCount(rule="x <= 1", kept=1, dropped=1)]
    assert manifest.rejected == {"JSON cannot be read (RecursionError)": 1}
    (line,) = (Path(data.train) / "rejected.jsonl").read_text().splitlines()
    assert Rejected(**json.loads(line)).key == "b"


def test_a_tar_that_holds_less_than_was_fetched_is_told(tmp_path):
    img2dataset(tmp_path / "raw")
    shard = tmp_path / "raw" / "00001.tar"
    end = shard.read_bytes().index(b"000010007.png")
    shard.write_bytes(shard.read_bytes()[:end] + bytes(1024))
    (tmp_path / "raw" / "00002_stats.json").write_text('{"count":')
    data = webdataset(tmp_path, str(tmp_path / "raw"))
    run(data)
    manifest = Manifest.load(data.train, option="data.train")
    assert manifest.samples == 20
    assert manifest.rejected == {
        "fewer samples in the tar than its _stats.json counts": 1,
        "_stats.json: JSON cannot be read (JSONDecodeError)": 1,
    }


def test_a_folder_is_filtered_before_it_is_written(tmp_path):
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
def web(tmp_path):
    """A web server from the standard library over a folder of img2dataset's."""
    img2dataset(tmp_path / "web")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format, *args):
            pass

    handler = functools.partial(Quiet, directory=str(tmp_path / "web"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_every_store_gives_the_same_set(tmp_path, web):
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


def whole_set(data: DataConfig) -> dict[str, bytes]:
    files = [file for folder in (data.train, data.val) for file in Path(folder).rglob("*")]
    return {str(file.relative_to(data.dir)): file.read_bytes() for file in files}


def pack_through_kills(data: DataConfig, kills: int, most_files: int) -> int:
    """Pack in processes that are killed, each when it has written some files; then to the end."""
    draws = random.Random(0)
    killed = 0
    for _ in range(kills):
        start_ns, files = time.time_ns(), draws.randint(0, most_files)
        process = multiprocessing.get_context("fork").Process(target=run, args=(data,))
        process.start()
        while process.is_alive() and written_since(data.dir, start_ns) < files:
            time.sleep(0.01)
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        for file in Path(data.dir).rglob("[!.]*.tar"):
            with tarfile.open(file) as tar:
                assert len(tar.getnames()) > 0
    run(data)
    return killed


def written_since(folder: str, start_ns: int) -> int:
    """Count the files that appeared, or were replaced, after a moment."""
    count = 0
    for file in Path(folder).rglob("[!.]*"):
        with suppress(FileNotFoundError):
            count += file.is_file() and file.stat().st_mtime_ns > start_ns
    return count


def test_tars_are_registered_through_kills(tmp_path):
    img2dataset(tmp_path / "raw", tars=40)
    path, rule = str(tmp_path / "raw"), FilterConfig(name="similarity", min=1)
    options = {"val_share": 0.1, "workers": 2}
    undisturbed = webdataset(tmp_path / "a", path, rule, **options)
    run(undisturbed)
    data = webdataset(tmp_path / "b", path, rule, **options)
    assert pack_through_kills(data, kills=5, most_files=16) > 2
    assert whole_set(data) == whole_set(undisturbed)


def test_what_has_a_receipt_is_not_read_again(tmp_path, monkeypatch):
    img2dataset(tmp_path / "raw")
    data = webdataset(tmp_path, str(tmp_path / "raw"), workers=1)
    run(data)
    expected = whole_set(data)
    (Path(data.train) / "manifest.json").unlink()
    (Path(data.train) / "00001.tar.index.npy").write_bytes(b"torn")
    (Path(data.train) / "00002.tar.receipt.json").write_bytes(b'{"identity":')
    read = []
    from data import register

    genuine = register.map_bytes
    monkeypatch.setattr(
        register,
        "map_bytes",
        lambda location: read.append(Path(location).name) or genuine(location),
    )
    run(data)
    assert read == ["00001.tar", "00002.tar"]
    assert whole_set(data) == expected


def test_a_receipt_serves_only_what_it_was_made_for(tmp_path):
    img2dataset(tmp_path / "raw")
    sets = []
    for number, low in enumerate((1, 2)):
        rule = FilterConfig(name="similarity", min=low)
        sets.append(webdataset(tmp_path / str(number), str(tmp_path / "raw"), rule))
        run(sets[-1])
    data, expected = sets[0], whole_set(sets[1])
    data.filters = sets[1].filters
    (Path(data.train) / "manifest.json").unlink()
    run(data)
    assert whole_set(data) == expected
    shutil.copy(tmp_path / "raw" / "00002.tar", tmp_path / "raw" / "00000.tar")
    with (tmp_path / "raw" / "00000.tar").open("ab") as tar:
        tar.write(bytes(10240))
    (Path(data.train) / "manifest.json").unlink()
    run(data)
    assert read_captions(data)[0] == read_captions(data)[10] == "caption 2 2" + " and more" * 2


def test_a_worker_that_dies_is_a_clear_error(tmp_path, monkeypatch):
    img2dataset(tmp_path / "raw")
    data = webdataset(tmp_path, str(tmp_path / "raw"), workers=2)
    monkeypatch.setattr("data.register.register_shard", lambda *_, **__: os._exit(1))
    with pytest.raises(ChildProcessError, match=r"^data\.source\.workers: one of 2 processes died"):
        run(data)


def test_a_folder_is_written_through_kills(tmp_path):
    data = folder_config(tmp_path, samples=120)
    data = dataclasses.replace(data, dir=str(tmp_path / "b"), train=str(tmp_path / "b/train"))
    data.val = str(tmp_path / "b/val")
    undisturbed = dataclasses.replace(
        data, dir=str(tmp_path / "a"), train=str(tmp_path / "a/train")
    )
    undisturbed.val = str(tmp_path / "a/val")
    run(undisturbed)
    Path(data.train).mkdir(parents=True)
    (Path(data.train) / ".000000.tar.k3s9x_aa.part").write_bytes(b"left by a run that was killed")
    assert pack_through_kills(data, kills=5, most_files=20) > 2
    assert whole_set(data) == whole_set(undisturbed)


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
