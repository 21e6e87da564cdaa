"""Register existing tars as shards of a data set: index, hash and filter them in processes.

Each tar of another program gets a receipt beside its index. The receipt states the tar, the rules
and the result. A tar with a matching receipt is skipped: after a kill, the same command goes on
with the remaining tars.
"""

import hashlib
import json
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from data import read_ahead
from data.config import FilterConfig
from data.shards.account import Fate, LeftOut, Tally
from data.shards.codecs import (
    CAPTION_EXTENSIONS,
    IMAGE_EXTENSIONS,
    MAX_ARRAY_BYTES,
    BadSampleError,
    Buffer,
    encode_npy,
)
from data.shards.filters import first_to_drop, rule_text
from data.shards.index import index_shard
from data.shards.manifest import Kind, Rejected, Shard
from data.shards.metadata import (
    SampleFields,
    parquet_beside,
    read_download_counts,
    read_rows,
)
from data.shards.tar import refuse_compressed
from data.storage.atomic import write_atomic
from data.storage.documents import read_json
from data.storage.files import join_location, open_file
from data.storage.fingerprint import fingerprint
from data.storage.local_file import Content, pieces_of
from data.storage.untrusted import read_file

REQUIRED = {
    Kind.images: (IMAGE_EXTENSIONS, CAPTION_EXTENSIONS),
    Kind.latents: (("moments.npy",), CAPTION_EXTENSIONS),
}
"""Groups of members; a complete sample has at least one member of each group."""
MAX_RECEIPT_BYTES = 2**27
"""Largest receipt that is read; it lists the rejected samples of a tar."""

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tar:
    """A tar of images to register as a shard."""

    folder: Path
    """Folder of the data set."""
    base: str
    """Folder or URL of the tars."""
    name: str
    """Path of the tar, relative to `base`."""
    state: str
    """Fingerprint of the tar, and of the parquet beside it that rules read."""

    @property
    def location(self) -> str:
        """Path or URL of the tar."""
        return join_location(self.base, self.name)

    @property
    def receipt(self) -> Path:
        """Path of the receipt that `register_tar` writes beside the index."""
        return self.folder / f"{self.name}.receipt.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Registered:
    """A shard's entry in the manifest, and the samples left out of its index."""

    shard: Shard
    rejected: list[Rejected]
    dropped: list[int]
    """Number of samples that each rule dropped."""
    downloads: dict[str, int] = field(default_factory=dict[str, int])
    """img2dataset's counts of images tried, fetched and failed."""
    left_out: list[LeftOut] = field(default_factory=list[LeftOut])
    """What of the tar is not in the index, by reason."""


def state_of(tar: str, rules: Sequence[FilterConfig]) -> str:
    """Return a text that changes with what `register_tar` reads: a tar, and its parquet for rules.

    tar: path or URL. Raises: as `fingerprint`.
    """
    parquet = ""
    if rules:
        with suppress(FileNotFoundError):
            parquet = fingerprint(parquet_beside(tar))
    return f"{fingerprint(tar)} {parquet}".strip()


def register_shard(
    folder: Path,
    name: str,
    kind: Kind,
    *,
    base: str = "",
    rules: Sequence[FilterConfig] = (),
) -> Registered:
    """Index a tar in place, and write the index to the data set's folder.

    name: path of the tar, relative to `base`. kind: decides the members of a complete sample.
    base: folder or URL of the tars; empty: the data set's folder. rules: drop samples.
    Raises: FileNotFoundError where the tar is missing; ValueError where the tar is compressed, or
    the parquet beside it, read for the rules, is damaged; OSError where a file cannot be read or
    written.
    """
    location = join_location(base or str(folder), name)
    buffer = open_file(location, scratch=folder)
    refuse_compressed(location, buffer[:8])
    tally = Tally()
    index, rejected = index_shard(buffer, REQUIRED[kind], tally)
    dropped = [0] * len(rules)
    if rules:
        rows = read_rows(location, [rule.name for rule in rules])
        index, unreadable = _filter(index, buffer, rows, rules, dropped, tally)
        rejected += unreadable
    for item in rejected:
        tally.add(Fate.rejected if item.key else Fate.damaged, item.reason, item.key or name)
    payload = encode_npy(index)
    shard = Shard(
        name=name,
        samples=len(index),
        size_bytes=len(buffer),
        sha256=sha256_of(buffer),
        index_sha256=hashlib.sha256(payload).hexdigest(),
    )
    write_atomic(folder / shard.index_name, payload)
    rejected = [replace(item, shard=name) for item in rejected]
    left_out = tally.entries()
    return Registered(shard=shard, rejected=rejected, dropped=dropped, left_out=left_out)


def sha256_of(content: Content) -> str:
    """Return the SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    for piece in pieces_of(content):
        digest.update(piece)
    return digest.hexdigest()


def register_tars(
    tars: Sequence[Tar], rules: Sequence[FilterConfig], workers: int, *, anew: bool = False
) -> Generator[Registered, None, None]:
    """Register tars of images in up to `workers` processes; yield results in the order of the tars.

    anew: read every tar, whatever its receipt says.
    Raises: as `register_shard`; ChildProcessError where a process dies.
    """
    return in_processes(partial(register_tar, rules=rules, anew=anew), tars, workers)


def in_processes(
    work: Callable[[Item], Result], items: Sequence[Item], workers: int
) -> Generator[Result, None, None]:
    """Call `work` on items in up to `workers` processes; yield results in the order of the items.

    Raises: ValueError or OSError where `work` raises one; ChildProcessError where a process dies.
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


def register_tar(tar: Tar, rules: Sequence[FilterConfig], *, anew: bool = False) -> Registered:
    """Register a tar of images, or read the result from a matching receipt unless `anew`.

    Raises: as `register_shard`.
    """
    options = [tar.location, tar.state, [asdict(rule) for rule in rules]]
    identity = hashlib.sha256(json.dumps(options).encode()).hexdigest()
    found = None if anew else _read_receipt(tar, identity)
    if found is not None:
        return found
    made = register_shard(tar.folder, tar.name, Kind.images, base=tar.base, rules=rules)
    made = _count_downloads(tar, made)
    document = json.dumps({"identity": identity, **asdict(made)}, indent=1)
    write_atomic(tar.receipt, document.encode())
    return made


def _read_receipt(tar: Tar, identity: str) -> Registered | None:
    """Read the result from a tar's receipt; None if receipt or index is missing or outdated."""
    try:
        document = read_json(tar.receipt, limit=MAX_RECEIPT_BYTES, below=tar.folder)
        made = Registered(
            shard=Shard(**document["shard"]),
            rejected=[Rejected(**item) for item in document["rejected"]],
            dropped=document["dropped"],
            downloads=document["downloads"],
            left_out=[LeftOut(**entry) for entry in document["left_out"]],
        )
        path = tar.folder / made.shard.index_name
        index = read_file(path, limit=MAX_ARRAY_BYTES, below=tar.folder)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    sound = hashlib.sha256(index).hexdigest() == made.shard.index_sha256
    return made if sound and document["identity"] == identity else None


def _filter(
    index: np.ndarray,
    payloads: Content,
    rows: Mapping[str, Mapping[str, Any]],
    rules: Sequence[FilterConfig],
    dropped: list[int],
    tally: Tally,
) -> tuple[np.ndarray, list[Rejected]]:
    """Remove the samples that a rule drops, and reject those with an unreadable field.

    dropped: counts of each rule, increased here. tally: counts them, too, with examples.
    """
    kept = np.ones(len(index), bool)
    rejected: list[Rejected] = []
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
            tally.add(Fate.filtered, rule_text(rules[rule]), key)
    return index[kept], rejected


def _member(payloads: Content, sample: np.void, extension: str) -> Buffer | None:
    if extension not in (sample.dtype.names or ()):
        return None
    offset, size, _ = sample[extension].item()
    return payloads[offset : offset + size] if offset else None


def _count_downloads(tar: Tar, made: Registered) -> Registered:
    """Add img2dataset's counts, and compare the number of samples with them."""
    shard = made.shard
    problems: list[str] = []
    downloads: dict[str, int] = {}
    try:
        downloads = read_download_counts(tar.location)
    except BadSampleError as error:
        problems.append(f"_stats.json: {error}")
    seen = shard.samples + sum(made.dropped) + sum(bool(item.key) for item in made.rejected)
    if downloads.get("successes", 0) > seen:
        problems.append("fewer samples in the tar than its _stats.json counts")
    rejected = [Rejected(key="", reason=problem, shard=shard.name) for problem in problems]
    tally = Tally()
    tally.merge(made.left_out)
    for problem in problems:
        tally.add(Fate.damaged, problem, shard.name)
    return replace(
        made,
        rejected=made.rejected + rejected,
        downloads=downloads,
        left_out=tally.entries(),
    )
