"""Files behind a URL: read piece by piece, with patience for stores that fail now and then.

Each try is announced, so s3fs must not try again on its own.
"""

import logging
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from urllib.parse import urlsplit

import fsspec
import fsspec.config
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt
from tenacity.wait import wait_random_exponential

PIECE_BYTES = 2**24
"""How much of a file is asked for at a time, and held in memory."""
TRIES = 12
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 30.0
"""Waits are drawn below a limit that doubles: an outage of a minute and a half is sat out."""

_FINAL_ERRORS = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    NotImplementedError,
    TypeError,
    ValueError,
)
"""What another try does not mend."""

_log = logging.getLogger(__name__)

T = TypeVar("T")


class StorageError(OSError):
    """A store that cannot be read; the message names the URL and the cause."""


def size_bytes(location: str) -> int:
    """Return the size that the store states.

    Raises:
        FileNotFoundError: nothing is there.
        StorageError: the store did not answer, or does not know.
    """
    store, root = _open_store(location)
    size = _persist(location, lambda: store.size(root))
    if size is None:
        raise StorageError(f"{location}: the server does not state the file's size")
    return size


def pieces(location: str, size_bytes: int) -> Iterator[bytes]:
    """Yield a file of a known size in pieces; after a failure, reading goes on where it was.

    Raises:
        FileNotFoundError: nothing is there.
        StorageError: the store did not answer, or gave fewer bytes.
    """
    reader = _Reader(location, size_bytes)
    while reader.offset < size_bytes:
        yield _persist(location, reader.read)


def list_tars(folder: str) -> list[str]:
    """Return the URLs of the .tar files right in a folder, sorted by name."""
    store, root = _open_store(folder)
    names = _persist(folder, lambda: store.glob(f"{root.rstrip('/')}/*.tar"))
    return sorted(store.unstrip_protocol(name) for name in names)


class _Reader:
    """A file that is opened anew after a failure."""

    def __init__(self, location: str, size_bytes: int) -> None:
        self._store, self._root = _open_store(location)
        self._size_bytes = size_bytes
        self._file: Any = None
        self._block_bytes = PIECE_BYTES
        self.offset = 0

    def read(self) -> bytes:
        """Return the next piece, which is not empty."""
        file, self._file = self._file or self._open(), None
        try:
            piece = file.read(min(PIECE_BYTES, self._size_bytes - self.offset))
        except ValueError:
            if self._block_bytes == 0:
                raise
            self._block_bytes = 0  # a web server that does not serve ranges
            return self.read()
        self._check(piece, self.offset)
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
    """Return fsspec's file system for a URL, and the path within it."""
    options: dict[str, Any] = {"use_listings_cache": False}
    if location.startswith("s3:"):
        configured = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
        options["config_kwargs"] = {"retries": {"total_max_attempts": 1}} | configured
    try:
        store, root = fsspec.core.url_to_fs(location, **options)
    except ImportError as error:
        raise StorageError(f"{location}: {error}; pip install -e '.[cloud]'") from error
    if location.startswith("s3:"):
        store.retries = 1
    return store, root


def _persist(location: str, read: Callable[[], T]) -> T:
    """Call `read` until the store answers, waiting longer each time."""

    def warn(state: RetryCallState) -> None:
        cause = _cause(state.outcome.exception() if state.outcome else None)
        number, wait_s = state.attempt_number + 1, state.upcoming_sleep
        _log.warning(
            "data: %s failed (%s), try %d of %d in %.1f s", location, cause, number, TRIES, wait_s
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
            raise FileNotFoundError(f"{location} is not there") from error
        else:
            message = f"{location} could not be read: {_cause(error)}"
        raise StorageError(message) from error


def _is_transient(error: BaseException, location: str) -> bool:
    """Tell a store that fails from one that says no; stores share no class of errors."""
    by_http = urlsplit(location).scheme in ("http", "https")
    if by_http and isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        error = error.__cause__  # fsspec's client calls every failure a missing file
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return status >= 500 or status in (408, 429)
    if type(error).__name__.endswith("CredentialsError"):
        return False
    return isinstance(error, Exception) and not isinstance(error, _FINAL_ERRORS)


def _cause(error: BaseException | None) -> str:
    text = " ".join(str(getattr(error, "strerror", None) or error).split())
    return text[:120] if text else type(error).__name__
