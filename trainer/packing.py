"""Raw images and captions → WebDataset shards, offset indexes and manifests."""

import hashlib
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tqdm import tqdm

from data import filters
from data.config import DataConfig, SourceKind
from data.manifest import FILE_NAME, Kind, Manifest, ManifestError, Rejected, Shard
from data.metadata import aspect
from data.register import Tar, register_tars
from data.sources import RawSample, hash_share, list_tars_of, open_source
from data.storage import join, size_bytes
from data.writer import ShardSetWriter
from trainer.config import Config
from trainer.dataset_report import report
from trainer.progress import byte_bar
from trainer.verify import verify

STAT_THREADS = 32
"""Sizes asked for at a time: a store answers each in tens of milliseconds."""


def pack(config: Config) -> None:
    """Write the image data sets `data.train` and, if `data.source.val_share` > 0, `data.val`.

    A second run on the same source does nothing; one after a kill goes on. With `verify` or
    `stats`, the data sets are only looked at.

    Raises:
        ValueError: a folder already holds another data set, nothing usable was found, or
            `verify` found a difference.
        FileNotFoundError: `data.source.path` leads nowhere.
    """
    if config.verify:
        verify(config.data)
    if config.stats:
        report(config.data)
    if config.verify or config.stats:
        return
    if config.data.source.kind is SourceKind.webdataset:
        _register_tars(config.data)
    else:
        _write_shards(config.data)


@dataclass(slots=True, kw_only=True)
class _Split:
    """What a data set is made of."""

    shards: list[Shard] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    dropped: Counter[int] = field(default_factory=Counter)
    """Samples that each of data.filters dropped, by its number."""
    downloads: Counter[str] = field(default_factory=Counter)


def _targets(data: DataConfig) -> dict[str, Path]:
    targets = {"data.train": Path(data.train)}
    if data.source.val_share > 0:
        targets["data.val"] = Path(data.val)
    return targets


def _fingerprint(data: DataConfig, raw: str) -> str:
    source = data.source
    options = [
        source.kind.value,
        source.shard_samples,
        source.val_share,
        source.require_captions,
        [asdict(rule) for rule in data.filters],
        raw,
    ]
    return hashlib.sha256(json.dumps(options).encode()).hexdigest()


def _already_packed(data: DataConfig, fingerprint: str) -> bool:
    """Say whether every target is complete; refuse to touch those made from something else."""
    complete = True
    for option, folder in _targets(data).items():
        if not (folder / FILE_NAME).exists():
            complete = False
            continue
        manifest = Manifest.load(folder, option=option)
        if manifest.source != fingerprint:
            raise ManifestError(
                f"{option}: {folder} holds a data set made from another source or other options; "
                "delete the folder, or choose another data.dir"
            )
        complete = complete and all(_is_whole(folder, manifest, item) for item in manifest.shards)
    if complete:
        for option, folder in _targets(data).items():
            _describe(option, folder, Manifest.load(folder, option=option))
        print("Already packed: nothing to do.")
        return True
    for folder in _targets(data).values():
        for leftover in folder.rglob(".*.part"):  # of a run that was killed
            leftover.unlink(missing_ok=True)
    return False


def _is_whole(folder: Path, manifest: Manifest, shard: Shard) -> bool:
    try:
        found = size_bytes(join(manifest.base or str(folder), shard.name))
    except FileNotFoundError:
        return False
    return found == shard.size_bytes and (folder / shard.index_name).exists()


def _write_shards(data: DataConfig) -> None:
    source = open_source(data)
    fingerprint = _fingerprint(data, source.fingerprint())
    if _already_packed(data, fingerprint):
        return
    splits = {option: _Split() for option in _targets(data)}
    size = data.source.shard_samples
    with (
        ShardSetWriter(Path(data.train), Kind.images, size) as train,
        ShardSetWriter(Path(data.val), Kind.images, size) as val,
    ):
        for item in tqdm(source, desc="pack", unit="image", disable=None):
            if isinstance(item, Rejected):
                splits["data.train"].rejected.append(item)
                continue
            in_val = hash_share(item.group) < data.source.val_share
            rule = filters.first_to_drop(data.filters, _fields(item).get)
            if rule is None:
                (val if in_val else train).write(_members(item))
            else:
                splits["data.val" if in_val else "data.train"].dropped[rule] += 1
    splits["data.train"].shards = train.shards
    if "data.val" in splits:
        splits["data.val"].shards = val.shards
    _publish(data, fingerprint, splits, image_size=source.image_size, licence=source.licence)


def _fields(sample: RawSample) -> dict[str, object]:
    """What `data.filters` may ask about a sample."""
    return {
        **sample.metadata,
        "width": sample.width,
        "height": sample.height,
        "aspect": aspect(sample.width, sample.height),
        "caption_length": len(sample.caption),
    }


def _members(sample: RawSample) -> dict[str, bytes]:
    facts = {
        **sample.metadata,
        "width": sample.width,
        "height": sample.height,
        "sha256": hashlib.sha256(sample.image).hexdigest(),
        "source": sample.name,
    }
    return {
        sample.extension: sample.image,
        "txt": sample.caption.encode(),
        "json": json.dumps(facts, ensure_ascii=False).encode(),
    }


def _register_tars(data: DataConfig) -> None:
    """Add indexes and manifests to tars made elsewhere; whole tars go to validation."""
    base, names = list_tars_of(data.source.path)
    try:
        with ThreadPoolExecutor(STAT_THREADS) as pool:
            found = pool.map(lambda name: size_bytes(join(base, name)), names)
            sizes = dict(zip(names, found, strict=True))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"data.source.path: no such tar: {error}") from error
    fingerprint = _fingerprint(data, json.dumps([base, sizes]))
    if _already_packed(data, fingerprint):
        return
    val_count = max(1, round(data.source.val_share * len(names))) if data.source.val_share else 0
    val_names = set(sorted(names, key=hash_share)[:val_count])
    if len(val_names) == len(names):
        raise ValueError(
            f"data.source.val_share: {len(names)} tar at {data.source.path} leaves none to train on"
        )
    targets = _targets(data)
    options = ["data.val" if name in val_names else "data.train" for name in names]
    tars = [
        Tar(folder=targets[option], base=base, name=name, size_bytes=sizes[name])
        for option, name in zip(options, names, strict=True)
    ]
    splits = {option: _Split() for option in targets}
    with (
        closing(register_tars(tars, data.filters, data.source.workers)) as registered,
        byte_bar(sum(sizes.values()), "pack") as bar,
    ):
        for option, made in zip(options, registered, strict=True):
            split = splits[option]
            split.shards.append(made.shard)
            split.rejected += made.rejected
            split.dropped.update(dict(enumerate(made.dropped)))
            split.downloads.update(made.downloads)
            bar.update(made.shard.size_bytes)
    _publish(data, fingerprint, splits, base=base)


def _publish(
    data: DataConfig,
    fingerprint: str,
    splits: dict[str, _Split],
    *,
    image_size: int = 0,
    licence: str = "",
    base: str = "",
) -> None:
    for option, folder in _targets(data).items():
        split = splits[option]
        kept = sum(shard.samples for shard in split.shards)
        dropped = [split.dropped[number] for number in range(len(data.filters))]
        manifest = Manifest(
            kind=Kind.images,
            shards=split.shards,
            image_size=image_size,
            licence=licence,
            rejected=dict(Counter(item.reason for item in split.rejected)),
            filters=filters.count(data.filters, dropped, kept),
            downloads=dict(split.downloads),
            source=fingerprint,
            base="" if base == str(folder.absolute()) else base,
        )
        if option == "data.train" and not manifest.samples:
            left_out = {item.rule: item.dropped for item in manifest.filters} | manifest.rejected
            raise ValueError(f"data.source: nothing usable to train on; left out {left_out}")
        manifest.save(folder, split.rejected)
        _describe(option, folder, manifest)


def _describe(option: str, folder: Path, manifest: Manifest) -> None:
    print(
        f"{option}: {manifest.samples} samples in {len(manifest.shards)} shards, "
        f"{manifest.size_bytes / 2**20:.1f} MiB, at {folder}"
    )
    if manifest.downloads:
        counts = ", ".join(f"{name} {count}" for name, count in manifest.downloads.items())
        print(f"  img2dataset: {counts}")
    for reason, count in sorted(manifest.rejected.items()):
        print(f"  rejected {count}: {reason}")
    for rule in manifest.filters:
        print(f"  filter {rule.rule}: {rule.kept} kept, {rule.dropped} dropped")
    if manifest.licence:
        print(f"  licence: {manifest.licence}")
