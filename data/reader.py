"""Samples by number: memory-mapped shards, every payload checked against the manifest."""

import hashlib
import mmap
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from threading import Lock
from typing import NamedTuple, Self

import numpy as np
from isal.isal_zlib import crc32
from numpy.typing import DTypeLike, NDArray

from data.cache import CacheFullError, FileCache, ListedFile
from data.codecs import IMAGE_EXTENSIONS, BadSampleError, decode_image, decode_text, encode_npy
from data.config import CacheConfig
from data.manifest import Manifest, ManifestError, Shard
from data.storage import join, local_path, map_bytes, size_bytes
from data.tar import decode_index
from data.transforms import square

MAX_OPEN_SHARDS = 256
MAX_RESIDENT_BYTES = 2**26
"""How much is read before the pages of the mappings are given back."""
MAX_MAPPED_BYTES = 2**29
"""A smaller data set stays mapped: to map a page again costs more than to read it."""

Ids = NDArray[np.int64]
Member = tuple[int, int, int]
"""Offset, size and CRC-32."""
NO_MEMBER: Member = (0, 0, 0)


class _OpenShard(NamedTuple):
    name: str
    keys: NDArray[np.bytes_]
    members: dict[str, NDArray]
    payloads: memoryview

    def payload(self, extension: str, offset: int, size: int, crc: int) -> memoryview:
        """Return a member's bytes, without a copy.

        Raises:
            BadSampleError: there is no such member, or its bytes are not those indexed.
        """
        if offset == 0:
            raise BadSampleError(f"no .{extension}")
        payload = self.payloads[offset : offset + size]
        if crc32(payload) != crc:
            raise BadSampleError(f"the checksum of .{extension} does not match")
        return payload


class StoredSample(NamedTuple):
    """A sample where it lies: a row of a shard's index."""

    shard: _OpenShard
    row: int

    @property
    def key(self) -> str:
        """The sample's key, unique within its shard."""
        return self.shard.keys[self.row].decode()

    def has(self, extension: str) -> bool:
        """Say whether the sample has a member."""
        column = self.shard.members.get(extension)
        return column is not None and bool(column["offset"][self.row])

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
        column = self.shard.members.get(extension)
        member = NO_MEMBER if column is None else column[self.row].item()
        return self.shard.payload(extension, *member)


class ArrayLayout(NamedTuple):
    """The .npy files that our own writer makes of arrays of one data type and shape."""

    dtype: np.dtype
    shape: tuple[int, ...]
    header_bytes: int
    header_crc: int

    @classmethod
    def of(cls, dtype: DTypeLike, shape: Sequence[int]) -> Self:
        """Describe the files of arrays of a data type and shape."""
        array = np.zeros(shape, dtype)
        file = encode_npy(array)
        header = file[: len(file) - array.nbytes]
        return cls(array.dtype, array.shape, len(header), crc32(header))


class StoredBatch:
    """Samples where they lie, read side by side: all of one member at a time."""

    def __init__(self, shards: dict[int, _OpenShard], numbers: Ids, rows: Ids) -> None:
        self._shards, self._numbers, self._rows = shards, numbers, rows
        self._groups: list[tuple[_OpenShard, Ids, Ids]] = []
        """Each shard with its samples' places in the batch and rows in its index, [n] each."""
        for number, shard in shards.items():
            places = np.flatnonzero(numbers == number)
            self._groups.append((shard, places, rows[places]))
        self._payloads = [shards[number].payloads for number in numbers.tolist()]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: int) -> StoredSample:
        return StoredSample(self._shards[int(self._numbers[place])], int(self._rows[place]))

    def __iter__(self) -> Iterator[StoredSample]:
        return (self[place] for place in range(len(self)))

    def keys(self) -> list[str]:
        """Return the samples' keys, each unique within its shard."""
        keys = [""] * len(self)
        for shard, places, rows in self._groups:
            for place, key in zip(places.tolist(), shard.keys[rows].tolist(), strict=True):
                keys[place] = key.decode()
        return keys

    def members(self, *extensions: str) -> list[Member]:
        """Return where the first of the members lies that a sample has, for each sample."""
        members = [NO_MEMBER] * len(self)
        for shard, places, rows in self._groups:
            for extension in reversed(extensions):
                if extension in shard.members:
                    found = shard.members[extension][rows].tolist()
                    for place, member in zip(places.tolist(), found, strict=True):
                        if member[0]:
                            members[place] = member
        return members

    def texts(self, members: list[Member]) -> tuple[list[str], NDArray[np.bool_]]:
        """Read text members.

        Returns:
            texts: [B], of meaning only where sound.
            sound: [B] bool: the member is there, unchanged, and a text.
        """
        texts, sound = [""] * len(self), np.zeros(len(self), bool)
        for place, (offset, size, crc) in enumerate(members):
            payload = self._payloads[place][offset : offset + size]
            if offset and crc32(payload) == crc:
                try:
                    texts[place] = decode_text(payload)
                except BadSampleError:
                    continue
                sound[place] = True
        return texts, sound

    def arrays(
        self, members: list[Member], layout: ArrayLayout
    ) -> tuple[NDArray, NDArray[np.bool_]]:
        """Copy array members of one layout out of the shards.

        Returns:
            arrays: [B, *shape], of meaning only where sound.
            sound: [B] bool: the member is there, unchanged, and of this layout.
        """
        arrays = np.empty((len(self), *layout.shape), layout.dtype)
        sound = np.zeros(len(self), bool)
        rows = arrays.reshape(-1).view(np.uint8).data
        row_bytes = len(rows) // max(len(self), 1)
        for place, (offset, size, crc) in enumerate(members):
            start = offset + layout.header_bytes
            header = self._payloads[place][offset:start]
            values = self._payloads[place][start : offset + size]
            if (
                len(values) == row_bytes
                and crc32(header) == layout.header_crc
                and crc32(values, layout.header_crc) == crc
            ):
                rows[place * row_bytes : (place + 1) * row_bytes] = values
                sound[place] = True
        return arrays, sound


class ShardReader:
    """Random access to a data set.

    Shards are opened when first needed; the least recently used one is let go.

    Args:
        folder: The data set, a path or URL.
        manifest: Its manifest.
        cache: Where remote files are kept.
    """

    def __init__(self, folder: str, manifest: Manifest, cache: CacheConfig | None = None) -> None:
        self._folder, self._manifest = folder, manifest
        self.cache = FileCache(cache or CacheConfig())
        sizes = np.array([shard.samples for shard in manifest.shards], np.int64)
        self._ends = np.cumsum(sizes)
        self._starts = self._ends - sizes
        self._mean_bytes = manifest.size_bytes / max(manifest.samples, 1)
        self._resident_bytes = 0.0
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._lock = Lock()

    def find(self, samples: Ids) -> StoredBatch:
        """Find samples by their numbers in the manifest's order.

        Raises:
            IndexError: a number is negative or not below the number of samples.
            ManifestError: a shard is missing, cut off or replaced.
        """
        total = self._manifest.samples
        if len(samples) and not 0 <= samples.min() <= samples.max() < total:
            raise IndexError(f"samples {samples.min()} to {samples.max()} of {total}")
        numbers = np.searchsorted(self._ends, samples, side="right")
        rows = samples - self._starts[numbers]
        shards = {number: self._shard(number) for number in dict.fromkeys(numbers.tolist())}
        self._bound_resident(len(samples))
        return StoredBatch(shards, numbers, rows)

    def check_access(self, sample: int) -> None:
        """See whether a sample's shard can be read; of a remote one, its size tells.

        Raises:
            ManifestError: the shard is missing, cut off or replaced.
            OSError: the store cannot be read.
        """
        shard = self._manifest.shards[int(np.searchsorted(self._ends, sample, side="right"))]
        tar, _ = self._files(shard)
        if local_path(tar.location) is not None:
            self.find(np.array([sample]))
        elif size_bytes(tar.location) != shard.size_bytes:
            raise ManifestError(
                f"{tar.location} has not the size that the manifest in {self._folder} says: it was "
                "cut off or replaced; restore it or pack again"
            )

    @property
    def is_remote(self) -> bool:
        """Whether anything has to be fetched."""
        return None in (local_path(self._folder), local_path(self._manifest.base or self._folder))

    def remote_files(self, shards: Ids) -> list[ListedFile]:
        """Return what has to be fetched to read shards, in their order."""
        found = (self._files(self._manifest.shards[number]) for number in shards.tolist())
        return [file for files in found for file in files if local_path(file.location) is None]

    def keep(self, shards: Ids) -> None:
        """Let all other shards go."""
        with self._lock:
            for number in self._open.keys() - set(shards.tolist()):
                del self._open[number]

    def _shard(self, number: int) -> _OpenShard:
        with self._lock:
            while number not in self._open:
                try:
                    self._open[number] = self._open_shard(self._manifest.shards[number])
                except CacheFullError:
                    if not self._open:
                        raise
                    self._open.popitem(last=False)
            self._open.move_to_end(number)
            if len(self._open) > MAX_OPEN_SHARDS:
                self._open.popitem(last=False)
            return self._open[number]

    def _bound_resident(self, samples: int) -> None:
        """Give back mapped pages before they add up; what is touched again is mapped again."""
        if self._manifest.size_bytes <= MAX_MAPPED_BYTES:
            return
        self._resident_bytes += samples * self._mean_bytes
        if self._resident_bytes > MAX_RESIDENT_BYTES:
            self._resident_bytes = 0.0
            with self._lock:
                for shard in self._open.values():
                    if isinstance(shard.payloads.obj, mmap.mmap):
                        shard.payloads.obj.madvise(mmap.MADV_DONTNEED)

    def _files(self, shard: Shard) -> tuple[ListedFile, ListedFile]:
        """Return a shard and its index, which need not lie in the same place."""
        return (
            ListedFile(
                location=join(self._manifest.base or self._folder, shard.name),
                sha256=shard.sha256,
                size_bytes=shard.size_bytes,
            ),
            ListedFile(
                location=join(self._folder, shard.index_name),
                sha256=shard.index_sha256,
            ),
        )

    def _map(self, file: ListedFile) -> mmap.mmap | bytes:
        is_remote = local_path(file.location) is None
        return self.cache.map(file) if is_remote else map_bytes(file.location)

    def _open_shard(self, shard: Shard) -> _OpenShard:
        """Map a shard and its index, which must be those of the manifest.

        Raises:
            ManifestError: one is missing, cut off or replaced.
        """
        tar, index_file = self._files(shard)
        try:
            payloads, index = self._map(tar), self._map(index_file)
        except FileNotFoundError as error:
            raise ManifestError(
                f"{tar.location}: the manifest in {self._folder} lists this shard, but {error}"
            ) from error
        if len(payloads) != shard.size_bytes:
            raise ManifestError(
                f"{tar.location} has {len(payloads)} bytes, but the manifest in {self._folder} "
                f"says {shard.size_bytes}: it was cut off or replaced; restore it or pack again"
            )
        if hashlib.sha256(index).hexdigest() != shard.index_sha256:
            raise ManifestError(
                f"{index_file.location} is not the index of the manifest: its hash differs; "
                "pack again"
            )
        rows = decode_index(index)
        members = {name: rows[name] for name in rows.dtype.fields or () if name != "key"}
        return _OpenShard(shard.name, rows["key"], members, memoryview(payloads))


def decode_square(sample: StoredSample, size: int) -> NDArray[np.uint8]:
    """Decode a sample's image into the network's frame: [size, size, 3] uint8.

    Raises:
        BadSampleError: it has no image, or none that can be decoded.
    """
    for extension in IMAGE_EXTENSIONS:
        if sample.has(extension):
            return square(decode_image(sample.payload(extension)), size)
    raise BadSampleError("no image")
