"""Bytes by path or URL: a closed list of schemes, and writes that are never seen half done."""

import mmap
import os
import tempfile
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from data import remote

REMOTE_SCHEMES = frozenset({"s3", "gs", "hf", "http", "https", "memory"})
"""What fsspec may open for us; everything else (`pipe:`, `ssh:`, …) is refused by name."""


def local_path(location: str) -> Path | None:
    """Return the local file that `location` names, or None if it is remote.

    Raises:
        ValueError: the scheme is not on the list.
    """
    scheme, colon, _ = location.partition(":")
    if not colon or "/" in scheme:
        return Path(location)
    if scheme == "file":
        return Path(url2pathname(urlsplit(location).path))
    if scheme not in REMOTE_SCHEMES:
        allowed = ", ".join(sorted(REMOTE_SCHEMES | {"file"}))
        raise ValueError(f"{location}: the scheme {scheme}: is not allowed; use one of {allowed}")
    return None


def join(base: str, name: str) -> str:
    """Join a folder (path or URL) and a relative name."""
    return f"{base.rstrip('/')}/{name}" if base.strip("/") else f"{base}{name}"


def read_bytes(location: str) -> bytes:
    """Read a whole file.

    Raises:
        FileNotFoundError: nothing is there.
        OSError: the file or the store could not be read.
    """
    path = local_path(location)
    if path is not None:
        return path.read_bytes()
    return b"".join(remote.pieces(location, remote.size_bytes(location)))


def size_bytes(location: str) -> int:
    """Return a file's size.

    Raises:
        FileNotFoundError: nothing is there.
        OSError: the store could not be read.
    """
    path = local_path(location)
    return remote.size_bytes(location) if path is None else path.stat().st_size


def map_bytes(location: str) -> mmap.mmap | bytes:
    """Map a file into memory, read-only; a remote one is fetched whole to an unnamed local file.

    An empty file, which cannot be mapped, gives empty bytes.

    Raises:
        FileNotFoundError: nothing is there.
        OSError: the file or the store could not be read.
    """
    path = local_path(location)
    if path is not None:
        with path.open("rb") as file:
            return map_open(file.fileno())
    with tempfile.TemporaryFile() as copy:
        copy.writelines(remote.pieces(location, remote.size_bytes(location)))
        copy.flush()
        return map_open(copy.fileno())


def map_open(handle: int) -> mmap.mmap | bytes:
    """Map an open file as `map_bytes` does; the mapping has its own duplicate of the handle."""
    empty = os.fstat(handle).st_size == 0
    return b"" if empty else mmap.mmap(handle, 0, access=mmap.ACCESS_READ)


def list_tars(folder: str) -> list[str]:
    """Return the .tar files right in a folder (path or URL), sorted by name."""
    path = local_path(folder)
    if path is not None:
        return sorted(str(tar) for tar in path.glob("*.tar"))
    return remote.list_tars(folder)


def temporary_beside(path: Path) -> Path:
    """Create an empty file beside `path`, hidden and unlike any other writer's.

    Renaming it to `path` is atomic, as both are on one file system.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.fchmod(handle, 0o644)
    os.close(handle)
    return Path(name)


def commit(temporary: Path, path: Path) -> None:
    """Make `temporary` appear as `path`: its bytes reach the disk before its name does."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_atomic(path: Path, payload: bytes) -> None:
    """Write a local file whole or not at all, whatever dies in between."""
    temporary = temporary_beside(path)
    try:
        temporary.write_bytes(payload)
        commit(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
