"""Scan a tar: every member with its place, in the formats v7, ustar, GNU and PAX.

Damage never ends the scan: it goes on at the next sound header and reports the damage. The tarfile
module of Python stops silently at a damaged header, and loses the rest of the shard.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from data.storage.local_file import Content

BLOCK_BYTES = 512
MAX_EXTENDED_BYTES = 2**20
"""Largest extended header that is read: attributes of files may take some 100 kB."""
MAX_NAME_BYTES = 2**10
MAX_MEMBER_BYTES = 2**30

_REGULAR, _DIRECTORY, _HARD_LINK, _SPARSE = (b"0", b"\0", b"7"), b"5", b"1", b"S"
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")
_PAX, _PAX_GLOBAL, _LONG_NAME, _LONG_LINK = (b"x", b"X"), b"g", b"L", b"K"
_EXTENDED = (*_PAX, _PAX_GLOBAL, _LONG_NAME, _LONG_LINK)
_REFUSED = {
    b"2": "symbolic link: pack the files instead (tar --dereference)",
    b"S": "sparse member: pack it whole (tar without --sparse)",
}
_RECORDS = (b"path", b"linkpath", b"size", b"GNU.sparse.name")
"""Records of PAX that are read. All others may hold any bytes: times, owners, attributes."""

UNPACK = {
    "gzip": "gunzip",
    "zstd": "zstd -d --rm",
    "bzip2": "bunzip2",
    "xz": "unxz",
    "lz4": "lz4 -d --rm",
}
"""Program that compressed a tar → command that unpacks it where it lies."""
_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "zst"),
    b"BZh": ("bzip2", "bz2"),
    b"\xfd7zXZ": ("xz", "xz"),
    b"\x04\x22\x4d\x18": ("lz4", "lz4"),
}
"""First bytes of a compressed file → the program that made it, and its suffix."""


class Member(NamedTuple):
    """One file of a tar, or damage."""

    name: str
    """Path in the tar; empty for damage that belongs to no file."""
    offset: int
    """Position of the payload in the tar, in bytes."""
    size: int
    """Size of the payload in bytes."""
    problem: str = ""
    """Reason for the rejection of the file's sample; empty for a sound file."""
    link: str = ""
    """Name of the earlier member that has the payload of this hard link; empty for others."""


class _Header(NamedTuple):
    name: bytes
    size: int
    kind: bytes
    link: bytes


@dataclass(slots=True)
class _Extension:
    """The content of the extended headers before a member."""

    name: bytes | None = None
    link: bytes | None = None
    size: int | None = None
    records: dict[bytes, bytes] = field(default_factory=dict[bytes, bytes])
    problem: str = ""


def _number(digits: bytes) -> int:
    """Parse a number in a header: octal, or base 256 for large numbers in GNU tars."""
    if digits[:1] == b"\x80":
        return int.from_bytes(digits[1:], "big")
    digits = digits.split(b"\0")[0].strip()
    if digits and not digits.isdigit():
        raise ValueError("not an octal number")
    return int(digits or b"0", 8)


def _parse_header(block: bytes) -> _Header | None:
    """Parse a header of v7, ustar or GNU tar; None if its checksum is wrong."""
    try:
        size, checksum = _number(block[124:136]), _number(block[148:156])
    except ValueError:
        return None
    summed = block[:148] + b" " * 8 + block[156:]
    if checksum != _sum(summed) and (
        checksum != _sum(summed) - 256 * sum(byte > 127 for byte in summed)
    ):
        return None  # some old programs took the bytes for signed numbers
    name = _text(block[:100])
    if block[345] and block[257:263] == b"ustar\0":
        name = _text(block[345:500]) + b"/" + name
    kind = block[156:157]
    if kind == b"\0" and name.endswith(b"/"):  # v7 has no type of folders
        kind = _DIRECTORY
    return _Header(name, size, kind, _text(block[157:257]) if block[157] else b"")


def _sum(block: bytes) -> int:
    """Add up the 512 bytes of a header.

    Adler-32 ends with 1 + their sum modulo 65,521, which 256 bytes do not reach. It is a tenth of
    the time of Python's sum.
    """
    half = BLOCK_BYTES // 2
    return sum((zlib.adler32(part) & 0xFFFF) - 1 for part in (block[:half], block[half:]))


def _text(field: bytes) -> bytes:
    return field.split(b"\0")[0]


def _parse_pax(payload: bytes) -> dict[bytes, bytes]:
    """Parse the records `LENGTH KEY=VALUE\\n` of an extended header (POSIX.1-2001).

    Returns those of _RECORDS, and all of GNU.sparse.
    """
    records: dict[bytes, bytes] = {}
    start = 0
    while start < len(payload):
        space = payload.index(b" ", start)
        end = start + int(payload[start:space])
        if not space < end <= len(payload):
            raise ValueError("a record's length is wrong")
        key, equals, value = payload[space + 1 : end].partition(b"=")
        if not equals or not value.endswith(b"\n"):
            raise ValueError("a record is not KEY=VALUE")
        if key in _RECORDS or key.startswith(b"GNU.sparse."):
            records[key] = value[:-1]
        start = end
    return records


def _extend(extension: _Extension, kind: bytes, payload: bytes) -> None:
    """Add an extended header to `extension`."""
    if len(payload) > MAX_EXTENDED_BYTES:
        extension.problem = "extended header over the size limit"
    elif kind == _LONG_NAME:
        extension.name = _text(payload)
    elif kind == _LONG_LINK:
        extension.link = _text(payload)
    else:
        try:
            extension.records |= _parse_pax(payload)
            size = extension.records.get(b"size", b"")
            extension.size = int(size) if size.isdigit() else extension.size
        except ValueError:
            extension.problem = "damaged extended header"


def _member(header: _Header, extension: _Extension, offset: int) -> Member:
    """Merge a header and its extensions, and name the first problem."""
    records = extension.records
    raw = header.name if extension.name is None else extension.name
    raw = records.get(b"GNU.sparse.name") or records.get(b"path") or raw
    name = raw.decode(errors="replace")
    size = header.size if extension.size is None else extension.size
    if header.kind in _WITHOUT_DATA:
        size = 0
    link = header.link if extension.link is None else extension.link
    link = records.get(b"linkpath") or link
    if extension.problem:
        problem = extension.problem
    elif header.kind not in (*_REGULAR, _HARD_LINK):
        problem = _REFUSED.get(header.kind, f"tar member of type {header.kind!r}")
    elif records and any(key.startswith(b"GNU.sparse") for key in records):
        problem = _REFUSED[_SPARSE]
    elif not name:
        problem = "member without a name"
    elif "\0" in name or name.encode() != raw:
        problem = "name is not UTF-8 text"
    elif len(raw) > MAX_NAME_BYTES:
        problem = f"name over {MAX_NAME_BYTES} bytes"
    elif name.startswith("/") or ".." in name.split("/"):
        problem = "path leads out of the shard"
    elif size > MAX_MEMBER_BYTES:
        problem = f"member over {MAX_MEMBER_BYTES} bytes"
    else:
        problem = ""
    target = link.decode(errors="replace") if header.kind == _HARD_LINK else ""
    return Member(name, offset, size, problem, target)


def refuse_compressed(location: str, head: bytes) -> None:
    """Raise ValueError if a file with these first bytes is compressed; location: path or URL."""
    for magic, (program, suffix) in _COMPRESSED.items():
        if head.startswith(magic):
            raise ValueError(
                f"{location} is compressed with {program}, and samples are read by position: "
                f"unpack it once, `mv {location} {location}.{suffix} && {UNPACK[program]} "
                f"{location}.{suffix}`"
            )


def _next_nonzero(buffer: Content, offset: int) -> int:
    """Return the offset of the next block with a byte that is not zero, or the buffer's end."""
    chunk_bytes = 2**20
    for start in range(offset, len(buffer), chunk_bytes):
        nonzero = np.frombuffer(buffer[start : start + chunk_bytes], np.uint8) != 0
        if nonzero.any():
            return start + int(nonzero.argmax()) // BLOCK_BYTES * BLOCK_BYTES
    return len(buffer)


def scan(buffer: Content) -> Iterator[Member]:
    """Yield the files and the damage of a tar in order; after damage, go on at a sound header."""
    end = len(buffer)
    cut_off = f"the shard is cut off at byte {end}"
    offset, damaged = 0, False
    shared, extension = _Extension(), _Extension()
    while True:
        block = bytes(buffer[offset : offset + BLOCK_BYTES])
        if len(block) < BLOCK_BYTES:
            yield Member("", offset, 0, cut_off)
            return
        if not any(block):
            after = _next_nonzero(buffer, offset)
            if after == end:
                if end - offset < 2 * BLOCK_BYTES:
                    yield Member("", offset, 0, cut_off)
                return
            if not damaged:
                yield Member("", offset, 0, f"zeros from byte {offset}, but more follows")
            damaged, offset = True, after
            continue
        header = _parse_header(block)
        if header is None:
            if not damaged:
                yield Member("", offset, 0, f"damaged header at byte {offset}")
            damaged, extension = True, _Extension()
            offset += BLOCK_BYTES
            continue
        damaged = False
        start = _payload_start(buffer, header, offset)
        room = end - start
        if header.kind in _EXTENDED:
            size = header.size
            member = Member("", offset, 0, "extended header over the size limit")
            if size <= room:
                payload = buffer[start : start + min(size, MAX_EXTENDED_BYTES + 1)]
                _extend(shared if header.kind == _PAX_GLOBAL else extension, header.kind, payload)
                if shared.problem:
                    yield Member("", offset, 0, shared.problem)
                    shared = _Extension()
        else:
            member = _member(header, _merged(shared, extension), start)
            size = member.size
            extension = _Extension()
            if header.kind != _DIRECTORY and size <= room:
                yield member
        if size > max(room, MAX_MEMBER_BYTES):
            yield member  # its size is wrong: look for a sound header in the next block
            size, damaged = 0, True
        offset = start + -(-size // BLOCK_BYTES) * BLOCK_BYTES


def _payload_start(buffer: Content, header: _Header, offset: int) -> int:
    """Return the place after a header, and after the blocks that list more holes of a GNU file."""
    more = buffer[offset + 482 : offset + 483] if header.kind == _SPARSE else b"\0"
    offset += BLOCK_BYTES
    while more not in (b"", b"\0"):
        more = buffer[offset + 504 : offset + 505]
        offset += BLOCK_BYTES
    return offset


def _merged(shared: _Extension, own: _Extension) -> _Extension:
    """Add the global header's records to those of a member, which win."""
    if not shared.records:
        return own
    size = shared.size if own.size is None else own.size
    return replace(own, size=size, records=shared.records | own.records)
