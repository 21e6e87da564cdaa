"""Shards entered into a data set where they lie: indexed, hashed, filtered, by several processes.

Tars made elsewhere get a receipt beside each index, which says what the tar was and what was found
in it. A tar whose receipt fits is skipped: after a kill, the same command goes on where it was.
"""

import hashlib
import json
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from data import read_ahead
from data.codecs import CAPTION_EXTENSIONS, IMAGE_EXTENSIONS, BadSampleError, Buffer, encode_npy
from data.config import FilterConfig
from data.filters import first_to_drop
from data.manifest import Kind, Rejected, Shard
from data.metadata import SampleFields, read_download_counts, read_rows
from data.storage import join, map_bytes, write_atomic
from data.tar import index_shard

REQUIRED = {
    Kind.images: (IMAGE_EXTENSIONS, CAPTION_EXTENSIONS),
    Kind.latents: (("moments.npy",), CAPTION_EXTENSIONS),
}
"""Members that make a sample whole: at least one of each group."""

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tar:
    """A tar of images that is to become a shard."""

    folder: Path
    """The data set."""
    base: str
    """Folder or URL of the tars."""
    name: str
    """Relative to `base`."""
    size_bytes: int

    @property
    def location(self) -> str:
        """Path or URL."""
        return join(self.base, self.name)

    @property
    def receipt(self) -> Path:
        """What `register_tar` leaves beside the index."""
        return self.folder / f"{self.name}.receipt.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Registered:
    """A shard's entry in the manifest, and what was left out of its index."""

    shard: Shard
    rejected: list[Rejected]
    dropped: list[int]
    """Samples that each rule dropped."""
    downloads: dict[str, int] = field(default_factory=dict)
    """img2dataset's counts."""


def register_shard(
    folder: Path,
    name: str,
    kind: Kind,
    *,
    base: str = "",
    rules: Sequence[FilterConfig] = (),
) -> Registered:
    """Index a tar where it lies, and write the index into the data set's folder.

    Args:
        folder: The data set.
        name: The tar, relative to `base`.
        kind: What a sample must hold.
        base: Folder or URL of the tars; empty: the data set's folder.
        rules: What samples must satisfy besides.

    Raises:
        FileNotFoundError: there is no such tar.
        ValueError: the parquet beside it, which a rule needs, cannot be read.
    """
    location = join(base or str(folder), name)
    buffer = map_bytes(location)
    index, rejected = index_shard(buffer, REQUIRED[kind])
    dropped = [0] * len(rules)
    if rules:
        rows = read_rows(location, [rule.name for rule in rules])
        index, unreadable = _filter(index, memoryview(buffer), rows, rules, dropped)
        rejected += unreadable
    payload = encode_npy(index)
    shard = Shard(
        name=name,
        samples=len(index),
        size_bytes=len(buffer),
        sha256=hashlib.sha256(buffer).hexdigest(),
        index_sha256=hashlib.sha256(payload).hexdigest(),
    )
    write_atomic(folder / shard.index_name, payload)
    rejected = [replace(item, shard=name) for item in rejected]
    return Registered(shard=shard, rejected=rejected, dropped=dropped)


def register_tars(
    tars: Sequence[Tar], rules: Sequence[FilterConfig], workers: int
) -> Generator[Registered, None, None]:
    """Register tars of images in up to `workers` processes; yield in the order given.

    Raises:
        FileNotFoundError, ValueError: as `register_shard`.
        ChildProcessError: a process died.
    """
    return in_processes(partial(register_tar, rules=rules), tars, workers)


def in_processes(
    work: Callable[[Item], Result], items: Sequence[Item], workers: int
) -> Generator[Result, None, None]:
    """Map over items in up to `workers` processes; yield in the order of the items.

    Raises:
        ValueError, OSError: what `work` raised.
        ChildProcessError: a process died.
    """
    workers = min(workers, len(items), os.cpu_count() or 1)
    if workers < 2:
        yield from map(work, items)
        return
    results = read_ahead.with_processes(work, iter(items), workers=workers, depth=workers)
    with closing(results):
        for _ in items:
            try:
                yield next(results)
            except ChildProcessError as error:
                raise ChildProcessError(
                    f"data.source.workers: one of {workers} processes died, perhaps for lack of "
                    "memory; fewer need less"
                ) from error


def register_tar(tar: Tar, rules: Sequence[FilterConfig]) -> Registered:
    """Register a tar of images, unless its receipt says that this was done.

    Raises:
        FileNotFoundError, ValueError: as `register_shard`.
    """
    options = [tar.location, tar.size_bytes, [asdict(rule) for rule in rules]]
    identity = hashlib.sha256(json.dumps(options).encode()).hexdigest()
    found = _read_receipt(tar, identity)
    if found is not None:
        return found
    made = register_shard(tar.folder, tar.name, Kind.images, base=tar.base, rules=rules)
    made = _count_downloads(tar, made)
    document = json.dumps({"identity": identity, **asdict(made)}, indent=1)
    write_atomic(tar.receipt, document.encode())
    return made


def _read_receipt(tar: Tar, identity: str) -> Registered | None:
    """Read what was found in a tar; None if that is unknown, or true no longer."""
    try:
        document = json.loads(tar.receipt.read_bytes())
        made = Registered(
            shard=Shard(**document["shard"]),
            rejected=[Rejected(**item) for item in document["rejected"]],
            dropped=document["dropped"],
            downloads=document["downloads"],
        )
        index = (tar.folder / made.shard.index_name).read_bytes()
    except (OSError, ValueError, TypeError, KeyError):
        return None
    sound = hashlib.sha256(index).hexdigest() == made.shard.index_sha256
    return made if sound and document["identity"] == identity else None


def _filter(
    index: np.ndarray,
    payloads: memoryview,
    rows: Mapping[str, Mapping[str, Any]],
    rules: Sequence[FilterConfig],
    dropped: list[int],
) -> tuple[np.ndarray, list[Rejected]]:
    """Leave out the samples that a rule drops, counting them, and those that no rule can judge."""
    kept = np.ones(len(index), bool)
    rejected = []
    for number, sample in enumerate(index):
        key = sample["key"].decode()
        fields = SampleFields(rows.get(key, {}), partial(_member, payloads, sample))
        try:
            rule = first_to_drop(rules, fields)
        except BadSampleError as error:
            kept[number] = False
            rejected.append(Rejected(key=key, reason=str(error)))
            continue
        if rule is not None:
            kept[number] = False
            dropped[rule] += 1
    return index[kept], rejected


def _member(payloads: memoryview, sample: np.void, extension: str) -> Buffer | None:
    if extension not in (sample.dtype.names or ()):
        return None
    offset, size, _ = sample[extension].item()
    return payloads[offset : offset + size] if offset else None


def _count_downloads(tar: Tar, made: Registered) -> Registered:
    """Add img2dataset's counts, and hold the tar against them."""
    shard, problems = made.shard, []
    downloads = {}
    try:
        downloads = read_download_counts(tar.location)
    except BadSampleError as error:
        problems.append(f"_stats.json: {error}")
    seen = shard.samples + sum(made.dropped) + sum(bool(item.key) for item in made.rejected)
    if downloads.get("successes", 0) > seen:
        problems.append("fewer samples in the tar than its _stats.json counts")
    rejected = [Rejected(key="", reason=problem, shard=shard.name) for problem in problems]
    return replace(made, rejected=made.rejected + rejected, downloads=downloads)
