"""Read files behind a URL, piece by piece; failed requests are repeated.

Each new try is logged. The retries of s3fs are switched off, because s3fs does not log them.
"""

import logging
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, TypeVar
from urllib.parse import urlsplit

import fsspec
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt
from tenacity.wait import wait_random_exponential
from typing_extensions import override

from data.secrets import redact

PIECE_BYTES = 2**24
"""Size of a request, held in memory."""
TRIES = 12
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 30.0
"""Upper limits of the random waits: the first, which doubles with every try, and the largest. All
waits together last 105 s on average."""

_fsspec: Any = fsspec
"""The module without its types, which are incomplete."""

_FINAL_ERRORS = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    NotImplementedError,
    TypeError,
    ValueError,
)
"""Errors that another try does not mend."""

_VERSION = (
    "ETag",
    "etag",
    "md5Hash",
    "Content-MD5",
    "Digest",
    "blob_id",
    "Last-Modified",
    "created",
)
"""Names by which stores state a hash of a file's content, or its time."""

_log = logging.getLogger(__name__)

T = TypeVar("T")


class StorageError(OSError):
    """The error of a store that cannot be read; the message names the URL and the cause."""

    def __init__(self, message: str) -> None:
        super().__init__(redact(message))


def size_bytes(location: str) -> int:
    """Return the size of a file in bytes, as its store states it.

    Raises: as `describe`.
    """
    return describe(location)[0]


def describe(location: str) -> tuple[int, str]:
    """Return the size of a file in bytes, and the hash and time that its store states.

    The second is empty where the store states neither.
    Raises: FileNotFoundError where the file is missing; StorageError where the store does not
    answer, or does not state the size.
    """
    store, root = _open_store(location)
    facts = _persist(location, lambda: store.info(root))
    if facts.get("size") is None:
        raise StorageError(f"{location}: the server does not state the file's size")
    return facts["size"], " ".join(str(facts[name]) for name in _VERSION if facts.get(name))


def pieces(location: str, size_bytes: int) -> Iterator[bytes]:
    """Yield a file of a known size in pieces of PIECE_BYTES or less.

    After a failure, reading goes on at the byte reached.
    Raises: FileNotFoundError where the file is missing; StorageError where the store does not
    answer, or returns fewer bytes.
    """
    reader = _Reader(location, size_bytes)
    while reader.offset < size_bytes:
        yield _persist(location, reader.read)


def list_folder(folder: str) -> list[str]:
    """Return the URLs of what lies directly in a folder, sorted; those of folders end with `/`.

    The result is empty where there is no such folder.
    Raises: StorageError where the store does not answer.
    """
    store, root = _open_store(folder)
    try:
        found = _persist(folder, lambda: store.ls(root.rstrip("/"), detail=True))
    except FileNotFoundError:
        return []
    names = ((one["name"].rstrip("/"), one["type"] == "directory") for one in found)
    return sorted(store.unstrip_protocol(name) + "/" * is_folder for name, is_folder in names)


class _Reader:
    """Reads a file in order, and opens it again after a failure."""

    def __init__(self, location: str, size_bytes: int) -> None:
        self._store, self._root = _open_store(location)
        self._size_bytes = size_bytes
        self._file: Any = None
        self._block_bytes = PIECE_BYTES
        self.offset = 0

    def read(self) -> bytes:
        """Return the next piece; it is not empty."""
        file, self._file = self._file or self._open(), None
        try:
            piece = file.read(min(PIECE_BYTES, self._size_bytes - self.offset))
        except ValueError:
            if self._block_bytes == 0:
                raise
            self._block_bytes = 0  # the web server does not support ranges
            return self.read()
        self._check(piece, self.offset)
        if len(piece) > min(PIECE_BYTES, self._size_bytes - self.offset):
            raise ValueError("the server sent more bytes than were asked for")
        self._file = file
        self.offset += len(piece)
        return piece

    def _open(self) -> Any:
        file = self._store.open(self._root, "rb", block_size=self._block_bytes, cache_type="none")
        if self._block_bytes:
            file.seek(self.offset)
            return file
        skipped = 0
        while skipped < self.offset:
            piece = file.read(min(PIECE_BYTES, self.offset - skipped))
            self._check(piece, skipped)
            skipped += len(piece)
        return file

    def _check(self, piece: bytes, offset: int) -> None:
        if not piece:
            raise StorageError(f"only {offset} of {self._size_bytes} bytes came")


def _open_store(location: str) -> tuple[Any, str]:
    """Return fsspec's file system for a URL, and the path in that file system."""
    options: dict[str, Any] = {"use_listings_cache": False}
    if location.startswith("http"):
        configured = _fsspec.config.conf.get(urlsplit(location).scheme, {})
        options["client_kwargs"] = configured.get("client_kwargs", {}) | _plain_answers()
    if location.startswith("s3:"):
        configured = _fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
        options["config_kwargs"] = {"retries": {"total_max_attempts": 1}} | configured
    try:
        store, root = _fsspec.core.url_to_fs(location, **options)
    except ImportError as error:
        raise StorageError(f"{location}: {error}; pip install -e '.[cloud]'") from error
    if location.startswith("s3:"):
        store.retries = 1
    return store, root


@cache
def _plain_answers() -> dict[str, Any]:
    """Return options of aiohttp's client by which an answer is never larger than a piece.

    A compressed answer of one megabyte could fill a gigabyte of memory; shards are not compressible
    anyway.
    """
    import aiohttp  # only with a store behind HTTP: it takes a third of a second

    class Answer(aiohttp.ClientResponse):
        @override
        async def read(self) -> bytes:
            if self._body is None:
                self._body = await self._read_bounded()
            return self._body

        async def _read_bounded(self) -> bytes:
            content = bytearray()
            if self.headers.get("Content-Encoding", "identity") != "identity":
                self.close()
                raise NotImplementedError("the server sent a compressed answer")
            while part := await self.content.readany():
                content += part
                if len(content) > PIECE_BYTES:
                    self.close()
                    raise NotImplementedError("the server sent more bytes than were asked for")
            return bytes(content)

    headers = {"Accept-Encoding": "identity"}
    return {"response_class": Answer, "auto_decompress": False, "headers": headers}


def _persist(location: str, read: Callable[[], T]) -> T:
    """Call `read` until it succeeds, with longer waits each time; raise after TRIES."""

    def warn(state: RetryCallState) -> None:
        cause = _cause(state.outcome.exception() if state.outcome else None)
        number, wait_s = state.attempt_number + 1, state.upcoming_sleep
        _log.warning(
            "data: %s failed (%s), try %d of %d in %.1f s",
            redact(location),
            redact(cause),
            number,
            TRIES,
            wait_s,
        )

    patience = Retrying(
        stop=stop_after_attempt(TRIES),
        wait=wait_random_exponential(FIRST_WAIT_S, LONGEST_WAIT_S),
        retry=retry_if_exception(lambda error: _is_transient(error, location)),
        before_sleep=warn,
        reraise=True,
    )
    try:
        return patience(read)
    except Exception as error:
        if _is_transient(error, location):
            message = f"{location} could not be read in {TRIES} tries; the last: {_cause(error)}"
        elif isinstance(error, FileNotFoundError):
            raise FileNotFoundError(f"{redact(location)} is not there") from error
        else:
            message = f"{location} could not be read: {_cause(error)}"
        raise StorageError(message) from error


def _is_transient(error: BaseException, location: str) -> bool:
    """Say whether another try may succeed. Stores share no class of errors."""
    by_http = urlsplit(location).scheme in ("http", "https")
    if by_http and isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        error = error.__cause__  # fsspec's client reports every failure as a missing file
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return status >= 500 or status in (408, 429)
    if type(error).__name__.endswith("CredentialsError"):
        return False
    return isinstance(error, Exception) and not isinstance(error, _FINAL_ERRORS)


def _cause(error: BaseException | None) -> str:
    text = " ".join(str(getattr(error, "strerror", None) or error).split())
    return text[:120] if text else type(error).__name__
