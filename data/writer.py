"""Shards, written deterministically and never seen half done."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from webdataset.writer import TarWriter

from data.manifest import Kind, Shard
from data.register import register_shard
from data.storage import commit, temporary_beside


class ShardWriter:
    """Writes one shard; it appears, indexed, when the `with` block ends without an error.

    The same samples give the same bytes: times are zero and the owner is fixed.
    """

    shard: Shard
    """The manifest's entry, once the shard is closed."""

    def __init__(self, folder: Path, name: str, kind: Kind) -> None:
        self._folder, self._name, self._kind = folder, name, kind
        self._temporary = temporary_beside(folder / name)
        self._file = self._temporary.open("wb")
        self._tar = TarWriter(self._file, encoder=False, mtime=0, format="PAX_FORMAT")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        else:
            self.discard()

    def write(self, key: str, members: Mapping[str, bytes]) -> None:
        """Append a sample: `members` maps an extension, such as `png`, to its bytes."""
        self._tar.write({"__key__": key, **members})

    def close(self) -> Shard:
        """Publish the shard and its index, and return the manifest's entry.

        Raises:
            ValueError: a sample was written that cannot be read back.
        """
        try:
            self._tar.close()
            self._file.close()
            commit(self._temporary, self._folder / self._name)
        finally:
            self.discard()
        registered = register_shard(self._folder, self._name, self._kind)
        for item in registered.rejected:
            raise ValueError(f"{self._name}: {item.key}: {item.reason}")
        self.shard = registered.shard
        return self.shard

    def discard(self) -> None:
        """Leave nothing behind of a shard that is not published."""
        for stream in (self._tar, self._file):
            with suppress(
                OSError
            ):  # closing writes what is left, for which a full disk has no room
                stream.close()
        self._temporary.unlink(missing_ok=True)


class ShardSetWriter:
    """Writes numbered samples into numbered shards of equal counts."""

    def __init__(self, folder: Path, kind: Kind, shard_samples: int) -> None:
        self.shards: list[Shard] = []
        self._folder, self._kind, self._shard_samples = folder, kind, shard_samples
        self._samples = 0
        self._writer: ShardWriter | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self._flush()
        elif self._writer is not None:
            self._writer.discard()

    def write(self, members: Mapping[str, bytes]) -> None:
        """Append a sample under the next key."""
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
