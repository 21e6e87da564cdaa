"""Samples by number: memory-mapped shards, every payload checked against the manifest."""

import hashlib
import zlib
from collections import OrderedDict
from threading import Lock
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.codecs import IMAGE_EXTENSIONS, BadSampleError, decode_image
from data.manifest import Manifest, ManifestError, Shard
from data.storage import join, local_path, map_bytes
from data.tar import decode_index
from data.transforms import square

MAX_OPEN_SHARDS = 256


class _OpenShard(NamedTuple):
    name: str
    keys: NDArray[np.bytes_]
    members: dict[str, NDArray]
    payloads: memoryview


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

    def payload(self, extension: str) -> memoryview:
        """Return a member's bytes, without a copy.

        Raises:
            BadSampleError: the sample has no such member, or its bytes are not those indexed.
        """
        column = self.shard.members.get(extension)
        offset, size, crc = (0, 0, 0) if column is None else column[self.row].item()
        if offset == 0:
            raise BadSampleError(f"no .{extension}")
        payload = self.shard.payloads[offset : offset + size]
        if zlib.crc32(payload) != crc:
            raise BadSampleError(f"the checksum of .{extension} does not match")
        return payload


class ShardReader:
    """Random access to a data set.

    Shards are opened when first needed; the least recently used one is let go.
    """

    def __init__(self, folder: str, manifest: Manifest) -> None:
        self._folder, self._manifest = folder, manifest
        sizes = np.array([shard.samples for shard in manifest.shards], np.int64)
        self._ends = np.cumsum(sizes)
        self._starts = self._ends - sizes
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._lock = Lock()

    def find(self, samples: NDArray[np.int64]) -> list[StoredSample]:
        """Find samples by their numbers in the manifest's order.

        Raises:
            IndexError: a number is negative or not below the number of samples.
            ManifestError: a shard is missing, cut off or replaced.
        """
        total = self._manifest.samples
        if len(samples) and not 0 <= samples.min() <= samples.max() < total:
            raise IndexError(f"samples {samples.min()} to {samples.max()} of {total}")
        shards = np.searchsorted(self._ends, samples, side="right")
        rows = samples - self._starts[shards]
        return [
            StoredSample(self._shard(shard), row)
            for shard, row in zip(shards.tolist(), rows.tolist(), strict=True)
        ]

    def _shard(self, number: int) -> _OpenShard:
        with self._lock:
            shard = self._open.get(number)
            if shard is None:
                shard = self._open[number] = self._open_shard(self._manifest.shards[number])
                if len(self._open) > MAX_OPEN_SHARDS:
                    self._open.popitem(last=False)
            else:
                self._open.move_to_end(number)
        return shard

    def _open_shard(self, shard: Shard) -> _OpenShard:
        """Map a shard and its index, which must be those of the manifest.

        Raises:
            ManifestError: one is missing, cut off or replaced.
        """
        location = join(self._manifest.base or self._folder, shard.name)
        index_location = join(self._folder, shard.index_name)
        try:
            payloads, index = map_bytes(location), map_bytes(index_location)
        except FileNotFoundError as error:
            raise ManifestError(
                f"{location}: the manifest in {self._folder} lists this shard, but {error}"
            ) from error
        if len(payloads) != shard.size_bytes:
            raise ManifestError(
                f"{location} has {len(payloads)} bytes, but the manifest in {self._folder} says "
                f"{shard.size_bytes}: the shard was cut off or replaced; restore it or pack again"
            )
        remote = local_path(location) is None
        if remote and hashlib.sha256(payloads).hexdigest() != shard.sha256:
            raise ManifestError(f"{location} is not the shard of the manifest: its hash differs")
        if hashlib.sha256(index).hexdigest() != shard.index_sha256:
            raise ManifestError(
                f"{index_location} is not the index of the manifest: its hash differs; pack again"
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
