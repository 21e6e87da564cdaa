"""Training data and training code with something wrong in them."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import nn

from data.shards.codecs import decode_npy, encode_npy
from data.shards.manifest import Kind, Manifest
from data.shards.reader import ShardReader
from data.shards.writer import ShardSetWriter
from data.streams.stream import Batch
from trainer.train.denoiser import DenoisingTask
from trainer.train.task import Loss, Turn

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
    """From now on the diffusion task of this process calls `fault(step)` before each loss."""
    sound = DenoisingTask.turns

    def faulty(self: DenoisingTask, step: int) -> Sequence[Turn]:
        return [replace(turn, loss=_after(fault, step, turn.loss)) for turn in sound(self, step)]

    DenoisingTask.turns = faulty


def _after(
    fault: Callable[[int], None], step: int, loss: Callable[[nn.Module, Batch], Loss]
) -> Callable[[nn.Module, Batch], Loss]:
    def delayed(model: nn.Module, batch: Batch) -> Loss:
        fault(step)
        return loss(model, batch)

    return delayed


def hang_for_ever() -> None:
    """What a stack must show."""
    while True:
        time.sleep(3600)
