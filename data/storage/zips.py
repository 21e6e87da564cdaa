"""Read the members of a zip where it lies: nothing is unpacked beside it.

A zip can come from a stranger. Names of members are keys and never paths of files. A member is read
up to a limit, whatever its header says; one that is encrypted, damaged or a link is refused alone.
"""

import io
import stat
import struct
import zlib
from collections import Counter
from collections.abc import Mapping
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile, ZipInfo

from typing_extensions import override

MAX_DIRECTORY_BYTES = 2**28
"""Largest list of members that is read: some millions of them."""
PIECE_BYTES = 2**20
_ENCRYPTED = 0b1
_FROM_DOS = 0
_DAMAGE = (BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, ValueError)


class ZipMemberError(ValueError):
    """The error of a member that cannot be read; the message is the reason."""


class ZipArchive:
    """An open zip.

    handle: of a regular file, open for reading; closed with the object. name: its path, for errors.
    Raises: ValueError that names it where it is no zip, cut off, or holds too many members.
    """

    members: Mapping[str, ZipInfo]
    """Path of a member, without its parts `.` → where its bytes are; folders are left out."""

    def __init__(self, handle: int, name: str) -> None:
        self._file = _Bounded(io.FileIO(handle, "rb"))
        try:
            try:
                self._zip = ZipFile(self._file, metadata_encoding="utf-8")
            except UnicodeDecodeError:
                self._zip = ZipFile(self._file)  # of DOS: code page 437, which has every byte
        except _DAMAGE as error:
            raise ValueError(f"{name} cannot be read as a zip, or is cut off ({error})") from error
        named = [(_plain(info), info) for info in self._zip.infolist()]
        self.folders = [name for name, info in named if info.is_dir()]
        self.members = {name: info for name, info in named if name and not info.is_dir()}
        counts = Counter(name for name, info in named if not info.is_dir())
        self._twice = {name for name, count in counts.items() if count > 1}

    def __del__(self) -> None:
        self._file.close()

    def read(self, name: str, limit: int) -> bytes:
        """Read a member up to `limit` + 1 bytes; the last byte shows that it is over the limit.

        Raises: ZipMemberError where it cannot be read; OSError where the disk fails.
        """
        info, content = self._readable(name), bytearray()
        try:
            with self._zip.open(info) as stream:
                while piece := stream.read(min(PIECE_BYTES, limit + 1 - len(content))):
                    content += piece
        except _DAMAGE as error:
            raise ZipMemberError("damaged in its zip") from error
        return bytes(content)

    def _readable(self, name: str) -> ZipInfo:
        info = self.members[name]
        if name in self._twice:
            raise ZipMemberError("two members of one name in its zip")
        if stat.S_ISLNK(info.external_attr >> 16):
            raise ZipMemberError("a link in a zip, which is not followed")
        if info.flag_bits & _ENCRYPTED:
            raise ZipMemberError("encrypted in its zip: unpack it with its password")
        if info.compress_type not in (ZIP_STORED, ZIP_DEFLATED):
            method = f"compressed by method {info.compress_type} of zip, which is not read"
            raise ZipMemberError(f"{method}: pack it again with deflate, the usual one")
        return info


class _Bounded(io.BufferedReader):
    """A file that hands out no piece larger than MAX_DIRECTORY_BYTES."""

    @override
    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > MAX_DIRECTORY_BYTES:
            raise BadZipFile(f"its list of members is over {MAX_DIRECTORY_BYTES} bytes")
        return super().read(size)


def _plain(info: ZipInfo) -> str:
    """Return a member's path; old programs of Windows wrote backslashes."""
    name = info.filename
    if info.create_system == _FROM_DOS:
        name = name.replace("\\", "/")
    return "/".join(part for part in name.split("/") if part not in ("", "."))
