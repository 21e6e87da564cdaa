"""A local file that is read by position.

Files are not mapped into memory: if another program cuts a mapped file off, or its disk fails, the
system ends the process (SIGBUS) before it can say which file it was.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO

PIECE_BYTES = 2**24


class LocalFile:
    """An open file; its slices are bytes, like those of `bytes`.

    handle: of a regular file, open for reading; closed with the object. name: path or URL of the
    file, for errors. Several threads may read at once.
    """

    def __init__(self, handle: int, name: str) -> None:
        self._handle, self._name = handle, name
        self._size_bytes = os.fstat(handle).st_size

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self._handle)

    def __len__(self) -> int:
        return self._size_bytes

    def __getitem__(self, part: slice) -> bytes:
        start, stop, _ = part.indices(self._size_bytes)
        return self.read(start, max(stop - start, 0))

    def __bytes__(self) -> bytes:
        return self[:]

    def stream(self) -> BinaryIO:
        """Return the file for libraries that read it in order and seek."""
        file = os.fdopen(os.dup(self._handle), "rb")
        file.seek(0)
        return file

    def read(self, offset: int, size_bytes: int) -> bytes:
        """Return bytes of the file.

        Raises: OSError where the file has been cut off, or the disk fails.
        """
        content = os.pread(self._handle, size_bytes, offset)
        if len(content) == size_bytes:
            return content
        whole = bytearray(size_bytes)  # the system returns at most 2 GiB at once
        self.read_into([whole], offset, size_bytes)
        return bytes(whole)

    def read_into(
        self, buffers: Sequence[bytearray | memoryview], offset: int, size_bytes: int
    ) -> None:
        """Fill buffers, one after the other, with the bytes from `offset` on.

        size_bytes: of all buffers together.
        Raises: OSError where the file has been cut off, or the disk fails.
        """
        if os.preadv(self._handle, buffers, offset) == size_bytes:
            return
        for buffer in buffers:
            view = memoryview(buffer)
            while len(view):
                found = os.preadv(self._handle, [view], offset)
                if not found:
                    raise OSError(
                        f"{self._name} was cut off while it was read: it ended at byte {offset}, "
                        f"and had {self._size_bytes} bytes before"
                    )
                view, offset = view[found:], offset + found


Content = LocalFile | bytes
"""The bytes of a file, in memory or on a disk."""


def pieces_of(content: Content, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
    """Yield a part of a file in pieces of at most PIECE_BYTES."""
    stop = len(content) if stop is None else stop
    for offset in range(start, stop, PIECE_BYTES):
        yield content[offset : min(offset + PIECE_BYTES, stop)]
