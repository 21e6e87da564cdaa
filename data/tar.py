"""Where each sample of a shard lies: one safe pass over a WebDataset tar gives an offset index.

The standard library stops without a word at a damaged header, and so loses the rest of a shard;
here whatever cannot be accounted for is a rejection with its reason.

The index is a structured array, saved beside the shard as `SHARD.index.npy`: a `key`, then for
each extension (offset, size, CRC-32 of the payload); offset 0 marks a member the sample lacks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from mmap import mmap
from typing import NamedTuple

import numpy as np
from isal.isal_zlib import crc32

from data.codecs import EXTENSIONS, BadSampleError, decode_npy
from data.manifest import Rejected

BLOCK_BYTES = 512
MAX_EXTENDED_BYTES = 2**16
MAX_NAME_BYTES = 2**10
MAX_MEMBER_BYTES = 2**30
MEMBER_DTYPE = np.dtype([("offset", "<i8"), ("size", "<u4"), ("crc", "<u4")])

_REGULAR, _DIRECTORY = (b"0", b"\0", b"7"), b"5"
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")
_PAX, _PAX_GLOBAL, _LONG_NAME, _LONG_LINK = b"x", b"g", b"L", b"K"
_REFUSED = {b"1": "hard link", b"2": "symbolic link", b"S": "sparse member"}


class Member(NamedTuple):
    """One file of a tar; `problem` says why its sample must not be used.

    Damage that belongs to no file has an empty name.
    """

    name: str
    offset: int
    size: int
    problem: str = ""


class _Header(NamedTuple):
    name: bytes
    size: int
    kind: bytes


@dataclass(slots=True)
class _Extension:
    """What extended headers say about the next member."""

    name: bytes | None = None
    size: int | None = None
    records: dict[str, str] = field(default_factory=dict)
    problem: str = ""


def _number(digits: bytes) -> int:
    """Read a header's number: octal, or GNU's base 256 for those that do not fit."""
    if digits[:1] == b"\x80":
        return int.from_bytes(digits[1:], "big")
    digits = digits.split(b"\0")[0].strip()
    if digits and not digits.isdigit():
        raise ValueError("not an octal number")
    return int(digits or b"0", 8)


def _parse_header(block: bytes) -> _Header | None:
    """Parse a header of POSIX.1-1988 ustar or GNU tar; None if its checksum does not hold."""
    try:
        size, checksum = _number(block[124:136]), _number(block[148:156])
    except ValueError:
        return None
    if checksum != sum(block) - sum(block[148:156]) + 8 * ord(" "):
        return None
    name = block[:100].split(b"\0")[0]
    prefix = block[345:500].split(b"\0")[0]
    if prefix and block[257:263] == b"ustar\0":
        name = prefix + b"/" + name
    return _Header(name, size, block[156:157])


def _parse_pax(payload: bytes) -> dict[str, str]:
    """Parse the records `LENGTH KEY=VALUE\\n` of an extended header (POSIX.1-2001)."""
    records = {}
    start = 0
    while start < len(payload):
        space = payload.index(b" ", start)
        end = start + int(payload[start:space])
        if not space < end <= len(payload):
            raise ValueError("a record's length is wrong")
        key, equals, value = payload[space + 1 : end].partition(b"=")
        if not equals or not value.endswith(b"\n"):
            raise ValueError("a record is not KEY=VALUE")
        records[key.decode()] = value[:-1].decode()
        start = end
    return records


def _extend(extension: _Extension, kind: bytes, payload: bytes) -> None:
    """Take in an extended header; global ones and link targets say nothing that we use."""
    if len(payload) > MAX_EXTENDED_BYTES:
        extension.problem = "extended header over the size limit"
    elif kind == _LONG_NAME:
        extension.name = payload.split(b"\0")[0]
    elif kind == _PAX:
        try:
            extension.records = _parse_pax(payload)
            if extension.records.get("size", "").isdecimal():
                extension.size = int(extension.records["size"])
        except ValueError:
            extension.problem = "damaged extended header"


def _member(header: _Header, extension: _Extension, offset: int) -> Member:
    """Join a header and its extensions, and name the first thing that is wrong."""
    raw_name = header.name if extension.name is None else extension.name
    name = extension.records.get("path") or raw_name.decode(errors="replace")
    size = header.size if extension.size is None else extension.size
    if header.kind in _WITHOUT_DATA:
        size = 0
    if extension.problem:
        problem = extension.problem
    elif header.kind not in _REGULAR:
        problem = _REFUSED.get(header.kind, f"tar member of type {header.kind!r}")
    elif any(key.startswith("GNU.sparse") for key in extension.records):
        problem = _REFUSED[b"S"]
    elif not name:
        problem = "member without a name"
    elif "\0" in name or ("path" not in extension.records and name.encode() != raw_name):
        problem = "name is not UTF-8 text"
    elif len(name.encode()) > MAX_NAME_BYTES:
        problem = f"name over {MAX_NAME_BYTES} bytes"
    elif name.startswith("/") or ".." in name.split("/"):
        problem = "path leads out of the shard"
    elif size > MAX_MEMBER_BYTES:
        problem = f"member over {MAX_MEMBER_BYTES} bytes"
    else:
        problem = ""
    return Member(name, offset, size, problem)


def _next_nonzero(buffer: mmap | bytes, offset: int) -> int:
    """Return the block with the first byte that is not zero, or the buffer's end."""
    chunk_bytes = 2**20
    for start in range(offset, len(buffer), chunk_bytes):
        nonzero = np.frombuffer(buffer[start : start + chunk_bytes], np.uint8) != 0
        if nonzero.any():
            return start + int(nonzero.argmax()) // BLOCK_BYTES * BLOCK_BYTES
    return len(buffer)


def scan(buffer: mmap | bytes) -> Iterator[Member]:
    """Walk a tar's files in order, going on at the next sound header after any damage."""
    end = len(buffer)
    cut_off = f"the shard is cut off at byte {end}"
    offset = 0
    damaged = False
    extension = _Extension()
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
            damaged = True
            offset = after
            continue
        header = _parse_header(block)
        if header is None:
            if not damaged:
                yield Member("", offset, 0, f"damaged header at byte {offset}")
            damaged = True
            extension = _Extension()
            offset += BLOCK_BYTES
            continue
        damaged = False
        start = offset + BLOCK_BYTES
        room = end - start
        if header.kind in (_PAX, _PAX_GLOBAL, _LONG_NAME, _LONG_LINK):
            size = header.size
            member = Member("", offset, 0, "extended header over the size limit")
            if size <= room:
                payload = buffer[start : start + min(size, MAX_EXTENDED_BYTES + 1)]
                _extend(extension, header.kind, bytes(payload))
        else:
            member = _member(header, extension, start)
            size = member.size
            extension = _Extension()
            if header.kind != _DIRECTORY and size <= room:
                yield member
        if size > max(room, MAX_MEMBER_BYTES):
            yield member  # its size is a lie: look for the next sound header at once
            size, damaged = 0, True
        offset = start + -(-size // BLOCK_BYTES) * BLOCK_BYTES


def index_shard(
    buffer: mmap | bytes, required: Sequence[Sequence[str]]
) -> tuple[np.ndarray, list[Rejected]]:
    """Index the samples of a shard, and say which ones are refused and why.

    Args:
        buffer: The shard's bytes.
        required: A sample needs at least one extension of each group.

    Returns:
        Structured array with a field `key` and one of MEMBER_DTYPE for each extension, in the
        order of the shard; and the rejections, with an empty key for damage of unknown owner.
    """
    payloads = memoryview(buffer)
    samples: dict[str, dict[str, tuple[int, int, int]]] = {}
    reasons: dict[str, str] = {}
    rejected = []
    for member in scan(buffer):
        if not member.name:
            rejected.append(Rejected(key="", reason=member.problem))
            continue
        folder, slash, file = member.name.removeprefix("./").rpartition("/")
        stem, dot, extension = file.partition(".")
        key = folder + slash + stem
        if member.problem:
            reasons.setdefault(key, member.problem)
            continue
        if not stem or not dot:
            continue
        sample = samples.setdefault(key, {})
        extension = extension.lower()
        if extension in sample:
            reasons.setdefault(key, f"two members .{extension}")
        elif extension in EXTENSIONS:
            payload = payloads[member.offset : member.offset + member.size]
            sample[extension] = (member.offset, member.size, crc32(payload))
    for key, sample in samples.items():
        for group in required:
            if sample.keys().isdisjoint(group):
                reasons.setdefault(key, f"no {' or '.join(group)}")
    rejected.extend(Rejected(key=key, reason=reason) for key, reason in reasons.items())

    good = {key.encode(): sample for key, sample in samples.items() if key not in reasons}
    extensions = sorted({extension for sample in good.values() for extension in sample})
    width = max(map(len, good), default=1)
    index = np.zeros(
        len(good), [("key", f"S{width}"), *((name, MEMBER_DTYPE) for name in extensions)]
    )
    for row, (key, sample) in zip(index, good.items(), strict=True):
        row["key"] = key
        for extension, place in sample.items():
            row[extension] = place
    return index, rejected


def decode_index(payload: mmap | bytes) -> np.ndarray:
    """View a saved index, without a copy.

    Raises:
        BadSampleError: it is not an index as `index_shard` makes it.
    """
    index = decode_npy(payload)
    key, *extensions = index.dtype.names or ("",)
    if key != "key" or index.ndim != 1 or index.dtype["key"].kind != "S":
        raise BadSampleError("not an offset index")
    if any(name not in EXTENSIONS or index.dtype[name] != MEMBER_DTYPE for name in extensions):
        raise BadSampleError("offset index with an unknown column")
    try:
        index["key"].tobytes().decode()
    except UnicodeDecodeError as error:
        raise BadSampleError("offset index with a key that is not UTF-8 text") from error
    return index


def check_places(index: np.ndarray, samples: int, shard_bytes: int) -> None:
    """Check that an index is one of so many samples, all within a shard of so many bytes.

    Raises:
        BadSampleError: it is not.
    """
    if len(index) != samples or (samples and shard_bytes < BLOCK_BYTES):
        raise BadSampleError(f"offset index of {len(index)} samples, not {samples}")
    for name in (index.dtype.names or ())[1:]:
        offsets, sizes = index[name]["offset"], index[name]["size"].astype(np.int64)
        inside = (offsets >= 0) & (offsets <= shard_bytes - sizes) & (offsets % BLOCK_BYTES == 0)
        if not inside.all():
            raise BadSampleError(f"offset index with a .{name} that is not in the shard")
