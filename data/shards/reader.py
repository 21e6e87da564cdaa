"""Find samples by number in open shards, which are checked against the manifest."""

import hashlib
from collections import OrderedDict
from threading import Lock

import numpy as np

from data.config import CacheConfig
from data.shards.cache import CacheFullError, FileCache, ListedFile
from data.shards.codecs import MAX_ARRAY_BYTES, BadSampleError
from data.shards.index import check_places, decode_index
from data.shards.manifest import Ids, Manifest, ManifestError, Shard
from data.shards.stored import OpenShard, StoredBatch
from data.storage.files import join_location, local_path, open_file, size_bytes
from data.storage.local_file import LocalFile

MAX_OPEN_SHARDS = 256


class ShardReader:
    """Random access to the samples of a data set.

    Shards are opened at their first use; beyond MAX_OPEN_SHARDS the least recently used is closed.
    folder: path or URL of the data set. cache: options of the local copies of remote files. source:
    data.source.path; shards outside of the folder must lie there.
    Raises: ManifestError where the manifest leads to another place.
    """

    def __init__(
        self,
        folder: str,
        manifest: Manifest,
        cache: CacheConfig | None = None,
        *,
        source: str = "",
    ) -> None:
        self._folder, self._manifest = folder, manifest
        self._shards_at = manifest.shards_at(folder, source)
        self.cache = FileCache(cache or CacheConfig())
        self._ends = np.cumsum(manifest.shard_sizes)
        self._starts = self._ends - manifest.shard_sizes
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._lock = Lock()

    def find(self, samples: Ids) -> StoredBatch:
        """Find samples by their numbers [B] in the manifest's order.

        Raises: IndexError where a number is negative or not below the number of samples;
        ManifestError where a shard is missing, cut off or replaced; OSError where a store or disk
        fails.
        """
        total = self._manifest.samples
        if len(samples) and not 0 <= samples.min() <= samples.max() < total:
            raise IndexError(f"samples {samples.min()} to {samples.max()} of {total}")
        numbers = np.searchsorted(self._ends, samples, side="right")
        rows = samples - self._starts[numbers]
        shards = {number: self._shard(number) for number in dict.fromkeys(numbers.tolist())}
        return StoredBatch(shards, numbers, rows)

    def check_access(self, sample: int) -> None:
        """Check that the shard of a sample can be read; of a remote shard only the size is checked.

        Raises: ManifestError where the shard is missing, cut off or replaced; OSError where the
        store cannot be read.
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
        """Whether the shards or their indexes lie in a remote store."""
        return None in (local_path(self._folder), local_path(self._shards_at))

    def remote_files(self, shards: Ids) -> list[ListedFile]:
        """Return the remote files of shards [n], in the order of the shards."""
        numbers: list[int] = shards.tolist()
        found = (self._files(self._manifest.shards[number]) for number in numbers)
        return [file for files in found for file in files if local_path(file.location) is None]

    def keep(self, shards: Ids) -> None:
        """Close all shards except these [n]."""
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

    def _files(self, shard: Shard) -> tuple[ListedFile, ListedFile]:
        """Return a shard and its index; the two may lie in different places."""
        return (
            ListedFile(
                location=join_location(self._shards_at, shard.name),
                sha256=shard.sha256,
                size_bytes=shard.size_bytes,
            ),
            ListedFile(
                location=join_location(self._folder, shard.index_name),
                sha256=shard.index_sha256,
            ),
        )

    def _open_file(self, file: ListedFile) -> LocalFile:
        is_remote = local_path(file.location) is None
        return self.cache.map(file) if is_remote else open_file(file.location)

    def _read_index(self, file: ListedFile) -> bytes:
        index = self._open_file(file)
        if len(index) > MAX_ARRAY_BYTES:
            raise ManifestError(f"{file.location} of {len(index)} bytes is over {MAX_ARRAY_BYTES}")
        return index[:]

    def _open_shard(self, shard: Shard) -> OpenShard:
        """Open a shard, read its index, and check both against the manifest.

        Raises: ManifestError where one is missing, cut off or replaced.
        """
        tar, index_file = self._files(shard)
        try:
            file, index = self._open_file(tar), self._read_index(index_file)
        except FileNotFoundError as error:
            raise ManifestError(
                f"{tar.location}: the manifest in {self._folder} lists this shard, but {error}"
            ) from error
        if len(file) != shard.size_bytes:
            raise ManifestError(
                f"{tar.location} has {len(file)} bytes, but the manifest in {self._folder} "
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
        return OpenShard(shard.name, rows, file)
