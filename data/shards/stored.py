"""Read samples from open shards, one by one or as a batch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from data.shards.codecs import (
    MAX_ARRAY_BYTES,
    MAX_IMAGE_BYTES,
    MAX_TEXT_BYTES,
    BadSampleError,
    decode_text,
    encode_npy,
)
from data.shards.index import MEMBER_DTYPE, crc32
from data.shards.manifest import Ids, Rejected
from data.storage.local_file import LocalFile

MAX_MEMBER_BYTES = max(MAX_ARRAY_BYTES, MAX_IMAGE_BYTES)
"""Largest member that is read: the decoders would refuse a larger one."""

NEAR_BYTES = 4096
"""A text that ends so close behind an array is read with it: one system call costs more than the
copy of the few bytes between them."""

Members = NDArray[np.void]
"""Positions of one member of each sample: [B] of MEMBER_DTYPE; zeros mark a missing member."""


@dataclass(frozen=True, slots=True, eq=False)
class OpenShard:
    """A shard that is being read."""

    name: str
    index: NDArray[np.void]
    """[samples], made by `data.shards.tar.index_shard`."""
    file: LocalFile
    """The tar."""


class StoredSample(NamedTuple):
    """A sample in an open shard, by its row of the shard's index."""

    shard: OpenShard
    row: int

    @property
    def key(self) -> str:
        """Key of the sample, unique within its shard."""
        return self.shard.index["key"][self.row].decode()

    def rejected(self, error: BadSampleError) -> Rejected:
        """Return the record of this sample as a bad one."""
        return Rejected(key=self.key, reason=str(error), shard=self.shard.name)

    def has(self, extension: str) -> bool:
        """Say whether the sample has a member."""
        index = self.shard.index
        return extension in (index.dtype.names or ()) and bool(index[extension]["offset"][self.row])

    def member(self, extension: str) -> bytes | None:
        """Return the bytes of a member; None if the member is missing.

        Raises: BadSampleError where the checksum of the bytes differs.
        """
        return self.payload(extension) if self.has(extension) else None

    def payload(self, extension: str) -> bytes:
        """Return the bytes of a member.

        Raises: BadSampleError where the member is missing, or the checksum of its bytes differs;
        OSError where the shard is cut off, or the disk fails.
        """
        if not self.has(extension):
            raise BadSampleError(f"no .{extension}")
        offset, size, crc = self.shard.index[extension][self.row].item()
        if size > MAX_MEMBER_BYTES:
            raise BadSampleError(f".{extension} of {size} bytes is over {MAX_MEMBER_BYTES}")
        payload = self.shard.file.read(offset, size)
        if crc32(payload) != crc:
            raise BadSampleError(f"the checksum of .{extension} does not match")
        return payload


class ArrayLayout(NamedTuple):
    """The layout of the .npy files that `encode_npy` makes for one data type and shape."""

    dtype: np.dtype
    shape: tuple[int, ...]
    header: bytes
    """The first bytes of each file, before the data."""
    header_crc: int
    """CRC-32 of the header."""
    file_bytes: int
    """Size of each file."""

    @classmethod
    def of(cls, dtype: DTypeLike, shape: Sequence[int]) -> Self:
        """Compute the layout for a data type and shape."""
        array = np.zeros(shape, dtype)
        file = encode_npy(array)
        header = file[: len(file) - array.nbytes]
        return cls(array.dtype, array.shape, header, crc32(header), len(file))


class StoredBatch:
    """Samples in open shards, read together: one kind of member of all samples at a time.

    shards: open shards by their numbers. numbers: [B] shard of each sample. rows: [B] row of each
    sample in its shard's index.
    """

    def __init__(self, shards: dict[int, OpenShard], numbers: Ids, rows: Ids) -> None:
        self._shards, self._numbers, self._rows = shards, numbers, rows
        self._files = [shards[number].file for number in numbers.tolist()]
        self._places = {number: np.flatnonzero(numbers == number) for number in shards}
        """Places in the batch of each shard's samples."""
        tables: dict[np.dtype, tuple[list[Ids], list[NDArray[np.void]]]] = {}
        for number, shard in shards.items():
            places, parts = tables.setdefault(shard.index.dtype, ([], []))
            places.append(self._places[number])
            # view structures as bytes, because numpy copies structures field by field
            records = shard.index.view((np.void, shard.index.itemsize))
            parts.append(records[rows[self._places[number]]])
        self._tables = [
            (np.concatenate(places), np.concatenate(parts).view(columns))
            for columns, (places, parts) in tables.items()
        ]
        """For the indexes with the same columns: places in the batch, and rows of the indexes."""

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: int) -> StoredSample:
        return StoredSample(self._shards[int(self._numbers[place])], int(self._rows[place]))

    def __iter__(self) -> Iterator[StoredSample]:
        return (self[place] for place in range(len(self)))

    def keys(self) -> list[str]:
        """Return the keys of the samples; a key is unique within its shard."""
        keys = [""] * len(self)
        for places, table in self._tables:
            for place, key in zip(places.tolist(), table["key"].tolist(), strict=True):
                keys[place] = key.decode()
        return keys

    def members(self, *extensions: str) -> Members:
        """Return the position of each sample's first existing member: [B] of MEMBER_DTYPE.

        extensions: of the members, in order of preference.
        """
        members = np.zeros(len(self), MEMBER_DTYPE)
        for places, table in self._tables:
            for extension in reversed(extensions):
                if extension in (table.dtype.names or ()):
                    found = table[extension]
                    present = np.flatnonzero(found["offset"])
                    members[places[present]] = found[present]
        return members

    def texts(self, *extensions: str) -> "Texts":
        """Return each sample's first existing member of a text: see `members`."""
        return Texts(self._files, self.members(*extensions))

    def copy(
        self,
        members: Members,
        layout: ArrayLayout,
        arrays: np.ndarray,
        texts: "Texts | None" = None,
    ) -> NDArray[np.bool_]:
        """Copy array members of one layout to `arrays` [B, *shape].

        texts: those that lie close behind the arrays are read with them.
        Returns [B] bool: whether the member exists, matches its checksum and has this layout. The
        values of other rows are undefined.
        """
        rows = arrays.reshape(-1).view(np.uint8).data
        row_bytes = layout.file_bytes - len(layout.header)
        header, behind = bytearray(layout.header), memoryview(bytearray(NEAR_BYTES))
        texts = Texts(self._files, np.zeros_like(members)) if texts is None else texts
        gaps, more = texts.behind(members["offset"] + layout.file_bytes)
        starts, crcs = members["offset"].tolist(), members["crc"].tolist()
        sound = [False] * len(self)
        fitting = (members["offset"] > 0) & (members["size"] == layout.file_bytes)
        for place in np.flatnonzero(fitting).tolist():
            values, end = rows[place * row_bytes : (place + 1) * row_bytes], more[place]
            buffers = (header, values, behind[:end])
            self._files[place].read_into(buffers, starts[place], layout.file_bytes + end)
            if header.startswith(layout.header) and crc32(values, layout.header_crc) == crcs[place]:
                sound[place] = True
            if end:
                texts.payloads[place] = bytes(behind[gaps[place] : end])
        return np.array(sound, bool)


class Texts:
    """A text member of each sample of a batch.

    files: [B] file of each sample. members: [B] of MEMBER_DTYPE.
    """

    def __init__(self, files: Sequence[LocalFile], members: Members) -> None:
        self._files, self._members = files, members
        self.payloads: list[bytes | None] = [None] * len(members)
        """[B] the bytes; None: not read yet."""

    def behind(self, ends: Ids) -> tuple[list[int], list[int]]:
        """Compare the places of the texts with the `ends` [B] of other members.

        Returns two lists [B]: the bytes from the end to the text; and those from the end to the end
        of the text, or 0 where that is not within NEAR_BYTES.
        """
        gaps = self._members["offset"] - ends
        more = gaps + self._members["size"]
        return gaps.tolist(), np.where((gaps >= 0) & (more <= NEAR_BYTES), more, 0).tolist()

    def decode(self) -> tuple[list[str], NDArray[np.bool_]]:
        """Read the texts that are not read yet, and decode all: (texts, sound).

        sound: [B] bool, whether the member exists, matches its checksum and is text. texts: [B],
        empty where not sound.
        """
        members, payloads = self._members, self.payloads
        texts, sound = [""] * len(payloads), [False] * len(payloads)
        starts, sizes, crcs = (members[name].tolist() for name in MEMBER_DTYPE.names or ())
        small = (members["offset"] > 0) & (members["size"] <= MAX_TEXT_BYTES)
        for place in np.flatnonzero(small).tolist():
            payload = payloads[place]
            if payload is None:
                payload = self._files[place].read(starts[place], sizes[place])
            if crc32(payload) == crcs[place]:
                texts[place], sound[place] = decode_text(payload), True
        return texts, np.array(sound, bool)
