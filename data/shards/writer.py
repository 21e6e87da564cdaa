"""Write shards deterministically, whole or not at all."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Self

from webdataset.writer import TarWriter

from data.shards.codecs import BadSampleError
from data.shards.index import key_problem
from data.shards.manifest import Kind, Shard
from data.shards.register import register_shard
from data.storage.atomic import commit, hidden_file, named

WRITE_BYTES = 2**20
"""Size of each write. Linux keeps the bytes of one write in pages of memory that lie together, and
reads them faster than scattered ones."""


class ShardWriter:
    """Writes one shard; it appears with its index when the `with` block ends without an error.

    The same samples give the same bytes: all times are zero and the owner is fixed.
    """

    shard: Shard
    """The manifest's entry, set when the shard is closed."""

    def __init__(self, folder: Path, name: str, kind: Kind) -> None:
        self._folder, self._name, self._kind = folder, name, kind
        self._part = hidden_file(folder / name)
        self._file = self._part.open("wb", WRITE_BYTES)
        self._keys: set[str] = set()
        self._tar = TarWriter(self._file, encoder=False, mtime=0, format="PAX_FORMAT")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.close()
        else:
            self.discard()

    def write(self, key: str, members: Mapping[str, bytes]) -> None:
        """Append a sample; `members` maps extensions such as `png` to bytes.

        Raises: BadSampleError where a reader could not find the sample by this key.
        """
        problem = "key of two samples" if key in self._keys else key_problem(key)
        if problem:
            raise BadSampleError(problem)
        self._keys.add(key)
        with named(self._folder / self._name):
            self._tar.write({"__key__": key, **members})

    def close(self) -> Shard:
        """Publish the shard and its index, and return the manifest's entry.

        Raises: ValueError where a written sample cannot be read back; OSError where the disk fails.
        """
        try:
            with named(self._folder / self._name):
                self._tar.close()
                self._file.close()
                commit(self._part, self._folder / self._name)
        finally:
            self.discard()
        registered = register_shard(self._folder, self._name, self._kind)
        for item in registered.rejected:
            raise ValueError(f"{self._name}: {item.key}: {item.reason}")
        self.shard = registered.shard
        return self.shard

    def discard(self) -> None:
        """Delete the hidden file of a shard that is not published."""
        for stream in (self._tar, self._file):
            with suppress(OSError):  # closing flushes, which fails on a full disk
                stream.close()
        self._part.unlink(missing_ok=True)


class ShardSetWriter:
    """Writes numbered samples to numbered shards of `shard_samples` each."""

    def __init__(self, folder: Path, kind: Kind, shard_samples: int) -> None:
        self.shards: list[Shard] = []
        """The manifest's entries of the published shards."""
        self._folder, self._kind, self._shard_samples = folder, kind, shard_samples
        self._samples = 0
        self._writer: ShardWriter | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self._flush()
        elif self._writer is not None:
            self._writer.discard()

    def write(self, members: Mapping[str, bytes]) -> None:
        """Append a sample under the next key.

        Raises: as `ShardWriter.close`.
        """
        if self._writer is None:
            name = f"{len(self.shards):06d}.tar"
            self._writer = ShardWriter(self._folder, name, self._kind)
        self._writer.write(f"{self._samples:09d}", members)
        self._samples += 1
        if self._samples % self._shard_samples == 0:
            self._flush()

    def _flush(self) -> None:
        if self._writer is not None:
            self.shards.append(self._writer.close())
            self._writer = None
