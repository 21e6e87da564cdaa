"""Patience with stores: transient failures are sat out, others are reported at once."""

import errno
import sys
from itertools import chain

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from data import remote
from data.remote import StorageError, list_tars, pieces, size_bytes

PAYLOAD = bytes(range(256)) * 40


class Dropped(Exception):
    """What a client library may raise: of no class that we know."""


class Answered(Exception):
    def __init__(self, status: int) -> None:
        super().__init__(f"HTTP {status}")
        self.status = status


class NoCredentialsError(Exception):
    pass


@pytest.fixture
def location(tmp_path, monkeypatch) -> str:
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(remote, "LONGEST_WAIT_S", 0.01)
    location = f"memory://{tmp_path.name}/a.tar"
    store, path = fsspec.core.url_to_fs(location)
    store.pipe_file(path, PAYLOAD)
    return location


def fail(monkeypatch, cls, method, failures):
    """Let a method raise each of the failures before it works; return the calls it gets."""
    calls, works = [], getattr(cls, method)
    left = iter(failures)

    def faulty(self, *args, **options):
        calls.append(args)
        failure = next(left, None)
        if failure is not None:
            raise failure
        return works(self, *args, **options)

    monkeypatch.setattr(cls, method, faulty)
    return calls


TRANSIENT = [
    Dropped("x"),
    TimeoutError(),
    ConnectionResetError(errno.ECONNRESET, "reset"),
    OSError(errno.EIO, "Internal Error"),
    Answered(503),
    Answered(429),
]
FINAL = [PermissionError("Forbidden"), Answered(401), NoCredentialsError("none"), ValueError("x")]


@pytest.mark.parametrize("failure", TRANSIENT, ids=repr)
def test_failures_that_pass_are_sat_out_with_a_line_each(location, monkeypatch, caplog, failure):
    calls = fail(monkeypatch, MemoryFileSystem, "size", [failure] * 3)
    assert size_bytes(location) == len(PAYLOAD)
    assert len(calls) == 4
    assert len(caplog.messages) == 3
    assert caplog.messages[1].startswith(f"data: {location} failed (")
    assert f"), try 3 of {remote.TRIES} in 0.0 s" in caplog.messages[1]
    assert "\n" not in "".join(caplog.messages)


@pytest.mark.parametrize("failure", FINAL, ids=repr)
def test_a_refusal_is_reported_at_once(location, monkeypatch, failure):
    calls = fail(monkeypatch, MemoryFileSystem, "size", [failure])
    with pytest.raises(StorageError, match=rf"^{location} could not be read: {failure}$"):
        size_bytes(location)
    assert len(calls) == 1


def test_a_missing_file_is_reported_at_once(location, monkeypatch):
    calls = fail(monkeypatch, MemoryFileSystem, "size", [])
    with pytest.raises(FileNotFoundError, match=rf"^{location}x is not there$"):
        size_bytes(location + "x")
    assert len(calls) == 1
    with pytest.raises(FileNotFoundError, match=rf"^{location}x is not there$"):
        next(pieces(location + "x", 9))


def test_patience_ends_with_the_url_the_tries_and_the_cause(location, monkeypatch):
    calls = fail(monkeypatch, MemoryFileSystem, "glob", [OSError(errno.EIO, "gone")] * 99)
    folder = location.removesuffix("/a.tar")
    message = rf"^{folder} could not be read in {remote.TRIES} tries; the last: gone$"
    with pytest.raises(StorageError, match=message):
        list_tars(folder)
    assert len(calls) == remote.TRIES


def test_reading_goes_on_where_it_was(location, monkeypatch):
    monkeypatch.setattr(remote, "PIECE_BYTES", 1000)
    failures = chain.from_iterable((None, None, Dropped("x"), None, TimeoutError()) for _ in "ab")
    calls = fail(monkeypatch, MemoryFile, "read", failures)
    assert b"".join(pieces(location, len(PAYLOAD))) == PAYLOAD
    assert len(calls) == -(-len(PAYLOAD) // 1000) + 4


def test_a_file_shorter_than_stated_is_an_error(location):
    received = pieces(location, len(PAYLOAD) + 1)
    assert next(received) == PAYLOAD
    with pytest.raises(StorageError, match=r"the last: only 10240 of 10241 bytes came$"):
        next(received)


def test_a_file_longer_than_stated_is_not_read_on(location):
    assert b"".join(pieces(location, 100)) == PAYLOAD[:100]


def test_a_size_that_the_store_does_not_know_is_an_error(location, monkeypatch):
    monkeypatch.setattr(MemoryFileSystem, "size", lambda self, path: None)
    with pytest.raises(StorageError, match="does not state the file's size"):
        size_bytes(location)


def test_a_missing_package_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(StorageError, match=r"gs://b/a: .*gcsfs.*; pip install -e '\.\[cloud\]'$"):
        size_bytes("gs://b/a")
