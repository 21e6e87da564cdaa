"""Patience with stores: transient failures are sat out, others are reported at once."""

import errno
import gzip
import sys
import tracemalloc
from collections.abc import Iterable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from pathlib import Path
from threading import Thread
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from typing_extensions import override

from data.storage import remote
from data.storage.remote import StorageError, list_folder, pieces, size_bytes

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
def location(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(remote, "LONGEST_WAIT_S", 0.01)
    location = f"memory://{tmp_path.name}/a.tar"
    store, path = fsspec.core.url_to_fs(location)
    store.pipe_file(path, PAYLOAD)
    return location


def fail(
    monkeypatch: pytest.MonkeyPatch, cls: type, method: str, failures: Iterable[Exception | None]
) -> list[tuple[Any, ...]]:
    """Let a method raise each of the failures before it works; return the calls it gets."""
    calls, works = [], getattr(cls, method)
    left = iter(failures)

    def faulty(self: object, *args: Any, **options: Any) -> Any:
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
def test_failures_that_pass_are_sat_out_with_a_line_each(
    location: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    failure: Exception,
) -> None:
    calls = fail(monkeypatch, MemoryFileSystem, "info", [failure] * 3)
    assert size_bytes(location) == len(PAYLOAD)
    assert len(calls) == 4
    assert len(caplog.messages) == 3
    assert caplog.messages[1].startswith(f"data: {location} failed (")
    assert f"), try 3 of {remote.TRIES} in 0.0 s" in caplog.messages[1]
    assert "\n" not in "".join(caplog.messages)


@pytest.mark.parametrize("failure", FINAL, ids=repr)
def test_a_refusal_is_reported_at_once(
    location: str, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    calls = fail(monkeypatch, MemoryFileSystem, "info", [failure])
    with pytest.raises(StorageError, match=rf"^{location} could not be read: {failure}$"):
        size_bytes(location)
    assert len(calls) == 1


def test_a_missing_file_is_reported_at_once(location: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fail(monkeypatch, MemoryFileSystem, "info", [])
    with pytest.raises(FileNotFoundError, match=rf"^{location}x is not there$"):
        size_bytes(location + "x")
    assert len(calls) == 1
    with pytest.raises(FileNotFoundError, match=rf"^{location}x is not there$"):
        next(pieces(location + "x", 9))


def test_patience_ends_with_the_url_the_tries_and_the_cause(
    location: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = fail(monkeypatch, MemoryFileSystem, "ls", [OSError(errno.EIO, "gone")] * 99)
    folder = location.removesuffix("/a.tar")
    message = rf"^{folder} could not be read in {remote.TRIES} tries; the last: gone$"
    with pytest.raises(StorageError, match=message):
        list_folder(folder)
    assert len(calls) == remote.TRIES


def test_reading_goes_on_where_it_was(location: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PIECE_BYTES", 1000)
    failures = chain.from_iterable((None, None, Dropped("x"), None, TimeoutError()) for _ in "ab")
    calls = fail(monkeypatch, MemoryFile, "read", failures)
    assert b"".join(pieces(location, len(PAYLOAD))) == PAYLOAD
    assert len(calls) == -(-len(PAYLOAD) // 1000) + 4


def test_a_file_shorter_than_stated_is_an_error(location: str) -> None:
    received = pieces(location, len(PAYLOAD) + 1)
    assert next(received) == PAYLOAD
    with pytest.raises(StorageError, match=r"the last: only 10240 of 10241 bytes came$"):
        next(received)


def test_a_file_longer_than_stated_is_not_read_on(location: str) -> None:
    assert b"".join(pieces(location, 100)) == PAYLOAD[:100]


def test_a_size_that_the_store_does_not_know_is_an_error(
    location: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MemoryFileSystem, "info", lambda self, path: {"size": None})
    with pytest.raises(StorageError, match="does not state the file's size"):
        size_bytes(location)


def test_a_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(StorageError, match=r"gs://b/a: .*gcsfs.*; pip install -e '\.\[cloud\]'$"):
        size_bytes("gs://b/a")


class Liar(BaseHTTPRequestHandler):
    """A web server that states 1,000 bytes and sends `body`."""

    protocol_version = "HTTP/1.1"
    body, encoding = b"", ""

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()

    def do_GET(self) -> None:
        self.send_response(206)
        if self.encoding:
            self.send_header("Content-Encoding", self.encoding)
        self.send_header("Content-Range", "bytes 0-999/1000")
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        with suppress(ConnectionError):
            self.wfile.write(self.body)

    @override
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Liar) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/a.json"
        server.shutdown()
        thread.join()


ANSWERS = {
    "compressed": (gzip.compress(bytes(2**28)), "gzip", "the server sent a compressed answer"),
    "endless": (bytes(2**22), "", "the server sent more bytes than were asked for"),
    "longer": (bytes(1001), "", "the server sent more bytes than were asked for"),
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_answers_larger_than_the_question_are_refused(
    server: str, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    body, encoding, reason = ANSWERS[kind]
    monkeypatch.setattr(Liar, "body", body)
    monkeypatch.setattr(Liar, "encoding", encoding)
    monkeypatch.setattr(remote, "PIECE_BYTES", 2**16)
    tracemalloc.start()
    with pytest.raises(StorageError, match=reason):
        b"".join(pieces(server, 1000))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10e6


def test_an_honest_answer_is_read(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Liar, "body", PAYLOAD[:1000])
    monkeypatch.setattr(Liar, "encoding", "")
    assert size_bytes(server) == 1000
    assert b"".join(pieces(server, 1000)) == PAYLOAD[:1000]
