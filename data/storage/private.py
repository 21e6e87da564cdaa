"""Folders that no other user can change: caches of data and of compiled code."""

import os
import stat
from pathlib import Path

_ROOT = 0
_UNMAPPED = 65534
"""Owner of the system's files in a container whose user namespace does not map root."""


def private_folder(folder: Path, *, option: str) -> Path:
    """Make a folder with mode 0700, or check an existing one; return its path.

    Files in it are believed without another look. Therefore this user must own it, nobody else may
    write to it, and nobody else may put another folder in its place.
    option: config path or variable that names the folder, for the error.
    Raises: PermissionError where another user could change the folder; OSError where it cannot be
    made.
    """
    try:
        for outer in reversed((folder, *folder.parents)):
            if not outer.exists():
                outer.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise OSError(f"{option}: {error}") from error
    problem = _problem(folder.absolute()) or _problem(Path(os.path.realpath(folder)))
    if problem:
        raise PermissionError(
            f"{option}: {problem}, so its content cannot be trusted: choose a folder of your own"
        )
    return folder


def is_own(handle: int) -> bool:
    """Say whether this user owns an open file, and alone can write to it."""
    status = os.fstat(handle)
    own = status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return own and stat.S_ISREG(status.st_mode) and status.st_nlink == 1


def _problem(folder: Path) -> str:
    """Say in words who else could change a folder; empty if nobody could."""
    own, status = os.getuid(), folder.stat()
    if status.st_uid != own:
        return f"{folder} belongs to user {status.st_uid}"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"other users can write to {folder} (chmod go-w)"
    for outer in (folder, *folder.parents):
        status = outer.lstat()
        if status.st_uid not in (own, _ROOT, _UNMAPPED):
            return f"{outer} belongs to user {status.st_uid}"
        is_open = status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX
        if is_open and not stat.S_ISLNK(status.st_mode):
            return f"every user can rename what is in {outer} (chmod o-w)"
    return ""
