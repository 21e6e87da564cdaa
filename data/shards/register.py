"""Register existing tars as shards of a data set: index, hash and filter them in processes.

Each tar of another program gets a receipt beside its index. The receipt states the tar, the rules
and the result. A tar with a matching receipt is skipped: after a kill, the same command goes on
with the remaining tars.
"""

import hashlib
import json
import os
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from data import read_ahead
from data.config import FilterConfig
from data.shards.account import Fate, LeftOut, Tally
from data.shards.annotations import NO_ANNOTATIONS, AnnotationRule, check_samples
from data.shards.captions import PLAIN_CAPTIONS, CaptionRule
from data.shards.codecs import (
    IMAGE_EXTENSIONS,
    MAX_ARRAY_BYTES,
    BadSampleError,
    encode_npy,
)
from data.shards.filters import first_to_drop, rule_text
from data.shards.index import index_shard, member_of
from data.shards.manifest import Kind, Rejected, Shard
from data.shards.metadata import Rows, SampleFields, parquet_beside, read_download_counts
from data.shards.splits import draws_of
from data.shards.tar import refuse_compressed
from data.storage.atomic import write_atomic
from data.storage.documents import read_json
from data.storage.files import join_location, open_file
from data.storage.fingerprint import fingerprint
from data.storage.local_file import Content, pieces_of
from data.storage.untrusted import read_file

MAX_RECEIPT_BYTES = 2**27
"""Largest receipt that is read; it lists the rejected samples of a tar."""

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Part:
    """A data set that takes a part of the samples."""

    folder: Path
    start: float = 0.0
    stop: float = 1.0
    """It takes the samples whose `splits.draws` lie in [start, stop)."""


@dataclass(frozen=True, slots=True)
class Selection:
    """What decides which samples of a tar are taken, and by which data set."""

    parts: Sequence[Part]
    """Data sets that share the samples; the first has the account of the tar."""
    rules: Sequence[FilterConfig] = ()
    captions: CaptionRule = PLAIN_CAPTIONS
    empty_captions: bool = True
    """Whether a sample whose caption has no byte is taken."""
    annotations: AnnotationRule = NO_ANNOTATIONS

    def identity(self) -> list[Any]:
        """Return what decides the samples, as JSON values."""
        parts = [[part.start, part.stop] for part in self.parts]
        rules = [asdict(rule) for rule in self.rules]
        # an option that came later counts where it is set: earlier receipts lack it
        annotations = [] if self.annotations == NO_ANNOTATIONS else [asdict(self.annotations)]
        return [parts, rules, asdict(self.captions), self.empty_captions, *annotations]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tar:
    """A tar of images to register as a shard."""

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
    edges: list[str] = field(default_factory=list[str])
    """Keys of the tar's first and last sample; empty if it has none."""
    box_classes: list[str] = field(default_factory=list[str])
    """Labels of the boxes in the tar."""
    map_classes: int = 0
    """One more than the largest label in the maps of the tar."""


def state_of(tar: str, rules: Sequence[FilterConfig]) -> str:
    """Return a text that changes with what `register_tar` reads: a tar, and its parquet for rules.

    tar: path or URL. Raises: as `fingerprint`.
    """
    parquet = ""
    if rules:
        with suppress(FileNotFoundError):
            parquet = fingerprint(parquet_beside(tar))
    return f"{fingerprint(tar)} {parquet}".strip()


def required_members(
    kind: Kind,
    captions: CaptionRule = PLAIN_CAPTIONS,
    annotations: AnnotationRule = NO_ANNOTATIONS,
) -> list[Sequence[str]]:
    """Return groups of members; a complete sample has at least one member of each group.

    Readers refuse a sample without its annotations, too. `verify` decodes none: it needs them here.
    """
    if kind is Kind.latents:
        return [("moments.npy",)]
    texts = [captions.members] if captions.required else []
    return [IMAGE_EXTENSIONS, *texts, *((name,) for name in annotations.members)]


def register_shard(folder: Path, name: str, kind: Kind) -> Registered:
    """Index a tar of a data set's folder, and write the index beside it.

    name: path of the tar, relative to the folder. kind: decides the members of a complete sample.
    Raises: FileNotFoundError where the tar is missing; OSError where a file cannot be read or
    written.
    """
    (registered,) = register_parts(name, kind, str(folder), Selection([Part(folder)]))
    return registered


def register_parts(name: str, kind: Kind, base: str, selection: Selection) -> list[Registered]:
    """Index a tar in place, and write an index to the folder of each part of a selection.

    name: path of the tar, relative to `base`. kind: decides the members of a complete sample.
    base: folder or URL of the tars.
    Returns the results by part; the first has what was left out, but for the filtered samples.
    Raises: FileNotFoundError where the tar is missing; ValueError where the tar is compressed, or
    the parquet beside it, read for the rules, is damaged; OSError where a file cannot be read or
    written.
    """
    location = join_location(base, name)
    buffer = open_file(location, scratch=selection.parts[0].folder)
    refuse_compressed(location, buffer[:8])
    tally, edges = Tally(), list[str]()
    required = required_members(kind, selection.captions, selection.annotations)
    index, rejected = index_shard(buffer, required, tally, edges)
    uncaptioned: list[Rejected] = []
    if not selection.empty_captions:
        index, uncaptioned = _without_empty_captions(index, selection.captions)
    index, wrong, classes = check_samples(buffer, index, selection.annotations)
    rows = Rows.beside(location, selection.rules)
    rows.check(index["key"])
    filtering = _Filter(buffer, rows, selection, rejected + uncaptioned + wrong)
    where = draws_of(index)
    digest = sha256_of(buffer)
    found: list[Registered] = []
    for part in selection.parts:
        own = filtering.apply(index[(where >= part.start) & (where < part.stop)])
        payload = encode_npy(own.index)
        shard = Shard(
            name=name,
            samples=len(own.index),
            size_bytes=len(buffer),
            sha256=digest,
            index_sha256=hashlib.sha256(payload).hexdigest(),
        )
        write_atomic(part.folder / shard.index_name, payload)
        found.append(
            Registered(shard=shard, rejected=[], dropped=own.dropped, left_out=own.tally.entries())
        )
    for item in filtering.rejected:
        tally.add(Fate.rejected if item.key else Fate.damaged, item.reason, item.key or name)
    tally.merge(found[0].left_out)
    rejected = [replace(item, shard=name) for item in filtering.rejected]
    found[0] = replace(
        found[0],
        rejected=rejected,
        left_out=tally.entries(),
        edges=edges,
        box_classes=sorted(classes.boxes),
        map_classes=classes.maps,
    )
    return found


def _without_empty_captions(
    index: np.ndarray, rule: CaptionRule
) -> tuple[np.ndarray, list[Rejected]]:
    """Split off samples whose caption has no byte."""
    columns = [name for name in rule.members if name in (index.dtype.names or ())]
    if not columns:
        return index, []
    sizes = np.zeros(len(index), np.int64)
    for name in reversed(columns):  # the first of several is the one that is read
        there = index[name]["offset"] > 0
        sizes[there] = index[name]["size"][there]
    keys = [key.decode() for key in index["key"][sizes == 0].tolist()]
    return index[sizes > 0], [Rejected(key=key, reason="empty caption") for key in keys]


def sha256_of(content: Content) -> str:
    """Return the SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    for piece in pieces_of(content):
        digest.update(piece)
    return digest.hexdigest()


def register_tars(
    tars: Sequence[Tar], selection: Selection, workers: int, *, anew: bool = False
) -> Generator[list[Registered], None, None]:
    """Register tars of images in up to `workers` processes; yield results in the order of the tars.

    A result has an entry for each part of the selection. anew: read every tar, whatever its receipt
    says.
    Raises: as `register_parts`; ChildProcessError where a process dies.
    """
    work = partial(register_tar, selection=selection, anew=anew)
    return in_processes(work, tars, workers)


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


def register_tar(tar: Tar, selection: Selection, *, anew: bool = False) -> list[Registered]:
    """Register a tar of images, or read the results from a matching receipt unless `anew`.

    Raises: as `register_parts`.
    """
    options = [tar.location, tar.state, *selection.identity()]
    identity = hashlib.sha256(json.dumps(options).encode()).hexdigest()
    found = None if anew else _read_receipt(tar, selection, identity)
    if found is not None:
        return found
    made = register_parts(tar.name, Kind.images, tar.base, selection)
    made[0] = _count_downloads(tar, made)
    document = {"identity": identity, "parts": [asdict(one) for one in made]}
    write_atomic(_receipt(tar, selection), json.dumps(document, indent=1).encode())
    return made


def _receipt(tar: Tar, selection: Selection) -> Path:
    return selection.parts[0].folder / f"{tar.name}.receipt.json"


def _read_receipt(tar: Tar, selection: Selection, identity: str) -> list[Registered] | None:
    """Read the results from a tar's receipt; None if it or an index is missing or outdated."""
    receipt, made = _receipt(tar, selection), list[Registered]()
    try:
        below = selection.parts[0].folder
        document = read_json(receipt, limit=MAX_RECEIPT_BYTES, below=below)
        if document["identity"] != identity:
            return None
        for part, entry in zip(selection.parts, document["parts"], strict=True):
            one = Registered(
                shard=Shard(**entry["shard"]),
                rejected=[Rejected(**item) for item in entry["rejected"]],
                dropped=entry["dropped"],
                downloads=entry["downloads"],
                left_out=[LeftOut(**item) for item in entry["left_out"]],
                edges=entry["edges"],
                box_classes=entry["box_classes"],
                map_classes=entry["map_classes"],
            )
            path = part.folder / one.shard.index_name
            index = read_file(path, limit=MAX_ARRAY_BYTES, below=part.folder)
            if hashlib.sha256(index).hexdigest() != one.shard.index_sha256:
                return None
            made.append(one)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return made


@dataclass(frozen=True, slots=True)
class _Filtered:
    """The samples of a part that the rules keep, and counts of the others."""

    index: np.ndarray
    dropped: list[int]
    tally: Tally


@dataclass(slots=True)
class _Filter:
    """The rules of a selection, with what is needed to apply them to the samples of a tar."""

    payloads: Content
    rows: Rows
    selection: Selection
    rejected: list[Rejected]
    """Grows by the samples whose fields cannot be read or compared."""

    def apply(self, index: np.ndarray) -> _Filtered:
        """Remove the samples that a rule drops, and reject those with an unreadable field."""
        rules = self.selection.rules
        dropped, tally = [0] * len(rules), Tally()
        if not rules:
            return _Filtered(index, dropped, tally)
        kept = np.ones(len(index), bool)
        for number, sample in enumerate(index):
            key = sample["key"].decode()
            member = partial(member_of, self.payloads, sample)
            fields = SampleFields(self.rows.of(key), member, self.selection.captions)
            try:
                rule = first_to_drop(rules, fields)
            except BadSampleError as error:
                kept[number] = False
                self.rejected.append(Rejected(key=key, reason=str(error)))
                continue
            if rule is not None:
                kept[number] = False
                dropped[rule] += 1
                tally.add(Fate.filtered, rule_text(rules[rule]), key)
        return _Filtered(index[kept], dropped, tally)


def _count_downloads(tar: Tar, parts: Sequence[Registered]) -> Registered:
    """Add img2dataset's counts to the first part, and compare the number of samples with them."""
    made = parts[0]
    problems: list[str] = []
    downloads: dict[str, int] = {}
    try:
        downloads = read_download_counts(tar.location)
    except BadSampleError as error:
        problems.append(f"_stats.json: {error}")
    seen = sum(part.shard.samples + sum(part.dropped) for part in parts)
    seen += sum(bool(item.key) for item in made.rejected)
    if downloads.get("successes", 0) > seen:
        problems.append("fewer samples in the tar than its _stats.json counts")
    rejected = [Rejected(key="", reason=problem, shard=made.shard.name) for problem in problems]
    tally = Tally()
    tally.merge(made.left_out)
    for problem in problems:
        tally.add(Fate.damaged, problem, made.shard.name)
    return replace(
        made,
        rejected=made.rejected + rejected,
        downloads=downloads,
        left_out=tally.entries(),
    )
