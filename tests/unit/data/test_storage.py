"""Storage: a closed list of schemes, and writes that are whole or absent."""

import errno
import os
from pathlib import Path

import fsspec
import pytest

from data.storage import (
    join,
    list_tars,
    local_path,
    map_bytes,
    read_bytes,
    size_bytes,
    write_atomic,
)


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("a/b.tar", Path("a/b.tar")),
        ("/a/b:c.tar", Path("/a/b:c.tar")),
        ("file:///a/b%20c.tar", Path("/a/b c.tar")),
        ("s3://bucket/a.tar", None),
        ("memory://a.tar", None),
    ],
)
def test_what_is_local(location, expected):
    assert local_path(location) == expected


@pytest.mark.parametrize(
    "location",
    ["pipe:touch x", "ssh://host/a", "zip://a.zip", "simplecache::s3://b/a", "ftp://a/b"],
)
@pytest.mark.parametrize("access", [read_bytes, map_bytes, size_bytes, list_tars])
def test_other_schemes_are_refused_by_every_door(location, access):
    with pytest.raises(ValueError, match=r"scheme .* is not allowed; use one of file"):
        access(location)


@pytest.mark.parametrize("remote", [False, True])
def test_reading(tmp_path, remote):
    base = f"memory://{tmp_path.name}" if remote else str(tmp_path)
    for name, payload in (("a.tar", b"12345"), ("b.tar", b""), ("c.txt", b"1")):
        store, path = fsspec.core.url_to_fs(join(base, name))
        store.pipe_file(path, payload)
    assert [Path(tar).name for tar in list_tars(base)] == ["a.tar", "b.tar"]
    assert all(local_path(tar) is None for tar in list_tars(base)) == remote
    for tar, payload in zip(list_tars(base), (b"12345", b""), strict=True):
        assert read_bytes(tar) == bytes(map_bytes(tar)) == payload
        assert size_bytes(tar) == len(payload)
    for access in (read_bytes, map_bytes, size_bytes):
        with pytest.raises(FileNotFoundError):
            access(join(base, "missing"))


def test_a_write_replaces_the_old_file_at_once(tmp_path):
    path = tmp_path / "new" / "file"
    for payload in (b"first", b"second"):
        write_atomic(path, payload)
        assert path.read_bytes() == payload
    assert [file.name for file in path.parent.iterdir()] == ["file"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_full_disk_keeps_the_old_file_and_leaves_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
