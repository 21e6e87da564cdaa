"""Shards: read back equal by WebDataset, the same bytes each time, never seen half done."""

import hashlib
import json
import os
import resource
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.compat import WebDataset

from data.shards import register
from data.shards.codecs import IMAGE_EXTENSIONS, encode_npy
from data.shards.manifest import Kind, Manifest, Shard
from data.shards.reader import ShardReader
from data.shards.writer import ShardSetWriter, ShardWriter
from data.storage import files as storage
from tests.support.data_sets import moments, png


def image_samples(count: int) -> Iterator[tuple[str, dict[str, bytes]]]:
    for number in range(count):
        facts = json.dumps({"width": number}).encode()
        yield (
            f"{number:09d}",
            {"png": png(number), "txt": f"a café {number}".encode(), "json": facts},
        )


def write(
    folder: Path,
    samples: Iterable[tuple[str, dict[str, bytes]]],
    kind: Kind = Kind.images,
    name: str = "000000.tar",
) -> Shard:
    with ShardWriter(folder, name, kind) as shard_writer:
        for key, members in samples:
            shard_writer.write(key, members)
    return shard_writer.shard


@settings(deadline=None, max_examples=25)
@given(
    st.lists(
        st.fixed_dictionaries({"png": st.binary(max_size=2000), "txt": st.binary(max_size=50)}),
        max_size=5,
    )
)
def test_webdataset_and_our_reader_see_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, samples: list[dict[str, bytes]]
) -> None:
    folder = tmp_path_factory.mktemp("shard")
    shard = write(folder, [(f"{number:09d}", members) for number, members in enumerate(samples)])
    url = str(folder / shard.name)
    read = [
        {name: value for name, value in sample.items() if not name.startswith("__")}
        for sample in WebDataset(url, shardshuffle=False, empty_check=False)
    ]
    assert read == samples
    reader = ShardReader(str(folder), Manifest(kind=Kind.images, shards=[shard]))
    found = [
        {name: bytes(stored.payload(name)) for name in ("png", "txt")}
        for stored in reader.find(np.arange(len(samples)))
    ]
    assert found == samples


def test_the_entry_describes_the_files(tmp_path: Path) -> None:
    shard = write(tmp_path, image_samples(5))
    tar = (tmp_path / shard.name).read_bytes()
    index = (tmp_path / shard.index_name).read_bytes()
    assert (shard.samples, shard.size_bytes) == (5, len(tar))
    assert shard.sha256 == hashlib.sha256(tar).hexdigest()
    assert shard.index_sha256 == hashlib.sha256(index).hexdigest()


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    first = write(tmp_path / "a", image_samples(5))
    assert write(tmp_path / "b", image_samples(5)) == first
    with tarfile.open(tmp_path / "a" / first.name) as tar:
        assert {(member.mtime, member.uid, member.uname) for member in tar} == {(0, 0, "bigdata")}


def test_an_error_while_writing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, "0.tar", Kind.images) as shard_writer:
        shard_writer.write("0", {"png": b"x", "txt": b"y"})
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_seen_before_it_is_whole_and_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every rename, what appears must already be complete and synced."""
    appeared = []
    synced = set()
    real_fsync, real_replace = os.fsync, storage.Path.replace

    def fsync(handle: int) -> None:
        synced.add(os.fstat(handle).st_ino)
        real_fsync(handle)

    def replace(source: Path, target: Path) -> Path:
        assert source.stat().st_ino in synced
        assert not target.exists()
        appeared.append((target.name, source.stat().st_size))
        return real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(storage.Path, "replace", replace)
    shard = write(tmp_path, image_samples(5))
    sizes = {name: (tmp_path / name).stat().st_size for name in (shard.name, shard.index_name)}
    assert appeared == list(sizes.items())
    assert {file.name for file in tmp_path.iterdir()} == set(sizes)


def test_a_sample_that_cannot_be_read_back_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"000000.tar: a: no txt or cls"):
        write(tmp_path, [("a", {"png": b"x"})])


def test_long_and_foreign_keys_survive(tmp_path: Path) -> None:
    key = "ordner/ü" + "x" * 300
    shard = write(tmp_path, [(key, {"png": b"x", "txt": b"y"})])
    reader = ShardReader(str(tmp_path), Manifest(kind=Kind.images, shards=[shard]))
    (stored,) = reader.find(np.array([0]))
    assert stored.key == key


def test_a_set_is_cut_into_shards_of_equal_counts(tmp_path: Path) -> None:
    with ShardSetWriter(tmp_path, Kind.images, 3) as set_writer:
        for _, members in image_samples(7):
            set_writer.write(members)
    assert [(shard.name, shard.samples) for shard in set_writer.shards] == [
        ("000000.tar", 3),
        ("000001.tar", 3),
        ("000002.tar", 1),
    ]
    reader = ShardReader(str(tmp_path), Manifest(kind=Kind.images, shards=set_writer.shards))
    keys = [stored.key for stored in reader.find(np.arange(7))]
    assert keys == [f"{number:09d}" for number in range(7)]


@pytest.mark.parametrize("room", [100, 200_000])
def test_a_full_disk_is_named_with_the_shard(tmp_path: Path, room: int) -> None:
    """No file may grow beyond `room` bytes: at once, or in the middle of a large member."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(OSError, match=r"too large: '.*/000000\.tar'"):
            write(tmp_path, [("a", {"png": png(0), "txt": bytes(room * 5)})])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_a_set_that_fails_leaves_only_whole_shards(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), ShardSetWriter(tmp_path, Kind.images, 2) as set_writer:
        for _, members in image_samples(3):
            set_writer.write(members)
        raise RuntimeError
    assert {file.name for file in tmp_path.iterdir()} == {"000000.tar", "000000.tar.index.npy"}


def test_latents_need_moments(tmp_path: Path) -> None:
    sample = {"moments.npy": encode_npy(moments(1)), "cls": b"3"}
    assert write(tmp_path, [("a", sample)], Kind.latents).samples == 1
    assert register.required_members(Kind.latents) == [("moments.npy",)]
    as_images = register.register_shard(tmp_path, "000000.tar", Kind.images)
    assert as_images.shard.samples == 0
    (rejected,) = as_images.rejected
    assert rejected.reason == f"no {' or '.join(IMAGE_EXTENSIONS)}"
    assert rejected.shard == "000000.tar"
