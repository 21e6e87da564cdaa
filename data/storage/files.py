"""Read files by path, or by URL with a scheme from a closed list."""

import errno
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from data.secrets import redact
from data.storage import remote
from data.storage.local_file import LocalFile
from data.storage.untrusted import UnsafeFileError, open_regular, read_file

REMOTE_SCHEMES = frozenset({"s3", "gs", "hf", "http", "https", "memory"})
"""Schemes that fsspec may open; all others (`pipe:`, `ssh:`, …) are refused."""
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)


def local_path(location: str) -> Path | None:
    """Return the path of a local file; None for a remote one.

    location: a path or URL. Raises: ValueError where the scheme is not allowed, or several URLs are
    chained by `::`, by which fsspec would open any scheme.
    """
    scheme, colon, _ = location.partition(":")
    if not colon or "/" in scheme:
        return Path(location)
    if scheme == "file":
        return Path(url2pathname(urlsplit(location).path))
    if scheme not in REMOTE_SCHEMES:
        allowed = ", ".join(sorted(REMOTE_SCHEMES | {"file"}))
        raise ValueError(
            f"{redact(location)}: the scheme {scheme}: is not allowed; use one of {allowed}"
        )
    if "::" in location:
        raise ValueError(
            f"{redact(location)}: URLs chained by :: are not allowed; name one file or folder"
        )
    return None


def join_location(base: str, name: str) -> str:
    """Join a folder, a path or URL, and a name relative to it."""
    return f"{base.rstrip('/')}/{name}" if base.strip("/") else f"{base}{name}"


def lies_in(location: str, places: Iterable[str]) -> bool:
    """Say whether a file or folder is one of these files and folders, or lies below one of them.

    Paths and URLs are compared as text, after `..` is resolved; links are not.
    Raises: ValueError where a scheme is not allowed.
    """
    known, here = set(map(_normal, places)), _normal(location)
    while here not in known:
        outer = here.rpartition("/")[0]
        if not outer or outer.endswith(":/"):
            return False
        here = outer
    return True


def _normal(location: str) -> str:
    path = local_path(location)
    if path is not None:
        return os.path.normpath(path.absolute())
    scheme, _, rest = location.partition("://")
    return f"{scheme}://{os.path.normpath(rest.lstrip('/'))}"


def read_bytes(location: str, *, limit: int) -> bytes:
    """Read a whole file of at most `limit` bytes, by path or URL.

    Raises: FileNotFoundError where it is missing; UnsafeFileError where it is larger or no regular
    file; OSError where it cannot be read; ValueError where the scheme is not allowed.
    """
    path = local_path(location)
    if path is not None:
        return read_file(path, limit=limit)
    size = remote.size_bytes(location)
    if size > limit:
        reason = f"{size} bytes are over the limit of {limit}"
        raise UnsafeFileError(errno.EFBIG, reason, location)
    return b"".join(remote.pieces(location, size))


def size_bytes(location: str) -> int:
    """Return the size of a file in bytes, by path or URL.

    Raises: as `read_bytes`.
    """
    path = local_path(location)
    return remote.size_bytes(location) if path is None else path.stat().st_size


def open_file(location: str, *, scratch: Path | None = None) -> LocalFile:
    """Open a file for reading by position, by path or URL.

    A remote file is first copied to an unnamed file in `scratch`, a folder with room for it; None:
    the system's temporary folder.
    Raises: FileNotFoundError where the file is missing; UnsafeFileError where it is no regular
    file; OSError where it cannot be read or copied; ValueError where the scheme is not allowed.
    """
    path = local_path(location)
    if path is not None:
        return LocalFile(open_regular(path), location)
    folder = Path(tempfile.gettempdir()) if scratch is None else scratch
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as copy:
            copy.writelines(remote.pieces(location, remote.size_bytes(location)))
            copy.flush()
            return LocalFile(os.dup(copy.fileno()), location)
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        remedy = "set TMPDIR to a larger disk" if scratch is None else "choose a larger disk"
        reason = f"no room for a copy of {redact(location)} ({error.strerror}): {remedy}"
        raise OSError(error.errno, reason, str(folder)) from error


def list_folder(folder: str) -> list[str]:
    """Return what lies directly in a folder, a path or URL, sorted; names of folders end with `/`.

    The result is empty where there is no such folder.
    Raises: OSError where it cannot be read; ValueError where the scheme is not allowed.
    """
    path = local_path(folder)
    if path is None:
        return remote.list_folder(folder)
    if not path.is_dir():
        return []
    return sorted(f"{one}/" if one.is_dir() else str(one) for one in path.iterdir())
