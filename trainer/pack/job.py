"""Pack raw images and captions into WebDataset shards with offset indexes and manifests."""

import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NoReturn

import numpy as np
from tqdm import tqdm

from data.config import DataConfig, SourceKind
from data.shards import filters
from data.shards.account import SAMPLES, Fate, Tally, total
from data.shards.annotations import AnnotationRule, Found
from data.shards.captions import CaptionRule
from data.shards.codecs import BadSampleError
from data.shards.edges import count_split
from data.shards.manifest import (
    FILE_NAME,
    REJECTED_NAME,
    Kind,
    Manifest,
    ManifestError,
    Rejected,
    Shard,
    encode_ledger,
)
from data.shards.reader import ShardReader
from data.shards.register import Part, Selection, Tar, register_tars, state_of
from data.shards.stored import StoredSample
from data.shards.writer import ShardSetWriter
from data.sources.samples import Item, RawSample, Source
from data.sources.sources import open_source
from data.sources.tars import list_tars_of
from data.storage.atomic import write_atomic
from data.storage.files import join_location, local_path, size_bytes
from data.storage.lease import NAME as LEASE
from data.storage.lease import take
from data.text import printable
from trainer.config import Config, PackVerify
from trainer.pack.forecast import print_forecast
from trainer.pack.origin import Origin
from trainer.pack.proposal import print_proposal
from trainer.pack.samples import check_annotations, first_to_drop, members_of, with_size_rules
from trainer.pack.sizes import size_lines
from trainer.pack.split import Split
from trainer.pack.stats import measured_sides, print_statistics
from trainer.pack.summary import allows, losses, print_summary, refuse_losses
from trainer.pack.verify import verify
from trainer.runtime.progress import byte_bar

KEPT = "packing has stopped there; the next one replaces the shards that were written"
STAT_THREADS = 32
"""Parallel requests for file sizes: a remote store takes tens of milliseconds for each."""


def pack(config: Config) -> None:
    """Write the image data sets `data.train` and, if `data.source.val_share` > 0, `data.val`.

    A second run on the same source does nothing; a run after a kill completes them.
    With `verify`, `stats`, `pack.dry_run` or `pack.propose` nothing is written but contact sheets.

    Raises:
        ValueError: a folder already holds another data set, the source has no usable sample or
            fewer than `pack.max_rejected` allows, or `verify` found a difference.
        InUseError: another process is packing into one of the folders.
        FileNotFoundError: `data.source.path` does not exist.
    """
    if config.verify:
        verify(config.data)
    if config.stats:
        print_statistics(config.data)
    if config.verify or config.stats:
        return
    config = replace(config, data=with_size_rules(config))
    if config.pack.propose:
        print_proposal(config)
    elif config.pack.dry_run:
        print_forecast(config)
    else:
        _pack(config)


def _pack(config: Config) -> None:
    with ExitStack() as leases:
        for option, folder in _targets(config.data).items():
            leases.enter_context(take(folder / LEASE, f"choose another {option}"))
        if config.data.source.kind is SourceKind.webdataset:
            _register_tars(config)
        else:
            _write_shards(config)


def _targets(data: DataConfig) -> dict[str, Path]:
    targets = {"data.train": Path(data.train)}
    if data.source.val_share > 0:
        targets["data.val"] = Path(data.val)
    return targets


def _already_packed(data: DataConfig, origin: Origin) -> bool:
    """Return whether every data set is complete; delete leftovers of a killed run if not.

    Raises: ManifestError if a folder holds a data set of another source or other options.
    """
    complete = True
    for option, folder in _targets(data).items():
        if not (folder / FILE_NAME).exists():
            complete = False
            continue
        manifest = Manifest.load(folder, option=option)
        if different := origin.differences(manifest.source):
            raise ManifestError(
                f"{option}: {folder} holds a data set made from another source or other options: "
                f"{different}; delete the folder, or choose another data.dir"
            )
        if origin.has_newer_files(manifest.source):
            print(
                f"{option}: tars or tables at data.source.path have changed: these are read again"
            )
            complete = False
        shards_at = manifest.shards_at(str(folder), data.source.path)
        complete = complete and all(_is_whole(folder, shards_at, item) for item in manifest.shards)
    if complete:
        for option, folder in _targets(data).items():
            print_summary(option, folder, Manifest.load(folder, option=option))
        print("Already packed: nothing to do.")
        return True
    for folder in _targets(data).values():
        for leftover in folder.rglob(".*.part"):  # a killed run leaves these
            leftover.unlink(missing_ok=True)
    return False


def _is_whole(folder: Path, shards_at: str, shard: Shard) -> bool:
    try:
        found = size_bytes(join_location(shards_at, shard.name))
    except FileNotFoundError:
        return False
    return found == shard.size_bytes and (folder / shard.index_name).exists()


def _write_shards(config: Config) -> None:
    data = config.data
    source = open_source(data)
    was_packed = (Path(data.train) / FILE_NAME).exists()
    former = source.former_fingerprint() if was_packed else ""
    origin = Origin.of(data, source.fingerprint(), former=former)
    if _already_packed(data, origin):
        if _is_full(config):
            _refuse_other_bytes(data, source)
        return
    splits = {option: Split() for option in _targets(data)}
    annotations = AnnotationRule.of(data, source.labels)
    size = data.source.shard_samples
    with (
        ShardSetWriter(Path(data.train), Kind.images, size) as train,
        ShardSetWriter(Path(data.val), Kind.images, size) as val,
    ):
        lost = 0
        items = tqdm(source, desc="pack", unit="image", disable=None)
        for seen, item in enumerate(items, start=1):
            in_val = isinstance(item, RawSample) and item.draw < data.source.val_share
            split = splits["data.val" if in_val else "data.train"]
            _write_or_leave_out(data, annotations, item, split, val if in_val else train)
            before, lost = lost, sum(len(one.rejected) for one in splits.values())
            if lost > before and not allows(lost, len(source), config.pack.max_rejected):
                _stop_early(config, source, splits, lost, seen)
    splits["data.train"].tally.merge(source.left_alone.entries())
    splits["data.train"].shards = train.shards
    if "data.val" in splits:
        splits["data.val"].shards = val.shards
    about = Manifest(
        kind=Kind.images,
        shards=[],
        image_size=source.image_size,
        licence=source.licence,
        classes=list(source.classes),
    )
    _publish(config, origin, splits, about, annotations)


def _write_or_leave_out(
    data: DataConfig,
    annotations: AnnotationRule,
    item: Item,
    split: Split,
    writer: ShardSetWriter,
) -> None:
    if not isinstance(item, RawSample):
        split.leave_out(item)
        return
    try:
        rule = first_to_drop(data, item)
        check_annotations(annotations, item, split.found)
    except BadSampleError as error:
        split.leave_out(Rejected(key=item.name, reason=str(error)))
        return
    if rule is None:
        split.noted += item.noted
        writer.write(members_of(item))
        return
    split.dropped[rule] += 1
    split.tally.add(Fate.filtered, filters.rule_text(data.filters[rule]), item.name)


def _stop_early(
    config: Config, source: Source, splits: dict[str, Split], lost: int, seen: int
) -> NoReturn:
    """Raise ValueError: already more of the samples are lost than all of them may lose."""
    folders = _targets(config.data)
    tally = Tally()
    for option, folder in folders.items():
        write_atomic(folder / REJECTED_NAME, encode_ledger(splits[option].rejected))
        tally.merge(splits[option].tally.entries())
    tally.merge(source.left_alone.entries())
    samples = f"{lost} of {len(source)} samples (all of them among the first {seen})"
    raise losses(tally, samples, config.pack.max_rejected, lost / seen, folders.values(), KEPT)


def _is_full(config: Config) -> bool:
    return config.pack.verify is PackVerify.full


def _refuse_other_bytes(data: DataConfig, source: Source) -> None:
    """Raise ManifestError if a source gives other samples than those that are packed."""
    packed: dict[str, Iterator[StoredSample]] = {}
    for option, folder in _targets(data).items():
        manifest = Manifest.load(folder, option=option)
        samples = ShardReader(str(folder), manifest).find(np.arange(manifest.samples))
        packed[option] = iter(samples)
    annotations = AnnotationRule.of(data, source.labels)
    for item in tqdm(source, desc="compare", unit="image", disable=None):
        if not isinstance(item, RawSample) or not _is_kept(data, item, annotations):
            continue
        option = "data.val" if item.draw < data.source.val_share else "data.train"
        stored = next(packed[option], None)
        if stored is None or any(
            stored.member(name) != payload for name, payload in members_of(item).items()
        ):
            raise ManifestError(
                f"{option}: {printable(item.name)} at data.source.path has changed since it was "
                "packed; delete the folder, or choose another data.dir"
            )
    print("Compared: every byte is the one that was packed.")


def _is_kept(data: DataConfig, sample: RawSample, annotations: AnnotationRule) -> bool:
    try:
        check_annotations(annotations, sample, Found())
        return first_to_drop(data, sample) is None
    except BadSampleError:
        return False


def _register_tars(config: Config) -> None:
    """Write indexes and manifests for existing tars, whose samples both data sets share."""
    data = config.data
    base, names = list_tars_of(data.source.path)
    try:
        with ThreadPoolExecutor(STAT_THREADS) as pool:
            locations = [join_location(base, name) for name in names]
            sizes = dict(zip(names, pool.map(size_bytes, locations), strict=True))
            states = list(pool.map(partial(state_of, rules=data.filters), locations))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"data.source.path: no such tar: {error}") from error
    origin = Origin.of(
        data,
        json.dumps([base, names]),
        former=json.dumps([base, sizes]),
        files=json.dumps(states),
    )
    if not _is_full(config) and _already_packed(data, origin):
        return
    targets = _targets(data)
    share = data.source.val_share
    parts = [Part(targets["data.train"], share, 1.0)]
    if "data.val" in targets:
        parts.append(Part(targets["data.val"], 0.0, share))
    rule = CaptionRule.of(data)
    annotations = AnnotationRule.of(data)
    selection = Selection(
        parts,
        data.filters,
        rule,
        empty_captions=not rule.required,
        annotations=annotations,
    )
    tars = [
        Tar(base=base, name=name, state=state) for name, state in zip(names, states, strict=True)
    ]
    splits = {option: Split() for option in targets}
    registering = register_tars(tars, selection, data.source.workers, anew=_is_full(config))
    with closing(registering) as registered, byte_bar(sum(sizes.values()), "pack") as bar:
        for made in registered:
            for split, part in zip(splits.values(), made, strict=True):
                split.add(part)
            train, packed = made[0], sum(part.shard.samples for part in made)
            is_damaged = any(entry.fate == Fate.damaged for entry in train.left_out)
            if is_damaged and not packed + total(train.left_out, *SAMPLES):
                splits["data.train"].empty_tars.append(train.shard.name)
            bar.update(train.shard.size_bytes)
    if split := count_split(splits["data.train"].edges):
        splits["data.train"].tally.merge([split])
    about = Manifest(kind=Kind.images, shards=[], base=base)
    _publish(config, origin, splits, about, annotations)


def _publish(
    config: Config,
    origin: Origin,
    splits: dict[str, Split],
    about: Manifest,
    annotations: AnnotationRule,
) -> None:
    """Write the manifests; about: what they all say of the source."""
    data = config.data
    found = Found()
    for split in splits.values():
        found.add(split.found.boxes, split.found.maps)
    labels = annotations.named(found)
    manifests: dict[str, Manifest] = {}
    for option, folder in _targets(data).items():
        split = splits[option]
        kept = sum(shard.samples for shard in split.shards)
        dropped = [split.dropped[number] for number in range(len(data.filters))]
        manifests[option] = replace(
            about,
            shards=split.shards,
            rejected=dict(Counter(item.reason for item in split.rejected)),
            noted=dict(split.noted),
            filters=filters.count(data.filters, dropped, kept),
            left_out=split.tally.entries(),
            downloads=dict(split.downloads),
            map_classes=list(labels.maps),
            box_classes=list(labels.boxes),
            source=origin.text(),
            base="" if about.base == str(folder.absolute()) else about.base,
        )
    _refuse_unusable(config, splits, manifests)
    for option, folder in _targets(data).items():
        manifests[option].save(folder, splits[option].rejected)
        print_summary(option, folder, manifests[option])
    train = manifests["data.train"]
    if local_path(train.shards_at(data.train, data.source.path)) is not None:
        print("\n".join(size_lines(measured_sides(data, train), data.image_size)))


def _refuse_unusable(
    config: Config, splits: dict[str, Split], manifests: dict[str, Manifest]
) -> None:
    """Raise ValueError if there is nothing to train on, or too much is lost; write the ledgers."""
    train, folders = manifests["data.train"], _targets(config.data)
    if not train.samples:
        left_out = {item.rule: item.dropped for item in train.filters} | train.rejected
        raise ValueError(f"data.source: nothing usable to train on; left out {left_out}")
    for option, folder in folders.items():
        write_atomic(folder / REJECTED_NAME, encode_ledger(splits[option].rejected))
    empty_tars = [name for split in splits.values() for name in split.empty_tars]
    by_folder = {folders[option]: manifest for option, manifest in manifests.items()}
    refuse_losses(by_folder, empty_tars, config.pack.max_rejected)
    if config.data.source.kind is SourceKind.webdataset:
        _refuse_older_latents(config.data, train)


def _refuse_older_latents(data: DataConfig, images: Manifest) -> None:
    """Raise ManifestError if data.latents were made from images that have changed since."""
    if not all((Path(folder) / FILE_NAME).exists() for folder in (data.train, data.latents)):
        return
    before = Manifest.load(data.train, option="data.train").hash
    latents = Manifest.load(data.latents, option="data.latents").latents
    if latents is not None and latents.source_hash == before != images.hash:
        raise ManifestError(
            f"data.latents: {data.latents} was made from other images than those that are now at "
            "data.source.path; delete this folder, then pack and precompute again"
        )
