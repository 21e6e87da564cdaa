"""Index a WebDataset tar: the position of every member of every sample, found in one pass.

The index is a structured array, saved beside the shard as `SHARD.index.npy`: a `key`, then for
each extension (offset, size, CRC-32 of the payload). Offset 0 marks a missing member.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from isal import isal_zlib

from data.shards.account import Fate, Tally
from data.shards.codecs import (
    EXTENSIONS,
    IMAGE_EXTENSIONS,
    BadSampleError,
    Buffer,
    decode_npy,
)
from data.shards.manifest import Rejected
from data.shards.tar import BLOCK_BYTES, MAX_NAME_BYTES, Member, scan
from data.storage.local_file import Content, pieces_of

MAX_KEY_BYTES = MAX_NAME_BYTES - 1 - max(map(len, EXTENSIONS))
"""A longer key leaves no room for the extensions of a latent shard."""
MEMBER_DTYPE = np.dtype([("offset", "<i8"), ("size", "<u4"), ("crc", "<u4")])

_PICTURES = (
    "apng arw cr2 cr3 dng exr hdr ico j2k jp2 nef orf pbm pgm pnm ppm psd raf raw rw2 svg tga"
)
OTHER_PICTURES = frozenset(_PICTURES.split())
"""Extensions of pictures that are not read: their samples are lost."""

_isal: Any = isal_zlib
"""The module without its types, which are incomplete."""

Samples = dict[str, dict[str, tuple[int, int, int]]]
"""Key of a sample → extension of a member → its (offset, size, CRC-32)."""


crc32: Callable[..., int] = _isal.crc32
"""(bytes, start=0) → CRC-32 of the bytes, continued from the CRC-32 `start` of earlier bytes."""


def index_shard(
    buffer: Content,
    required: Sequence[Sequence[str]],
    alone: Tally | None = None,
    edges: list[str] | None = None,
) -> tuple[np.ndarray, list[Rejected]]:
    """Index the sound samples of a shard, and list the rejected ones with their reasons.

    buffer: bytes of the shard. required: groups of extensions; a sample needs one of each group.
    alone: counts the members that are not read. edges: gets the keys of the first and the last
    sample, whatever becomes of them.
    Returns the index, [samples] in the order of the shard, with a field `key` and one of
    MEMBER_DTYPE for each extension; and the rejections. Damage that belongs to no known sample is
    a rejection with an empty key.
    """
    alone = Tally() if alone is None else alone
    pictures: dict[str, str] = {}
    samples, reasons, damage = _group_members(buffer, alone, pictures)
    if edges is not None and samples:
        edges += [next(iter(samples)), next(reversed(samples))]
    for key, members in samples.items():
        for group in required:
            if members.keys().isdisjoint(group):
                reason = f"no {' or '.join(group)}"
                if key in pictures and IMAGE_EXTENSIONS[0] in group:
                    reason = unread_picture(pictures[key])
                reasons.setdefault(key, reason)
    rejected = [Rejected(key=key, reason=reason) for key, reason in reasons.items()]
    sound = {key: members for key, members in samples.items() if key not in reasons}
    return _tabulate(sound), damage + rejected


def unread_picture(extension: str) -> str:
    """Return the reason for rejecting a picture of a format that is not read."""
    return f"picture .{extension}: not a format that is read; convert it to PNG or JPEG"


def _group_members(
    buffer: Content, alone: Tally, pictures: dict[str, str]
) -> tuple[Samples, dict[str, str], list[Rejected]]:
    """Group the members of a tar by sample: (samples, {key: reason of a rejection}, damage).

    alone: counts members that are not read. pictures: {key: extension of a picture that is not
    read}, added here.
    """
    samples: Samples = {}
    reasons: dict[str, str] = {}
    damage: list[Rejected] = []
    for member in _without_links(buffer):
        if not member.name:
            damage.append(Rejected(key="", reason=member.problem))
            continue
        key, extension = split_name(member.name)
        extension = extension.lower()
        if member.problem:
            reasons.setdefault(key, member.problem)
            continue
        if not extension:
            alone.add(Fate.left_alone, "member without a name or an extension", member.name)
            continue
        sample = samples.get(key)
        if sample is None:
            if problem := key_problem(key):
                reasons.setdefault(key, problem)
                continue
            sample = samples[key] = {}
        if extension in sample:
            reasons.setdefault(key, f"two members .{extension}")
        elif extension in EXTENSIONS:
            crc = 0
            for piece in pieces_of(buffer, member.offset, member.offset + member.size):
                crc = crc32(piece, crc)
            sample[extension] = (member.offset, member.size, crc)
        elif extension in OTHER_PICTURES:
            pictures[key] = extension
        else:
            alone.add(Fate.left_alone, f"member .{extension}: not read", member.name)
    return samples, reasons, damage


def _without_links(buffer: Content) -> Iterator[Member]:
    """Scan a tar, and give hard links the places of the earlier members that they name.

    Links come last: their targets are found in a second pass, since few tars have any.
    """
    links = 0
    wanted: set[str] = set()
    for member in scan(buffer):
        if member.link and not member.problem:
            links += 1
            wanted.add(_plain(member.link))
        else:
            yield member
    places: dict[str, Member] = {}
    for member in scan(buffer) if links else ():
        if member.problem:
            continue
        if member.link:
            found = places.get(_plain(member.link))
            if found is None:
                member = member._replace(problem="hard link to a member that is not in the tar")
            else:
                member = found._replace(name=member.name)
            yield member
        if _plain(member.name) in wanted:
            places[_plain(member.name)] = member


def _plain(name: str) -> str:
    """Return a member's path without its parts `.`: two spellings of one path are one member."""
    if not name.startswith(".") and "/." not in name:
        return name
    return "/".join(part for part in name.split("/") if part != ".")


def split_name(name: str) -> tuple[str, str]:
    """Split the name of a member into the key of its sample and its extension.

    The extension begins after the first dot of the file's name, and is empty for other files. Parts
    `.` of a path do not count: two spellings of one path are one sample.
    """
    *folders, file = _plain(name).split("/")
    stem, _, extension = file.partition(".")
    return "/".join((*folders, stem)), extension if stem else ""


def key_problem(key: str) -> str:
    """Return the reason why no shard can hold a sample of this key; empty for a sound key."""
    if len(key.encode()) > MAX_KEY_BYTES:
        return f"key over {MAX_KEY_BYTES} bytes"
    sound = "\0" not in key and ".." not in key.split("/") and split_name(f"{key}.txt")[0] == key
    return "" if sound else "key that another reader takes for another one"


def _tabulate(samples: Samples) -> np.ndarray:
    """Write samples to the structured array of an index: [samples]."""
    keys = [key.encode() for key in samples]
    extensions = sorted({extension for members in samples.values() for extension in members})
    width = max(map(len, keys), default=1)
    index = np.zeros(
        len(keys), [("key", f"S{width}"), *((name, MEMBER_DTYPE) for name in extensions)]
    )
    for row, key, members in zip(index, keys, samples.values(), strict=True):
        row["key"] = key
        for extension, place in members.items():
            row[extension] = place
    return index


def member_of(content: Content, sample: np.void, extension: str) -> Buffer | None:
    """Return the bytes of a member; None if the sample has none.

    content: the shard. sample: a row of its index.
    """
    if extension not in (sample.dtype.names or ()):
        return None
    offset, size, _ = sample[extension].item()
    return content[offset : offset + size] if offset else None


def decode_index(payload: bytes) -> np.ndarray:
    """View the bytes of a saved index as [samples], without a copy.

    Raises: BadSampleError where the payload is not an index made by `index_shard`.
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
    """Check that an index has `samples` rows, and that all members lie within the shard.

    Raises: BadSampleError where it differs.
    """
    if len(index) != samples or (samples and shard_bytes < BLOCK_BYTES):
        raise BadSampleError(f"offset index of {len(index)} samples, not {samples}")
    for name in (index.dtype.names or ())[1:]:
        offsets, sizes = index[name]["offset"], index[name]["size"].astype(np.int64)
        inside = (offsets >= 0) & (offsets <= shard_bytes - sizes) & (offsets % BLOCK_BYTES == 0)
        if not inside.all():
            raise BadSampleError(f"offset index with a .{name} that is not in the shard")
