"""`python -m trainer.pack … verify=true`: every byte of the data sets, read again."""

import hashlib
from collections.abc import Iterator
from contextlib import closing
from functools import partial

import numpy as np

from data.codecs import BadSampleError
from data.config import DataConfig
from data.manifest import Manifest, ManifestError, Shard, data_sets
from data.register import REQUIRED, in_processes
from data.storage import join, map_bytes
from data.tar import decode_index, index_shard
from trainer.progress import byte_bar

MAX_SAMPLES_NAMED = 5
"""Of one shard: a tar that was replaced would fill the screen."""


def verify(data: DataConfig) -> None:
    """Hold the tars and indexes of data.train, data.val and data.latents against their manifests.

    Prints a line for each difference, or what was found to be sound.

    Raises:
        ValueError: something differs, or there is no data set.
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
        differences += _verify(option, folder, manifest, data.source.workers)
    if differences:
        raise ValueError(f"verify: {differences} differences in {', '.join(sets)}, listed above")


def _verify(option: str, folder: str, manifest: Manifest, workers: int) -> int:
    """Print what differs in one data set, and count it."""
    found = 0
    compare = partial(differences_of, folder, manifest)
    with (
        closing(in_processes(compare, manifest.shards, workers)) as results,
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


def differences_of(folder: str, manifest: Manifest, shard: Shard) -> list[str]:
    """Say in what a shard and its index differ from the manifest and from each other.

    Args:
        folder: The data set, a path or URL.
        manifest: Of the data set.
        shard: One of its shards.
    """
    try:
        tar = map_bytes(join(manifest.base or folder, shard.name))
        payload = map_bytes(join(folder, shard.index_name))
    except OSError as error:
        return [f"cannot be read: {error}"]
    found = []
    if len(tar) != shard.size_bytes:
        found.append(f"{len(tar)} bytes, not {shard.size_bytes}")
    elif hashlib.sha256(tar).hexdigest() != shard.sha256:
        found.append("other bytes than those of the manifest")
    if hashlib.sha256(payload).hexdigest() != shard.index_sha256:
        found.append("its index is not that of the manifest")
    try:
        index = decode_index(payload)
    except BadSampleError:
        return [*found, "its index cannot be read"]
    if len(index) != shard.samples:
        found.append(f"{len(index)} samples in its index, not {shard.samples}")
    derived, rejected = index_shard(tar, REQUIRED[manifest.kind])
    if index.dtype != derived.dtype or not np.array_equal(index, derived):
        reasons = {item.key: item.reason for item in rejected}
        samples = list(_sample_differences(index, derived, reasons, bool(manifest.filters)))
        found += samples[:MAX_SAMPLES_NAMED]
        if len(samples) > MAX_SAMPLES_NAMED:
            found.append(f"and {len(samples) - MAX_SAMPLES_NAMED} samples more")
    return found


def _sample_differences(
    index: np.ndarray, derived: np.ndarray, reasons: dict[str, str], filtered: bool
) -> Iterator[str]:
    """Compare a stored index with that of the tar as it is now; filters leave out samples."""
    stored, present = _members(index), _members(derived)
    for key, members in stored.items():
        if key not in present:
            yield f"sample {key}: {reasons.get(key, 'not in the tar')}"
        elif members != present[key]:
            extensions = members.keys() | present[key].keys()
            changed = [e for e in extensions if members.get(e) != present[key].get(e)]
            yield f"sample {key}: .{', .'.join(sorted(changed))} not as indexed"
    if not filtered:
        yield from (f"sample {key}: not indexed" for key in present if key not in stored)


def _members(index: np.ndarray) -> dict[str, dict[str, tuple[int, int, int]]]:
    """Key → extension → (offset, size, CRC-32) of the members that a sample has."""
    extensions = [name for name in index.dtype.names or () if name != "key"]
    return {
        sample["key"].decode(): {
            extension: sample[extension].item()
            for extension in extensions
            if sample[extension]["offset"]
        }
        for sample in index
    }
