"""Tars and tables that others wrote are used where they lie, filtered by their columns."""

import dataclasses
import gzip
import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from data.config import (
    CaptionField,
    CaptionForm,
    FilterConfig,
    Missing,
    SourceConfig,
    SourceKind,
)
from data.order.batches import Share
from data.shards.index import unread_picture
from data.shards.manifest import FilterCount, Manifest, ManifestError, Rejected
from data.streams.images import ImageStream
from tests.support.data_sets import DataSet, data_config, png
from tests.support.packing import (
    foreign_tars,
    img2dataset,
    read_captions,
    run,
    snapshot,
    webdataset,
)
from trainer.config import PackVerify


@pytest.mark.parametrize("beside", [False, True])
def test_tars_are_used_where_they_lie(tmp_path: Path, beside: bool) -> None:
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
    stream = ImageStream.open(data, "train", Share(seed=0, global_batch=4, micro_batch=4))
    assert stream.read(np.array([6])).captions == ["caption 1 1"]
    if beside:
        moved = tmp_path / "moved"
        shutil.move(folder, moved)
        assert Manifest.load(moved, option="data.train").hash == manifest.hash
        run_again = dataclasses.replace(data, train=str(moved))
        stream = ImageStream.open(run_again, "train", stream.share)
        assert stream.read(np.array([0])).captions == ["caption 0 0"]


def test_both_splits_share_the_samples_of_every_tar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign_tars(tmp_path / "tars")
    data = data_config(tmp_path)
    data.source = SourceConfig(
        kind=SourceKind.webdataset, path=f"{tmp_path}/tars/{{00000..00003}}.tar", val_share=0.25
    )
    run(data)
    manifests = [Manifest.load(folder, option="data") for folder in (data.train, data.val)]
    assert [len(one.shards) for one in manifests] == [4, 4]
    assert sum(one.samples for one in manifests) == 19
    assert manifests[0].found == 19 + 1 - manifests[1].samples
    reader = Share(seed=0, global_batch=1, micro_batch=1)
    captions = [
        ImageStream.open(data, split, reader).captions(np.arange(one.samples))
        for split, one in zip(("train", "val"), manifests, strict=True)
    ]
    assert set(captions[0]).isdisjoint(captions[1])
    run(data)
    assert "Already packed" in capsys.readouterr().out
    # under other names, in another order, packed from a folder: the same samples are kept apart
    folder = tmp_path / "folder"
    folder.mkdir()
    for tar_file in (tmp_path / "tars").glob("*.tar"):
        with tarfile.open(tar_file) as tar:
            for member in tar:
                content = tar.extractfile(member)
                if content and member.name.endswith((".png", ".txt")):
                    name = f"{tar_file.stem[::-1]}_{member.name}"
                    (folder / name).write_bytes(content.read())
    again = data_config(tmp_path / "again")
    again.source = SourceConfig(path=str(folder), val_share=0.25)
    run(again)
    stream = ImageStream.open(again, "val", reader)
    assert set(stream.captions(np.arange(stream.num_samples))) == set(captions[1])


def test_tars_that_cannot_serve_are_named(tmp_path: Path) -> None:
    foreign_tars(tmp_path / "tars", tars=1)
    data = webdataset(tmp_path, f"{tmp_path}/tars/{{00000..00001}}.tar")
    with pytest.raises(FileNotFoundError, match=r"data\.source\.path: no such tar: .*00001\.tar"):
        run(data)


@pytest.mark.parametrize("required", [True, False])
def test_samples_without_a_caption_are_left_out_or_unconditional(
    tmp_path: Path, required: bool
) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    with tarfile.open(raw / "0.tar", "w") as tar:
        members = {"a.png": png(0), "b.png": png(1), "b.txt": b"", "c.png": png(2), "c.txt": b"c"}
        for name, payload in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    data = webdataset(tmp_path, str(raw))
    data.source.require_captions = required
    run(data)
    manifest = Manifest.load(data.train, option="data.train")
    assert read_captions(data) == (["c"] if required else ["", "", "c"])
    assert manifest.rejected == ({"no txt or cls": 1, "empty caption": 1} if required else {})


def test_captions_in_json_need_no_text(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    with tarfile.open(raw / "0.tar", "w") as tar:
        for key, facts in (("a", {"long": "a cat"}), ("b", {"long": ["a dog", "x"]}), ("c", {})):
            for name, payload in (("png", png(ord(key))), ("json", json.dumps(facts).encode())):
                info = tarfile.TarInfo(f"{key}.{name}")
                info.size = len(payload)
                tar.addfile(info, io.BytesIO(payload))
    data = webdataset(tmp_path, str(raw), FilterConfig(name="caption_length", max=5))
    data.captions, data.caption_fields = CaptionForm.json, [CaptionField(name="long")]
    run(data)
    assert read_captions(data) == ["a cat", "a dog"]
    assert Manifest.load(data.train, option="data.train").rejected == {
        "no text in field long of its JSON": 1
    }


def test_what_img2dataset_wrote_is_used_as_it_lies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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


def test_filters_read_the_parquet_the_json_and_the_sample(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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


def test_the_identity_follows_what_filters_leave_and_other_filters_are_refused(
    tmp_path: Path,
) -> None:
    img2dataset(tmp_path / "raw")
    hashes = []
    for number, rules in enumerate(
        ([], [FilterConfig(name="width", min=1)], [FilterConfig(name="similarity", min=1)])
    ):
        data = webdataset(tmp_path / str(number), str(tmp_path / "raw"), *rules)
        run(data)
        hashes.append(Manifest.load(data.train, option="data.train").hash)
    assert hashes[0] == hashes[1] != hashes[2]
    with pytest.raises(ManifestError, match=r"data\.train: .* other options: data\.filters was"):
        run(webdataset(tmp_path / "2", str(tmp_path / "raw"), FilterConfig(name="width", min=1)))


def test_what_no_rule_can_judge_is_rejected(tmp_path: Path) -> None:
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


def test_a_tar_that_holds_less_than_was_fetched_is_told(tmp_path: Path) -> None:
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


def write_captions(tar_file: Path, *captions: str) -> None:
    """Captions of one length give tars of one size, since members are padded."""
    tar_file.parent.mkdir(exist_ok=True)
    with tarfile.open(tar_file, "w") as tar:
        for number, caption in enumerate(captions):
            for extension, payload in (("png", png(number)), ("txt", caption.encode())):
                info = tarfile.TarInfo(f"{number}.{extension}")
                info.size = len(payload)
                tar.addfile(info, io.BytesIO(payload))


def test_a_tar_made_again_in_place_is_indexed_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = tmp_path / "raw"
    for name in ("0.tar", "1.tar"):
        write_captions(raw / name, "blue", "blue")
    times = (raw / "0.tar").stat()
    data = webdataset(tmp_path, str(raw))
    run(data)
    receipts = sorted(Path(data.train).glob("*.receipt.json"))
    before = [file.stat().st_mtime_ns for file in receipts]
    write_captions(raw / "0.tar", "pink", "pink")
    os.utime(raw / "0.tar", ns=(times.st_atime_ns, times.st_mtime_ns))
    capsys.readouterr()
    run(data)
    said = capsys.readouterr().out
    assert "changed" in said and "nothing to do" not in said
    assert read_captions(data) == ["pink", "pink", "blue", "blue"]
    after = [file.stat().st_mtime_ns for file in receipts]
    assert [old == new for old, new in zip(before, after, strict=True)] == [False, True]
    run(data)
    assert "nothing to do" in capsys.readouterr().out


def test_latents_of_tars_that_changed_are_named(tmp_path: Path, latent_set: DataSet) -> None:
    raw = tmp_path / "raw"
    write_captions(raw / "0.tar", "blue")
    data = webdataset(tmp_path, str(raw))
    run(data)
    data.latents = latent_set().latents
    images = Manifest.load(data.train, option="data.train")
    latents = Manifest.load(data.latents, option="data.latents")
    assert latents.latents is not None
    made_from = dataclasses.replace(latents.latents, source_hash=images.hash)
    dataclasses.replace(latents, latents=made_from).save(Path(data.latents))
    write_captions(raw / "0.tar", "pink")
    with pytest.raises(ManifestError, match=r"^data\.latents: .* made from other images"):
        run(data)


@pytest.mark.parametrize("before", [[0.1, 0.1], None])
def test_a_parquet_that_changed_or_came_later_filters_again(
    tmp_path: Path, before: list[float] | None
) -> None:
    raw = tmp_path / "raw"
    write_captions(raw / "0.tar", "keep", "drop")
    rule = FilterConfig(name="punsafe", max=0.5, missing=Missing.keep)
    data = webdataset(tmp_path, str(raw), rule)
    for scores in (before, [0.1, 0.9]):
        if scores:
            table = pa.table({"key": ["0", "1"], "punsafe": scores})
            parquet.write_table(table, raw / "0.parquet")
        run(data)
        assert read_captions(data) == ["keep", "drop"][: 2 if scores == before else 1]


def test_a_compressed_file_named_tar_is_refused_with_the_command(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    write_captions(raw / "0.tar", "x")
    (raw / "1.tar").write_bytes(gzip.compress((raw / "0.tar").read_bytes()))
    command = f"mv {raw}/1.tar {raw}/1.tar.gz && gunzip {raw}/1.tar.gz"
    with pytest.raises(ValueError, match=f"1.tar is compressed with gzip, .*`{command}`"):
        run(webdataset(tmp_path, str(raw)))


def test_nothing_of_a_tar_vanishes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = tmp_path / "raw"
    foreign_tars(raw)
    with tarfile.open(raw / "00004.tar", "w") as tar:
        for name in ("a.psd", "a.txt", "b.png", "README", "c.png", "c.txt"):
            info = tarfile.TarInfo(name)
            info.size = 2
            tar.addfile(info, io.BytesIO(b"ab"))
    data = webdataset(tmp_path, str(raw), FilterConfig(name="caption_length", max=5))
    run(data)
    manifest = Manifest.load(data.train, option="data.train")
    assert manifest.found == 4 * 5 + 3
    found = {one.reason: (one.fate, one.count, one.examples) for one in manifest.left_out}
    assert found["no txt or cls"] == ("rejected", 2, ["1002", "b"])
    assert found[unread_picture("psd")] == ("rejected", 1, ["a"])
    assert found["caption_length <= 5"][:2] == ("filtered", 19)
    first = ["0000.exe", "0001.exe", "0002.exe"]
    assert found["member .exe: not read"] == ("left alone", 20, first)
    assert found["member without a name or an extension"] == ("left alone", 1, ["README"])
    said = capsys.readouterr().out
    assert "filter caption_length <= 5: 1 kept, 19 dropped (0000, 0001, 0002)" in said


def test_tars_without_one_sound_sample_are_a_loss(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    for number in range(3):
        write_captions(raw / f"{number}.tar", "x")
    (raw / "2.tar").write_text("<html>502 Bad Gateway</html>")
    data = webdataset(tmp_path, str(raw))
    with pytest.raises(ValueError, match=r"1 of 3 tars damaged without a sample, 2\.tar first"):
        run(data, max_rejected=0.05)
    run(data, max_rejected=0.34)
    assert read_captions(data) == ["x", "x"]


def test_full_verification_reads_every_tar_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = tmp_path / "raw"
    monkeypatch.setattr("trainer.pack.job.state_of", lambda *_, **__: "a store without hashes")
    write_captions(raw / "0.tar", "blue")
    data = webdataset(tmp_path, str(raw))
    run(data)
    write_captions(raw / "0.tar", "pink")
    run(data)
    run(data, verify=PackVerify.full)
    assert read_captions(data) == ["pink"]
