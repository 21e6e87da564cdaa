"""Keep copies of remote files on a local disk: fetched once a node, verified, of bounded size.

A complete file has the SHA-256 of its bytes for a name. Locks (flock) show which files may be
deleted; the kernel releases a lock with the last process that holds it:

- `HASH` with a shared lock is being read, or will be soon. Files without a lock are evicted, the
  longest unused first.
- `HASH.part` with a lock is being fetched. Files without a lock are left from killed processes.
- `lock` is locked during evictions.

The lock of a file lasts until it is closed.
"""

import errno
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock
from typing import NamedTuple
from weakref import WeakSet

from data.config import CacheConfig
from data.shards.manifest import ManifestError
from data.storage import remote
from data.storage.local_file import LocalFile
from data.storage.private import is_own, private_folder

GIB = 2**30
AHEAD_SHARE = 0.5
"""Largest share of the room for files fetched ahead; the rest is for files that are read now."""
POLL_S = 0.02
"""Interval between looks for a file that another process is fetching."""

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_NAME = re.compile(r"[0-9a-f]{64}")


class CacheFullError(OSError):
    """The error of a cache without room for a file; the message names the option to change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedFile:
    """A file in a manifest's list."""

    location: str
    """Path or URL."""
    sha256: str
    size_bytes: int | None = None
    """None: the manifest does not state the size."""


class _CachedFile(NamedTuple):
    used_s: float
    size_bytes: int
    path: Path


class FileCache:
    """A folder of fetched files that the processes of a node share.

    config: the folder and its largest size. Files in the folder are believed by their names, so no
    other user may be able to write to it.
    """

    def __init__(self, config: CacheConfig) -> None:
        default = Path(tempfile.gettempdir()) / f"latent-foundry-{os.getuid()}"
        self._folder = Path(config.dir) if config.dir else default
        self._max_bytes = int(config.max_gib * GIB)

    def map(self, file: ListedFile) -> LocalFile:
        """Open a file for reading by position; fetch it if no process of the node has fetched it.

        Raises: FileNotFoundError where the store has no such file; ManifestError where its size or
        hash differs; CacheFullError where the files in use leave no room; OSError where the store
        or the disk fails; PermissionError where another user could change the folder.
        """
        return LocalFile(self.hold(file), file.location)

    def hold(self, file: ListedFile, *, ahead: Event | None = None) -> int:
        """Open a file, fetched if necessary; it is not evicted before the handle is closed.

        ahead: given for a file that is not needed yet; the fetch stops when the event is set.
        Raises: InterruptedError where `ahead` was set during the fetch; others as `map`.
        """
        if not _NAME.fullmatch(file.sha256):
            raise ManifestError(f"{file.location}: {file.sha256!r} in the manifest is no SHA-256")
        path = self._folder / file.sha256
        part = path.with_suffix(".part")
        while True:
            handle = self._open_locked(path, fcntl.LOCK_SH, os.O_RDONLY)
            if handle is not None:
                if is_own(handle) and file.size_bytes in (None, os.fstat(handle).st_size):
                    os.utime(handle)
                    return handle
                _drop(path, handle)
            handle = self._open_locked(part, fcntl.LOCK_EX | fcntl.LOCK_NB, os.O_RDWR | os.O_CREAT)
            if handle is None:
                # do not wait for the lock: its holder keeps it as long as it uses the file
                time.sleep(POLL_S)
                continue
            if path.exists():  # fetched by another process since the first look
                _drop(part, handle)
                continue
            try:
                self._fetch(file, handle, ahead)
                part.replace(path)
            except BaseException:
                _drop(part, handle)
                raise
            os.close(handle)

    def _open_locked(self, path: Path, operation: int, flags: int) -> int | None:
        private_folder(self._folder, option="data.cache.dir")
        try:
            return _lock(path, operation, flags)
        except OSError as error:
            raise OSError(f"data.cache.dir: {error}") from error

    def _fetch(self, file: ListedFile, handle: int, ahead: Event | None) -> None:
        """Fetch a file into the open file `handle`, and verify its size and hash."""
        size_bytes = remote.size_bytes(file.location)
        if file.size_bytes not in (None, size_bytes):
            raise ManifestError(
                f"{file.location} has {size_bytes} bytes, but the manifest says {file.size_bytes}: "
                "it was cut off or replaced; restore it or pack again"
            )
        os.ftruncate(handle, 0)
        self._reserve(file, size_bytes, handle, ahead is not None)
        digest = hashlib.sha256()
        try:
            with open(handle, "wb", closefd=False) as copy:
                for piece in remote.pieces(file.location, size_bytes):
                    if ahead is not None and ahead.is_set():
                        raise InterruptedError(f"{file.location} is not needed any more")
                    digest.update(piece)
                    copy.write(piece)
            os.fsync(handle)
        except OSError as error:
            if error.errno in _DISK_FULL:
                raise self._disk_full(file) from error
            raise
        if digest.hexdigest() != file.sha256:
            raise ManifestError(
                f"{file.location} is not the file of the manifest: its hash differs; "
                "it was replaced or damaged; restore it or pack again"
            )

    def _reserve(self, file: ListedFile, size_bytes: int, handle: int, ahead: bool) -> None:
        """Reserve disk blocks for the open file `handle`; evict idle files to make room.

        Raises: CacheFullError where the files in use leave no room.
        """
        with self._making_room():
            files = sorted(self._files())
            total = sum(cached.size_bytes for cached in files)
            free = shutil.disk_usage(self._folder).free
            room = AHEAD_SHARE * min(self._max_bytes, total + free)
            if ahead and total + size_bytes > room:
                in_use = sum(cached.size_bytes for cached in files if not _is_idle(cached.path))
                if in_use + size_bytes > room:
                    raise self._bound_reached(file, size_bytes, in_use)
            oldest = iter(files)
            while total + size_bytes > self._max_bytes or not _allocate(handle, size_bytes):
                evicted = next((cached for cached in oldest if _evict(cached.path)), None)
                if evicted is not None:
                    total -= evicted.size_bytes
                elif total + size_bytes > self._max_bytes:
                    raise self._bound_reached(file, size_bytes, total)
                else:
                    raise self._disk_full(file)

    def _files(self) -> Iterator[_CachedFile]:
        """Yield the files of the cache; delete the unfinished ones of killed processes."""
        for entry in os.scandir(self._folder):
            path = Path(entry.path)
            if not _NAME.fullmatch(entry.name.removesuffix(".part")):
                continue
            if path.suffix and _evict(path):
                continue
            try:
                status = entry.stat()
            except FileNotFoundError:
                continue
            yield _CachedFile(status.st_mtime, status.st_size, path)

    @contextmanager
    def _making_room(self) -> Generator[None, None, None]:
        handle = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def _bound_reached(self, file: ListedFile, size_bytes: int, in_use: int) -> CacheFullError:
        return CacheFullError(
            f"data.cache.max_gib: {self._max_bytes / GIB:.3g} GiB do not hold the "
            f"{in_use / GIB:.3g} GiB in use and {file.location} of {size_bytes / GIB:.3g} GiB; "
            "raise it, or use smaller shards"
        )

    def _disk_full(self, file: ListedFile) -> CacheFullError:
        return CacheFullError(
            f"data.cache.dir: the disk of {self._folder} has no room for {file.location}; "
            "free some, or choose another folder"
        )


class Prefetcher:
    """A thread that fetches files before they are needed, and holds them against eviction.

    An error ends the thread's work until the next call of `want`. The reader of the file then
    fetches it again and raises the error.
    """

    def __init__(self, cache: FileCache) -> None:
        self._cache = cache
        self._wanted: list[ListedFile] = []
        self._held: dict[str, int] = {}
        self._lock = Lock()
        self._closed = Event()
        self._pool = ThreadPoolExecutor(1, "prefetch")
        _prefetchers.add(self)

    def want(self, files: list[ListedFile]) -> None:
        """Replace the list of files that will be needed; the first is fetched first."""
        if files == self._wanted:
            return
        with self._lock:
            self._wanted = files
            for name in self._held.keys() - {file.sha256 for file in files}:
                os.close(self._held.pop(name))
        self._pool.submit(self._fetch_wanted)

    def close(self) -> None:
        """Stop fetching, and release all files."""
        self._closed.set()
        self._pool.shutdown(cancel_futures=True)
        self.release()

    def release(self) -> None:
        """Allow the eviction of all files."""
        while self._held:
            os.close(self._held.popitem()[1])

    def _fetch_wanted(self) -> None:
        while not self._closed.is_set():
            with self._lock:
                missing = (file for file in self._wanted if file.sha256 not in self._held)
                file = next(missing, None)
            if file is None:
                return
            try:
                handle = self._cache.hold(file, ahead=self._closed)
            except (OSError, ValueError):
                return
            with self._lock:
                if file in self._wanted:
                    self._held[file.sha256] = handle
                else:
                    os.close(handle)


_prefetchers: WeakSet[Prefetcher] = WeakSet()


def _release_inherited() -> None:
    """Close inherited handles in a new worker: they would block evictions during its life."""
    for prefetcher in _prefetchers:
        prefetcher.release()


os.register_at_fork(after_in_child=_release_inherited)


def _lock(path: Path, operation: int, flags: int = os.O_RDONLY) -> int | None:
    """Open and lock a file; None if it is missing, already locked, or deleted during the wait."""
    try:
        handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, operation)
    except BlockingIOError:
        os.close(handle)
        return None
    except BaseException:
        os.close(handle)
        raise
    if _is_at(path, handle):
        return handle
    os.close(handle)
    return None


def _is_at(path: Path, handle: int) -> bool:
    """Say whether `path` is still the name of the open file `handle`."""
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def _drop(path: Path, handle: int) -> None:
    path.unlink(missing_ok=True)
    os.close(handle)


def _is_idle(path: Path) -> bool:
    handle = _lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if handle is not None:
        os.close(handle)
    return handle is not None


def _evict(path: Path) -> bool:
    """Delete a file unless it is in use; say whether it was deleted."""
    handle = _lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if handle is not None:
        _drop(path, handle)
    return handle is not None


def _allocate(handle: int, size_bytes: int) -> bool:
    """Reserve disk blocks before a fetch; say whether the disk has room."""
    try:
        if size_bytes:
            os.posix_fallocate(handle, 0, size_bytes)
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        os.ftruncate(handle, 0)
        return False
    return True
