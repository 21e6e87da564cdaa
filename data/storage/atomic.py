"""Write local files and folders whole or not at all, also if the process dies.

New content is written under a hidden name in the same folder, `.NAME.RANDOM.part`. Its bytes reach
the disk (fsync) before it is renamed to NAME, and the name reaches the disk before the call ends.
Until the rename the old file stays unchanged. An error removes the hidden file. A killed process
leaves it behind, and `remove_leftovers` deletes it.
"""

import glob
import os
import secrets
import shutil
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from data.storage.untrusted import open_append


def write_atomic(path: Path, payload: bytes) -> None:
    """Write a file whole or not at all; make its folder if it is missing.

    Raises: OSError where the file cannot be written; an old file at `path` stays unchanged.
    """
    with atomic_path(path) as part, os.fdopen(_open_own(part), "wb") as file:
        file.write(payload)


def append_lines(path: Path, lines: Sequence[str]) -> None:
    """Append lines to a file, all of them or none; several processes may append to one file.

    A torn last line, which a killed process left, is ended first. The bytes reach the disk before
    the call ends: some disks say only then that they are full.
    Raises: OSError where the lines cannot be written, or the folder is missing; as `open_append`.
    """
    if not lines:
        return
    payload = "".join(f"{line}\n" for line in lines).encode(errors="surrogateescape")
    handle = open_append(path)
    try:
        size = os.fstat(handle).st_size
        if size and os.pread(handle, 1, size - 1) != b"\n":
            payload = b"\n" + payload
        with named(path):
            _append(handle, payload, size)
    finally:
        os.close(handle)


def _append(handle: int, payload: bytes, size: int) -> None:
    """Write to the end of a file of `size` bytes; cut off a part that was written before an error.

    What another process has appended since is not cut off.
    """
    written = 0
    try:
        while written < len(payload):  # a disk that fills up takes a part first
            written += os.write(handle, payload[written:])
        os.fsync(handle)
    except OSError:
        with suppress(OSError):
            if os.fstat(handle).st_size == size + written:
                os.ftruncate(handle, size)
        raise


@contextmanager
def atomic_path(path: Path) -> Generator[Path, None, None]:
    """Yield an empty hidden file, which becomes `path` when the block ends without an error.

    This serves libraries that write to a path. The hidden name is unique to this call.
    Raises: OSError where the file cannot be written; an old file at `path` stays unchanged.
    """
    part = hidden_file(path)
    mode = part.stat().st_mode
    try:
        with named(path):
            yield part
            part.chmod(mode)  # some libraries write a private file and rename it
            commit(part, path)
    finally:
        part.unlink(missing_ok=True)


def hidden_file(path: Path) -> Path:
    """Create an empty hidden file beside `path`, under a name that no other writer has.

    The name cannot be guessed, and a file or link of that name is never opened.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _hidden_name(path)
    part.touch(exist_ok=False)
    return part


def commit(part: Path, path: Path) -> None:
    """Rename a hidden file to `path`, after its bytes have reached the disk."""
    sync(part)
    part.replace(path)
    sync(path.parent)


@contextmanager
def atomic_folder(path: Path) -> Generator[Path, None, None]:
    """Yield an empty hidden folder, which becomes `path` when the block ends without an error.

    Raises: OSError where the folder cannot be written; an old one at `path` stays unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _hidden_name(path)
    part.mkdir()
    try:
        yield part
        for folder, _, names in os.walk(part, topdown=False):
            for name in names:
                Path(folder, name).chmod(part.stat().st_mode & 0o666)  # as in atomic_path
                sync(Path(folder, name))
            sync(Path(folder))
        replace_folder(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def replace_folder(source: Path, target: Path) -> None:
    """Rename a folder to `target`; an old file, link or folder there is removed after it."""
    old = target.with_name(f".old_{target.name}")
    if os.path.lexists(target):
        remove(old)
        target.rename(old)
    source.rename(target)
    sync(target.parent)
    remove(old)


def sync(path: Path) -> None:
    """Wait until a file's bytes, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_leftovers(path: Path) -> None:
    """Delete the hidden files of killed writers of `path`; no process may be writing it now."""
    for part in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        remove(part)


def remove(path: Path) -> None:
    """Delete a file, a folder with its content, or a link without its target, if it is there.

    Raises: OSError where it cannot be deleted.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def named(path: Path) -> Generator[None]:
    """Give an error of the block the name of its file: the kernel's "no space left" has none."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            error.filename = error.filename or str(path)
        raise


def _open_own(part: Path) -> int:
    """Open a hidden file for writing, unless another user has put a link in its place."""
    return os.open(part, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _hidden_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
