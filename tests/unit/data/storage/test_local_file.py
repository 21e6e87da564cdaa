"""Files that are read by position: like bytes, and an error where they end early."""

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.storage import local_file
from data.storage.local_file import LocalFile, pieces_of


def opened(path: Path) -> LocalFile:
    return LocalFile(os.open(path, os.O_RDONLY), str(path))


@settings(max_examples=200)
@given(st.binary(max_size=300), st.integers(0, 310), st.integers(0, 310))
def test_slices_are_those_of_bytes(content: bytes, start: int, stop: int) -> None:
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(content)
        found = opened(Path(file.name))
        assert len(found) == len(content)
        assert found[start:stop] == content[start:stop]
        assert found[start:] == content[start:]
        assert found[:] == content
        with found.stream() as stream:
            assert stream.read() == content


def test_pieces_join_to_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_file, "PIECE_BYTES", 7)
    (tmp_path / "file").write_bytes(bytes(range(100)))
    content = opened(tmp_path / "file")
    pieces = list(pieces_of(content, 5, 61))
    assert b"".join(pieces) == bytes(range(5, 61))
    assert max(map(len, pieces)) == 7
    assert b"".join(pieces_of(content)) == b"".join(pieces_of(bytes(range(100))))


@pytest.mark.parametrize("left", [0, 3, 8192])
def test_a_file_that_is_cut_off_is_an_error_that_names_it(tmp_path: Path, left: int) -> None:
    path = tmp_path / "0.tar"
    path.write_bytes(bytes(20_000))
    file = opened(path)
    os.truncate(path, left)
    message = "0.tar was cut off while it was read: it ended at byte .* had 20000 bytes before"
    with pytest.raises(OSError, match=message):
        file.read(100, 15_000)
    header, values = bytearray(100), memoryview(bytearray(15_000))
    with pytest.raises(OSError, match=message):
        file.read_into([header, values], 0, 15_100)
    assert len(file[: min(left, 100)]) == min(left, 100)


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may return fewer bytes than asked for, at any call."""
    content = bytes(range(256)) * 4
    (tmp_path / "file").write_bytes(content)
    file, pread, preadv = opened(tmp_path / "file"), os.pread, os.preadv
    monkeypatch.setattr(os, "pread", lambda handle, size, at: pread(handle, min(size, 10), at))
    monkeypatch.setattr(
        os, "preadv", lambda handle, buffers, at: preadv(handle, [buffers[0][:50]], at)
    )
    assert file.read(3, 500) == content[3:503]


def test_the_file_is_closed_with_the_object(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1")
    before = len(list(Path("/proc/self/fd").iterdir()))
    file = opened(tmp_path / "file")
    assert len(list(Path("/proc/self/fd").iterdir())) == before + 1
    del file
    assert len(list(Path("/proc/self/fd").iterdir())) == before
