"""The state of a folder of latents, while any number of tasks fill it and may die doing so.

Beside every finished shard lies a receipt: what it was made from, its sums, its rejected samples.
A claim on a shard is a lock, which the kernel takes back from a task that dies.
"""

import dataclasses
import fcntl
import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from data.manifest import FILE_NAME, REJECTED_NAME, Manifest, Rejected, Shard
from data.storage import local_path, write_atomic

CLAIMS_NAME = ".claims"
RECEIPT_SUFFIX = ".receipt.json"
OPTIONS = {
    "encoder": "autoencoder.weights",
    "transform": "data.image_size",
    "precision": "precompute.precision",
    "flip": "data.flip",
    "text_encoder": "data.store_text or conditioner.pretrained",
}
"""The entries of an identity, and the options behind them."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What a finished shard says of itself."""

    identity: dict[str, Any]
    """Of the encoder and all that decides what it makes of an image."""
    source_sha256: str
    """Of the image shard."""
    shard: dict[str, Any]
    shape: list[int]
    """[C, h, w]."""
    count: int
    """Latent pixels a channel."""
    sums: list[float]
    """Of the posterior means, by channel."""
    square_sums: list[float]
    """Of mean² + variance, by channel."""
    rejected: list[dict[str, str]]


class Survey(NamedTuple):
    """Which shards are finished."""

    receipts: dict[str, Receipt]
    """Of the finished shards, by name."""
    missing: dict[str, str]
    """Why each of the others is to be encoded, by name."""


class LatentFolder:
    """The folder data.latents of one encoder.

    Raises: ValueError if it is not a local one.
    """

    def __init__(self, location: str, images: Manifest, identity: dict[str, Any]) -> None:
        path = local_path(location)
        if path is None:
            raise ValueError(
                f"data.latents: {location} is no local folder; encode to one and copy it there"
            )
        path.mkdir(parents=True, exist_ok=True)
        self.path, self.identity = path, identity
        self._numbers = {shard.name: number for number, shard in enumerate(images.shards)}
        self._claims = (path / CLAIMS_NAME).open("a")

    def survey(self, sources: Iterable[Shard]) -> Survey:
        """See which image shards have their latents.

        Raises: ValueError naming the shards made with other options, and these.
        """
        survey, others = Survey({}, {}), []
        for source in sources:
            try:
                receipt = Receipt(**json.loads(self._receipt_path(source.name).read_bytes()))
            except (FileNotFoundError, ValueError, TypeError):
                survey.missing[source.name] = "not encoded"
                continue
            different = [
                option
                for entry, option in OPTIONS.items()
                if receipt.identity.get(entry) != self.identity[entry]
            ]
            if different:
                others.append(f"{source.name} ({', '.join(different)})")
            elif receipt.source_sha256 != source.sha256:
                survey.missing[source.name] = "its image shard was replaced"
            elif not self._is_whole(Shard(**receipt.shard)):
                survey.missing[source.name] = "cut off"
            else:
                survey.receipts[source.name] = receipt
        if others:
            raise ValueError(
                f"data.latents: {self.path} holds shards made with other options: "
                f"{shorten(others)}; delete the folder, or choose another data.latents"
            )
        return survey

    def finish(self, source: Shard, receipt: Receipt) -> None:
        """Write the receipt of a shard that lies whole, and give the shard back."""
        document = json.dumps(dataclasses.asdict(receipt), indent=1)
        write_atomic(self._receipt_path(source.name), document.encode())
        self._unlock(self._numbers[source.name])

    def claim(self, source: Shard) -> bool:
        """Take a shard, unless another task is at it or has finished it."""
        number = self._numbers[source.name]
        if not self._lock(number):
            return False
        if not self.survey([source]).missing:
            self._unlock(number)
            return False
        return True

    def publish(self, manifest: Manifest, rejected: list[Rejected]) -> None:
        """Write the manifest, one task at a time."""
        number = len(self._numbers)
        self._lock(number, wait=True)
        for name in (FILE_NAME, REJECTED_NAME):
            for leftover in self.path.glob(f".{name}.*.part"):
                leftover.unlink()
        manifest.save(self.path, rejected)
        self._unlock(number)

    def remove_leftovers(self, sources: Iterable[Shard]) -> None:
        """Delete what tasks that died at these shards left unfinished."""
        names = {source.name for source in sources}
        for leftover in self.path.rglob(".*.part"):
            # .SHARD[.receipt.json].RANDOM.part
            owner = leftover.name[1:].rsplit(".", 2)[0]
            owner = owner.removesuffix(".index.npy").removesuffix(RECEIPT_SUFFIX)
            name = leftover.with_name(owner).relative_to(self.path).as_posix()
            if name in names and self._lock(self._numbers[name]):
                leftover.unlink()
                self._unlock(self._numbers[name])

    def close(self) -> None:
        """Give back what is still claimed."""
        self._claims.close()

    def _lock(self, number: int, *, wait: bool = False) -> bool:
        """Lock one byte of the file of claims."""
        mode = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
        try:
            fcntl.lockf(self._claims, mode, 1, number)
        except (BlockingIOError, PermissionError):
            return False
        except OSError:
            return True  # a file system without locks: two tasks at one shard do its work twice
        return True

    def _unlock(self, number: int) -> None:
        with suppress(OSError):
            fcntl.lockf(self._claims, fcntl.LOCK_UN, 1, number)

    def _is_whole(self, shard: Shard) -> bool:
        try:
            found = (self.path / shard.name).stat().st_size
        except FileNotFoundError:
            return False
        return found == shard.size_bytes and (self.path / shard.index_name).exists()

    def _receipt_path(self, name: str) -> Path:
        return self.path / f"{name}{RECEIPT_SUFFIX}"


def shorten(names: list[str]) -> str:
    """The first three of them, and how many there are besides."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
