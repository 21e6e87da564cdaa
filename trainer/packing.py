"""Raw images and captions → WebDataset shards, offset indexes and manifests."""

import hashlib
import json
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from data.config import DataConfig, SourceKind
from data.manifest import FILE_NAME, Kind, Manifest, ManifestError, Rejected, Shard
from data.sources import RawSample, hash_share, list_tars_of, open_source
from data.storage import join, size_bytes
from data.writer import ShardSetWriter, register_shard
from trainer.config import Config


def pack(config: Config) -> None:
    """Write the image data sets `data.train` and, if `data.source.val_share` > 0, `data.val`.

    A second run on the same source does nothing.

    Raises:
        ValueError: a folder already holds another data set, or nothing usable was found.
        FileNotFoundError: `data.source.path` leads nowhere.
    """
    if config.data.source.kind is SourceKind.webdataset:
        _register_tars(config.data)
    else:
        _write_shards(config.data)


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
    return complete


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
    size = data.source.shard_samples
    rejected = []
    with (
        ShardSetWriter(Path(data.train), Kind.images, size) as train,
        ShardSetWriter(Path(data.val), Kind.images, size) as val,
    ):
        for item in tqdm(source, desc="pack", unit="image", disable=None):
            if isinstance(item, Rejected):
                rejected.append(item)
            else:
                split = val if hash_share(item.group) < data.source.val_share else train
                split.write(_members(item))
    shards = {"data.train": train.shards, "data.val": val.shards}
    _publish(
        data,
        fingerprint,
        shards,
        {"data.train": rejected},
        image_size=source.image_size,
        licence=source.licence,
    )


def _members(sample: RawSample) -> dict[str, bytes]:
    facts = {
        "width": sample.width,
        "height": sample.height,
        "sha256": hashlib.sha256(sample.image).hexdigest(),
        "source": sample.name,
        **sample.metadata,
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
        sizes = {name: size_bytes(join(base, name)) for name in names}
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
    shards: dict[str, list[Shard]] = {option: [] for option in targets}
    rejected: dict[str, list[Rejected]] = {option: [] for option in targets}
    for name in tqdm(names, desc="index", unit="shard", disable=None):
        option = "data.val" if name in val_names else "data.train"
        shard, refused = register_shard(targets[option], name, Kind.images, base=base)
        shards[option].append(shard)
        rejected[option].extend(refused)
    _publish(data, fingerprint, shards, rejected, base=base)


def _publish(
    data: DataConfig,
    fingerprint: str,
    shards: dict[str, list[Shard]],
    rejected: dict[str, list[Rejected]],
    *,
    image_size: int = 0,
    licence: str = "",
    base: str = "",
) -> None:
    for option, folder in _targets(data).items():
        refused = rejected.get(option, [])
        manifest = Manifest(
            kind=Kind.images,
            shards=shards[option],
            image_size=image_size,
            licence=licence,
            rejected=dict(Counter(item.reason for item in refused)),
            source=fingerprint,
            base="" if base == str(folder.absolute()) else base,
        )
        if option == "data.train" and not manifest.samples:
            raise ValueError(
                f"data.source: nothing usable to train on; rejected {manifest.rejected}"
            )
        manifest.save(folder, refused)
        _describe(option, folder, manifest)


def _describe(option: str, folder: Path, manifest: Manifest) -> None:
    print(
        f"{option}: {manifest.samples} samples in {len(manifest.shards)} shards, "
        f"{manifest.size_bytes / 2**20:.1f} MiB, at {folder}"
    )
    for reason, count in sorted(manifest.rejected.items()):
        print(f"  rejected {count}: {reason}")
    if manifest.licence:
        print(f"  licence: {manifest.licence}")
