"""Tell whether a file has changed, without reading the whole of it."""

import hashlib
import os

from data.storage import remote
from data.storage.files import local_path
from data.storage.local_file import LocalFile
from data.storage.untrusted import open_regular

SAMPLES, SAMPLE_BYTES = 16, 2**12
"""Pieces of a local file that are compared, spread evenly from its first byte to its last one."""
HEAD_BYTES = 2**16
"""Beginning of a remote file that is compared if its store states neither a hash nor a time."""


def fingerprint(location: str) -> str:
    """Return a hash that differs once a file, a path or URL, has been written again.

    Of a local file it covers size, times and samples of the content. The time of its last change of
    any kind (ctime) cannot be set back, unlike that of its content (mtime). Of a remote file it
    covers size and what the store states: a hash of the content, or a time.
    Raises: FileNotFoundError where the file is missing; UnsafeFileError where it is no regular
    file; OSError where it cannot be read; ValueError where the scheme is not allowed.
    """
    path = local_path(location)
    digest = hashlib.sha256()
    if path is None:
        size, version = remote.describe(location)
        digest.update(f"{size} {version}".encode())
        if not version:
            for piece in remote.pieces(location, min(size, HEAD_BYTES)):
                digest.update(piece)
        return digest.hexdigest()
    handle = open_regular(path)
    facts, file = os.fstat(handle), LocalFile(handle, location)
    digest.update(b"%d %d %d" % (facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns))
    last = max(len(file) - SAMPLE_BYTES, 0)
    for number in range(SAMPLES):
        start = last * number // (SAMPLES - 1)
        digest.update(file[start : start + SAMPLE_BYTES])
    return digest.hexdigest()
