"""Storage: a closed list of schemes."""

import errno
import tempfile
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from data.storage.files import (
    join_location,
    lies_in,
    list_folder,
    local_path,
    open_file,
    read_bytes,
    size_bytes,
)
from data.storage.untrusted import UnsafeFileError


def read(location: str) -> bytes:
    return read_bytes(location, limit=100)


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
def test_what_is_local(location: str, expected: Path | None) -> None:
    assert local_path(location) == expected


@pytest.mark.parametrize(
    "location",
    ["pipe:touch x", "ssh://host/a", "zip://a.zip", "simplecache::s3://b/a", "ftp://a/b"],
)
@pytest.mark.parametrize("access", [read, open_file, size_bytes, list_folder])
def test_other_schemes_are_refused_by_every_door(
    location: str, access: Callable[[str], object]
) -> None:
    with pytest.raises(ValueError, match=r"scheme .* is not allowed; use one of file"):
        access(location)


@pytest.mark.parametrize("location", ["http::file:///etc/hostname", "s3://b/a.zip::memory://x"])
@pytest.mark.parametrize("access", [read, open_file, size_bytes, list_folder])
def test_chains_of_urls_are_refused_by_every_door(
    location: str, access: Callable[[str], object]
) -> None:
    with pytest.raises(ValueError, match="URLs chained by :: are not allowed"):
        access(location)


@pytest.mark.parametrize("remote", [False, True])
def test_a_file_over_the_limit_is_not_read(tmp_path: Path, remote: bool) -> None:
    location = f"memory://{tmp_path.name}/large" if remote else str(tmp_path / "large")
    store, path = fsspec.core.url_to_fs(location)
    store.pipe_file(path, bytes(101))
    with pytest.raises(UnsafeFileError, match="101 bytes are over the limit of 100"):
        read(location)


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("/data/set", True),
        ("/data/set/a/0.tar", True),
        ("/data/set/../other", False),
        ("/data/set2", False),
        ("/data", False),
        ("/", False),
        ("s3://b/set/0.tar", True),
        ("s3://b/set/../0.tar", False),
        ("s3:///b/set/0.tar", True),
        ("s3://b", False),
        ("s3://c/set/0.tar", False),
        ("http://b/set/0.tar", False),
        ("file:///data/set/0.tar", True),
    ],
)
def test_what_lies_in_a_place(location: str, expected: bool) -> None:
    assert lies_in(location, ["/data/set/", "s3://b/set"]) == expected


@pytest.mark.parametrize("remote", [False, True])
def test_reading(tmp_path: Path, remote: bool) -> None:
    base = f"memory://{tmp_path.name}" if remote else str(tmp_path)
    files = {"a.tar": b"12345", "b.tar": b"", "c.txt": b"1", "d[1]/e.tar": b"", "d1/f.tar": b""}
    for name, payload in files.items():
        store, path = fsspec.core.url_to_fs(join_location(base, name), auto_mkdir=True)
        store.pipe_file(path, payload)
    assert list_folder(join_location(base, "missing")) == []
    *tars, other, plain, folder = list_folder(base)
    assert [Path(tar).name for tar in (*tars, other)] == ["a.tar", "b.tar", "c.txt"]
    assert plain.endswith("/d1/") and folder.endswith("/d[1]/")
    assert [Path(tar).name for tar in list_folder(folder)] == ["e.tar"]
    assert all(local_path(tar) is None for tar in tars) == remote
    for tar, payload in zip(tars, (b"12345", b""), strict=True):
        assert read(tar) == open_file(tar)[:] == payload
        assert size_bytes(tar) == len(payload)
    for access in (read, open_file, size_bytes):
        with pytest.raises(FileNotFoundError):
            access(join_location(base, "missing"))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EFBIG])
def test_a_disk_too_small_for_a_copy_is_named_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    location = f"memory://{tmp_path.name}/a.tar"
    store, path = fsspec.core.url_to_fs(location)
    store.pipe_file(path, b"12345")
    assert open_file(location, scratch=tmp_path / "new")[:] == b"12345"
    assert list((tmp_path / "new").iterdir()) == []

    def full(*_: object) -> None:
        raise OSError(code, "the disk is full")

    monkeypatch.setattr("data.storage.remote.pieces", full)
    for scratch, said in ((None, "TMPDIR"), (tmp_path, "larger disk")):
        with pytest.raises(OSError, match=rf"copy of {location} .*full.*{said}") as caught:
            open_file(location, scratch=scratch)
        assert caught.value.filename == str(scratch or tempfile.gettempdir())
