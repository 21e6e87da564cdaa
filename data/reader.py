"""Samples by number: memory-mapped shards, every payload checked against the manifest."""

import hashlib
import mmap
from collections import OrderedDict
from threading import Lock

import numpy as np

from data.cache import CacheFullError, FileCache, ListedFile
from data.codecs import BadSampleError
from data.config import CacheConfig
from data.manifest import Manifest, ManifestError, Shard
from data.storage import join, local_path, map_bytes, size_bytes
from data.stored import Ids, OpenShard, StoredBatch
from data.tar import check_places, decode_index

MAX_OPEN_SHARDS = 256
MAX_RESIDENT_BYTES = 2**26
"""How much is read before the pages of the mappings are given back."""
MAX_MAPPED_BYTES = 2**29
"""A smaller data set stays mapped: to map a page again costs more than to read it."""


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
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
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

    def _shard(self, number: int) -> OpenShard:
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

    def _open_shard(self, shard: Shard) -> OpenShard:
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
        try:
            rows = decode_index(index)
            check_places(rows, shard.samples, shard.size_bytes)
        except BadSampleError as error:
            raise ManifestError(f"{index_file.location}: {error}; pack again") from error
        return OpenShard(shard.name, rows, memoryview(payloads))
