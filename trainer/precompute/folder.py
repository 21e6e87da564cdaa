"""A folder of latents that several tasks fill at once; any of them may be killed.

Each finished shard has a receipt beside it: the hashes of its sources, its sums, its rejected
samples. A task claims a shard by a lock on a file; the kernel releases the locks of a killed task.
"""

import dataclasses
import fcntl
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from data.shards.manifest import FILE_NAME, REJECTED_NAME, Manifest, Rejected, Shard
from data.shards.register import MAX_RECEIPT_BYTES
from data.storage.atomic import remove_leftovers, write_atomic
from data.storage.documents import read_json
from data.storage.files import local_path
from data.storage.lease import Lease, refuse_if_held, take
from data.storage.untrusted import open_append

CLAIMS_NAME = ".claims"
LEASE_NAME, ANY_LEASE = ".task_{}_of_{}.lease", ".task_*_of_*.lease"
RECEIPT_SUFFIX = ".receipt.json"
OPTIONS = {
    "encoder": "autoencoder.weights",
    "transform": "data.image_size or data.pixels",
    "precision": "precompute.precision",
    "flip": "data.flip",
    "text_encoder": "data.store_text or conditioner.pretrained",
    "captions": "data.captions or data.caption_fields",
    "annotations": "data.maps or data.boxes",
    "images": "data.store_images",
}
"""Entry of an identity → the options that determine it."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """A finished shard: its sources, sums and rejected samples."""

    identity: dict[str, Any]
    """The encoder, and the options that latents depend on; see `Encoder.identity`."""
    source_sha256: str
    """SHA-256 of the image shard."""
    shard: dict[str, Any]
    """The latent shard, as the fields of a `Shard`."""
    shape: list[int]
    """[C, h, w]."""
    count: int
    """Number of latent pixels in a channel, over all samples."""
    sums: list[float]
    """Sum of the posterior means, by channel: [C]."""
    square_sums: list[float]
    """Sum of mean² + variance of the posteriors, by channel: [C]."""
    rejected: list[dict[str, str]]
    """As the fields of `Rejected`."""
    noted: dict[str, int] = dataclasses.field(default_factory=dict[str, int])
    """See `Manifest.noted`."""


class Survey(NamedTuple):
    """Finished and missing shards of a folder."""

    receipts: dict[str, Receipt]
    """Name of a finished shard → its receipt."""
    missing: dict[str, str]
    """Name of any other shard → the reason why it must be encoded."""


class LatentFolder:
    """The folder data.latents, for shards of one encoder.

    Raises: ValueError if it is not a local folder.
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
        self._claims = os.fdopen(open_append(path / CLAIMS_NAME), "a")
        self._lease: Lease | None = None

    def join(self, task: int, num_tasks: int) -> None:
        """Hold the lease of one task of a job; all tasks of a job fill the folder together.

        Raises: InUseError if another process runs this task, or a job of another number of tasks.
        """
        own = self.path / LEASE_NAME.format(task, num_tasks)
        self._lease = take(own, "give each process a precompute.task of its own")
        for lease in self.path.glob(ANY_LEASE):
            if not lease.name.endswith(own.name.partition("_of_")[2]):
                refuse_if_held(lease, f"take part with its precompute.num_tasks, not {num_tasks}")

    def survey(self, sources: Iterable[Shard]) -> Survey:
        """Find out which image shards have latents.

        Raises: ValueError that names the shards made with other options, and these options.
        """
        survey = Survey({}, {})
        others: list[str] = []
        for source in sources:
            try:
                path = self._receipt_path(source.name)
                receipt = Receipt(**read_json(path, limit=MAX_RECEIPT_BYTES, below=self.path))
            except (FileNotFoundError, ValueError, TypeError):
                survey.missing[source.name] = "not encoded"
                continue
            different = [
                option
                for entry, option in OPTIONS.items()
                if receipt.identity.get(entry, "") != self.identity[entry]
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
        """Write the receipt of a complete shard, and release the claim on it."""
        document = json.dumps(dataclasses.asdict(receipt), indent=1)
        write_atomic(self._receipt_path(source.name), document.encode())
        self._unlock(self._numbers[source.name])

    def claim(self, source: Shard) -> bool:
        """Claim a shard; return whether it is neither finished nor claimed by another task."""
        number = self._numbers[source.name]
        if not self._lock(number):
            return False
        if not self.survey([source]).missing:
            self._unlock(number)
            return False
        return True

    def publish(self, manifest: Manifest, rejected: list[Rejected]) -> None:
        """Write the manifest; a lock lets one task write at a time."""
        number = len(self._numbers)
        self._lock(number, wait=True)
        for name in (FILE_NAME, REJECTED_NAME):
            remove_leftovers(self.path / name)
        manifest.save(self.path, rejected)
        self._unlock(number)

    def remove_leftovers(self, sources: Iterable[Shard]) -> None:
        """Delete the unfinished files that killed tasks left of these shards."""
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
        """Release all claims, and the lease of the task."""
        self._claims.close()
        if self._lease is not None:
            self._lease.release()

    def _lock(self, number: int, *, wait: bool = False) -> bool:
        """Lock one byte of the file of claims; return whether it is locked now."""
        mode = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
        try:
            fcntl.lockf(self._claims, mode, 1, number)
        except (BlockingIOError, PermissionError):
            return False
        except OSError:
            return True  # no locks on this file system: two tasks may encode the same shard twice
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
    """Join the first three names, and the number of the others."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
