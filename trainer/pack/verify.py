"""`python -m trainer.pack … verify=true`: compare every byte with the manifests."""

import hashlib
from collections.abc import Iterator
from contextlib import closing
from functools import partial

import numpy as np

from data.config import DataConfig
from data.shards.annotations import NO_ANNOTATIONS, AnnotationRule
from data.shards.captions import PLAIN_CAPTIONS, CaptionRule
from data.shards.codecs import BadSampleError
from data.shards.index import decode_index, index_shard
from data.shards.manifest import Manifest, ManifestError, Shard, data_sets
from data.shards.register import in_processes, required_members, sha256_of
from data.storage.files import join_location, open_file
from data.text import printable
from trainer.runtime.progress import byte_bar

MAX_SAMPLES_NAMED = 5
"""Most samples named of one shard: a replaced tar differs in all of them."""


def verify(data: DataConfig) -> None:
    """Compare tars and indexes of data.train, data.val and data.latents with their manifests.

    Prints a line for each difference, and one for each data set without differences.
    Raises: ValueError if something differs, or if there is no data set.
    """
    sets = data_sets({"data.train": data.train, "data.val": data.val, "data.latents": data.latents})
    differences = 0
    for option, folder in sets.items():
        try:
            manifest = Manifest.load(folder, option=option)
        except ManifestError as error:
            print(error)
            differences += 1
            continue
        differences += _verify(option, folder, manifest, data)
    if differences:
        raise ValueError(f"verify: {differences} differences in {', '.join(sets)}, listed above")


def _verify(option: str, folder: str, manifest: Manifest, data: DataConfig) -> int:
    """Print the differences in one data set, and return their number."""
    found = 0
    shards_at = manifest.shards_at(folder, data.source.path)
    compare = partial(
        differences_of,
        folder,
        manifest,
        shards_at=shards_at,
        captions=CaptionRule.of(data),
        annotations=AnnotationRule(data.maps, data.boxes),
    )
    with (
        closing(in_processes(compare, manifest.shards, data.source.workers)) as results,
        byte_bar(manifest.size_bytes, option) as bar,
    ):
        for shard, differences in zip(manifest.shards, results, strict=True):
            for difference in differences:
                bar.write(f"{option}: {shard.name}: {difference}")
            found += len(differences)
            bar.update(shard.size_bytes)
    if not found:
        print(
            f"{option}: verified: {len(manifest.shards)} shards, {manifest.samples} samples, "
            f"{manifest.size_bytes / 2**30:.3f} GiB"
        )
    return found


def differences_of(
    folder: str,
    manifest: Manifest,
    shard: Shard,
    *,
    shards_at: str = "",
    captions: CaptionRule = PLAIN_CAPTIONS,
    annotations: AnnotationRule = NO_ANNOTATIONS,
) -> list[str]:
    """Compare a shard with its index and both with the manifest; return the differences.

    folder: path or URL of the data set. shard: one of the manifest's shards. shards_at: path or URL
    of the shards; empty: the data set's folder. captions: place of the captions. annotations: those
    that samples need.
    """
    try:
        tar = open_file(join_location(shards_at or folder, shard.name))
        payload = open_file(join_location(folder, shard.index_name))[:]
    except OSError as error:
        return [f"cannot be read: {error}"]
    found: list[str] = []
    if len(tar) != shard.size_bytes:
        found.append(f"{len(tar)} bytes, not {shard.size_bytes}")
    elif sha256_of(tar) != shard.sha256:
        found.append("other bytes than those of the manifest")
    if hashlib.sha256(payload).hexdigest() != shard.index_sha256:
        found.append("its index is not that of the manifest")
    try:
        index = decode_index(payload)
    except BadSampleError:
        return [*found, "its index cannot be read"]
    if len(index) != shard.samples:
        found.append(f"{len(index)} samples in its index, not {shard.samples}")
    derived, rejected = index_shard(tar, required_members(manifest.kind, captions, annotations))
    if index.dtype != derived.dtype or not np.array_equal(index, derived):
        reasons = {item.key: item.reason for item in rejected}
        samples = list(
            _sample_differences(index, derived, reasons, bool(manifest.filters or manifest.base))
        )
        found += samples[:MAX_SAMPLES_NAMED]
        if len(samples) > MAX_SAMPLES_NAMED:
            found.append(f"and {len(samples) - MAX_SAMPLES_NAMED} samples more")
    return found


def _sample_differences(
    index: np.ndarray, derived: np.ndarray, reasons: dict[str, str], filtered: bool
) -> Iterator[str]:
    """Compare the stored index of a tar with a new one.

    reasons: key → reason of the samples that cannot be indexed.
    filtered: whether options may have left samples of the tar out of the stored index.
    """
    stored, present = _members(index), _members(derived)
    for key, members in stored.items():
        if key not in present:
            yield f"sample {printable(key)}: {reasons.get(key, 'not in the tar')}"
        elif members != present[key]:
            extensions = members.keys() | present[key].keys()
            changed = [e for e in extensions if members.get(e) != present[key].get(e)]
            yield f"sample {printable(key)}: .{', .'.join(sorted(changed))} not as indexed"
    if not filtered:
        new = (printable(key) for key in present if key not in stored)
        yield from (f"sample {key}: not indexed" for key in new)


def _members(index: np.ndarray) -> dict[str, dict[str, tuple[int, int, int]]]:
    """Map key → extension → (offset, size, CRC-32) for the members of each sample."""
    extensions = [name for name in index.dtype.names or () if name != "key"]
    return {
        sample["key"].decode(): {
            extension: sample[extension].item()
            for extension in extensions
            if sample[extension]["offset"]
        }
        for sample in index
    }
