"""Open files that another user may have written.

A data set, a run folder, a checkpoint or an export can come from a stranger. A FIFO in it must not
make the program wait, a link must not make it read elsewhere, and a size must not fill the memory.
"""

import errno
import os
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path

_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_ENTER = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class UnsafeFileError(OSError):
    """The error of a file that is not opened; the message says why, and names the file."""


def open_regular(path: Path, *, below: Path | None = None) -> int:
    """Open a regular file for reading, without waiting; return its handle.

    below: folder that the file must lie in. Links inside that folder are followed; the folder may
    itself be a link. None: the user named this file, and all links are followed.
    Raises: UnsafeFileError where the path leads out of `below`, or to a folder, a device, a FIFO or
    a socket; FileNotFoundError where it is missing; OSError where it cannot be read.
    """
    if below is None:
        return _regular(path, partial(os.open, path, _READ))
    return _regular(path, partial(_open_below, path, below))


def read_file(path: Path, *, limit: int, below: Path | None = None) -> bytes:
    """Read a whole regular file of at most `limit` bytes.

    below: as for `open_regular`.
    Raises: UnsafeFileError where it is larger; others as `open_regular`.
    """
    with os.fdopen(open_regular(path, below=below), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            reason = f"{size} bytes are over the limit of {limit}"
            raise UnsafeFileError(errno.EFBIG, reason, str(path))
        return file.read(size)


def read_text(path: Path, *, limit: int, below: Path | None = None) -> str:
    """Read a text file of at most `limit` bytes; bytes that are not UTF-8 are replaced.

    Raises: as `read_file`.
    """
    return read_file(path, limit=limit, below=below).decode("utf-8", errors="replace")


def open_append(path: Path) -> int:
    """Open a regular file for reading and appending, and create it if it is missing.

    Returns its handle.

    The last part of the path may not be a link: it could lead to any file of the user.
    Raises: UnsafeFileError where it is a link or no regular file; OSError where it cannot be
    written.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    return _regular(path, partial(os.open, path, flags, 0o666))


def _regular(path: Path, open_path: Callable[[], int]) -> int:
    """Open a path, and check that it is a regular file; return its handle."""
    reason = "this is no regular file, and is not opened"
    try:
        handle = open_path()
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a link, a socket, a FIFO without a reader
            raise UnsafeFileError(errno.EPERM, reason, str(path)) from error
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise UnsafeFileError(errno.EPERM, reason, str(path))
    return handle


def _open_below(path: Path, below: Path) -> int:
    """Open a file for reading by its folders, of which none may become a link meanwhile."""
    root, target = Path(os.path.realpath(below)), Path(os.path.realpath(path))
    if not target.is_relative_to(root):
        reason = f"a link leads out of {below}, and is not followed"
        raise UnsafeFileError(errno.EPERM, reason, str(path))
    *folders, name = target.relative_to(root).parts or (".",)
    place = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for folder in folders:
            inner = os.open(folder, _ENTER, dir_fd=place)
            os.close(place)
            place = inner
        return os.open(name, _READ | os.O_NOFOLLOW, dir_fd=place)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        os.close(place)
