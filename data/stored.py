"""Samples where they lie in mapped shards: one by one, or a batch side by side."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
from isal.isal_zlib import crc32
from numpy.typing import DTypeLike, NDArray

from data.codecs import (
    IMAGE_EXTENSIONS,
    BadSampleError,
    decode_image,
    decode_text,
    encode_npy,
)
from data.tar import BLOCK_BYTES, MEMBER_DTYPE
from data.transforms import square

Ids = NDArray[np.int64]
Members = NDArray[np.void]
"""Where a member of each sample lies: [B] of MEMBER_DTYPE, zeros where there is none."""


@dataclass(frozen=True, slots=True, eq=False)
class OpenShard:
    """A mapped shard."""

    name: str
    index: NDArray[np.void]
    """As `data.tar.index_shard` makes it: [samples]."""
    payloads: memoryview


class StoredSample(NamedTuple):
    """A sample where it lies: a row of a shard's index."""

    shard: OpenShard
    row: int

    @property
    def key(self) -> str:
        """The sample's key, unique within its shard."""
        return self.shard.index["key"][self.row].decode()

    def has(self, extension: str) -> bool:
        """Say whether the sample has a member."""
        index = self.shard.index
        return extension in (index.dtype.names or ()) and bool(index[extension]["offset"][self.row])

    def member(self, extension: str) -> memoryview | None:
        """Return a member's bytes, without a copy; None if the sample has no such member.

        Raises:
            BadSampleError: its bytes are not those indexed.
        """
        return self.payload(extension) if self.has(extension) else None

    def payload(self, extension: str) -> memoryview:
        """Return a member's bytes, without a copy.

        Raises:
            BadSampleError: the sample has no such member, or its bytes are not those indexed.
        """
        if not self.has(extension):
            raise BadSampleError(f"no .{extension}")
        offset, size, crc = self.shard.index[extension][self.row].item()
        payload = self.shard.payloads[offset : offset + size]
        if crc32(payload) != crc:
            raise BadSampleError(f"the checksum of .{extension} does not match")
        return payload


class ArrayLayout(NamedTuple):
    """The .npy files that our own writer makes of arrays of one data type and shape."""

    dtype: np.dtype
    shape: tuple[int, ...]
    header: np.void
    """What such a file begins with."""
    header_crc: int
    file_bytes: int

    @classmethod
    def of(cls, dtype: DTypeLike, shape: Sequence[int]) -> Self:
        """Describe the files of arrays of a data type and shape."""
        array = np.zeros(shape, dtype)
        file = encode_npy(array)
        header = file[: len(file) - array.nbytes]
        return cls(array.dtype, array.shape, np.void(header), crc32(header), len(file))


class StoredBatch:
    """Samples where they lie, read side by side: all of one member at a time.

    Args:
        shards: Open shards by their numbers.
        numbers: Each sample's shard: [B].
        rows: Its row in the shard's index: [B].
    """

    def __init__(self, shards: dict[int, OpenShard], numbers: Ids, rows: Ids) -> None:
        self._shards, self._numbers, self._rows = shards, numbers, rows
        self._payloads = [shards[number].payloads for number in numbers.tolist()]
        self._places = {number: np.flatnonzero(numbers == number) for number in shards}
        """Places in the batch of each shard's samples."""
        tables: dict[np.dtype, tuple[list[Ids], list[NDArray]]] = {}
        for number, shard in shards.items():
            places, parts = tables.setdefault(shard.index.dtype, ([], []))
            places.append(self._places[number])
            # as plain bytes: numpy copies structures slowly, field by field
            records = shard.index.view((np.void, shard.index.itemsize))
            parts.append(records[rows[self._places[number]]])
        self._tables = [
            (np.concatenate(places), np.concatenate(parts).view(columns))
            for columns, (places, parts) in tables.items()
        ]
        """Rows of all indexes with the same columns, and their samples' places in the batch."""

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: int) -> StoredSample:
        return StoredSample(self._shards[int(self._numbers[place])], int(self._rows[place]))

    def __iter__(self) -> Iterator[StoredSample]:
        return (self[place] for place in range(len(self)))

    def keys(self) -> list[str]:
        """Return the samples' keys, each unique within its shard."""
        keys = [""] * len(self)
        for places, table in self._tables:
            for place, key in zip(places.tolist(), table["key"].tolist(), strict=True):
                keys[place] = key.decode()
        return keys

    def members(self, *extensions: str) -> Members:
        """Return where the first of the members lies that a sample has, for each sample."""
        members = np.zeros(len(self), MEMBER_DTYPE)
        for places, table in self._tables:
            for extension in reversed(extensions):
                if extension in (table.dtype.names or ()):
                    found = table[extension]
                    present = np.flatnonzero(found["offset"])
                    members[places[present]] = found[present]
        return members

    def texts(self, members: Members) -> tuple[list[str], NDArray[np.bool_]]:
        """Read text members.

        Returns:
            texts: [B], of meaning only where sound.
            sound: [B] bool: the member is there, unchanged, and a text.
        """
        texts, sound = [""] * len(self), [False] * len(self)
        starts, crcs = members["offset"].tolist(), members["crc"].tolist()
        stops = (members["offset"] + members["size"]).tolist()
        for place in np.flatnonzero(members["offset"]).tolist():
            payload = self._payloads[place][starts[place] : stops[place]]
            if crc32(payload) == crcs[place]:
                try:
                    texts[place] = decode_text(payload)
                except BadSampleError:
                    continue
                sound[place] = True
        return texts, np.array(sound, bool)

    def copy(self, members: Members, layout: ArrayLayout, arrays: NDArray) -> NDArray[np.bool_]:
        """Copy array members of one layout out of the shards.

        Args:
            members: Where they lie.
            layout: What they must be like.
            arrays: Filled, of meaning only where sound: [B, *shape].

        Returns:
            sound: [B] bool: the member is there, unchanged, and of this layout.
        """
        rows = arrays.reshape(-1).view(np.uint8).data
        row_bytes = layout.file_bytes - layout.header.nbytes
        stops, crcs = (members["offset"] + members["size"]).tolist(), members["crc"].tolist()
        sound = [False] * len(self)
        for place in np.flatnonzero(self._begin_as(members, layout)).tolist():
            stop = stops[place]
            values = self._payloads[place][stop - row_bytes : stop]
            if crc32(values, layout.header_crc) == crcs[place]:
                rows[place * row_bytes : (place + 1) * row_bytes] = values
                sound[place] = True
        return np.array(sound, bool)

    def _begin_as(self, members: Members, layout: ArrayLayout) -> NDArray[np.bool_]:
        """Say which members have the size and the header of a layout: [B] bool."""
        fitting = members["size"] == layout.file_bytes
        blocks = np.where(fitting, members["offset"] // BLOCK_BYTES, 0)
        headers = np.empty(len(self), layout.header.dtype)
        for number, places in self._places.items():
            payloads = self._shards[number].payloads
            block_count = len(payloads) // BLOCK_BYTES
            starts = np.ndarray(block_count, headers.dtype, payloads, strides=(BLOCK_BYTES,))
            headers[places] = starts[blocks[places]]
        return fitting & (headers == layout.header)


def decode_square(sample: StoredSample, size: int) -> NDArray[np.uint8]:
    """Decode a sample's image into the network's frame: [size, size, 3] uint8.

    Raises:
        BadSampleError: it has no image, or none that can be decoded.
    """
    for extension in IMAGE_EXTENSIONS:
        if sample.has(extension):
            return square(decode_image(sample.payload(extension)), size)
    raise BadSampleError("no image")
