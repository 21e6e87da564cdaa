"""Training data and training code with something wrong in them."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import nn

from data.codecs import decode_npy, encode_npy
from data.manifest import Kind, Manifest
from data.reader import ShardReader
from data.stream import Batch
from data.writer import ShardSetWriter
from trainer.tasks import Loss
from trainer.tasks.diffusion import DiffusionTask

Change = Callable[[np.ndarray], np.ndarray]


def rewrite_latents(
    source: Path, target: Path, changes: Mapping[int, Change], repeats: int = 1
) -> None:
    """Copy latents, `repeats` times over; sample numbers of the copy map to what changes there."""
    target.mkdir(parents=True)
    manifest = Manifest.load(str(source), option="data.latents")
    reader = ShardReader(str(source), manifest)
    with ShardSetWriter(target, Kind.latents, shard_samples=10) as writer:
        for number in range(manifest.samples * repeats):
            (stored,) = reader.find(np.array([number % manifest.samples]))
            members = {
                extension: bytes(stored.payload(extension))
                for extension in (stored.shard.index.dtype.names or ())[1:]
                if stored.has(extension)
            }
            if number in changes:
                moments = changes[number](decode_npy(members["moments.npy"]).copy())
                members["moments.npy"] = encode_npy(moments.astype(np.float16))
            writer.write(members)
    Manifest(
        kind=Kind.latents,
        shards=writer.shards,
        licence=manifest.licence,
        latents=manifest.latents,
    ).save(target)


def before_each_loss(fault: Callable[[int], None]) -> None:
    """From now on the diffusion task of this process calls `fault(step)` before it computes."""
    sound = DiffusionTask.losses

    def faulty(
        self: DiffusionTask,
        name: str,
        model: nn.Module,
        micro_batches: Sequence[Batch],
        step: int,
    ) -> Iterator[Loss]:
        fault(step)
        yield from sound(self, name, model, micro_batches, step)

    DiffusionTask.losses = faulty


def hang_for_ever() -> None:
    """What a stack must show."""
    while True:
        time.sleep(3600)
