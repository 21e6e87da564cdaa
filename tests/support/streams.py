"""Streams over small data sets, and whole steps of them."""

from itertools import islice

import numpy as np
import torch

from data.config import DataConfig
from data.order.batches import Share
from data.streams.images import ImageStream
from data.streams.latents import LatentStream
from data.streams.stream import NOTHING_DRAWN, Batch, Randomness, Stream

GLOBAL_BATCH = 8


def images(config: DataConfig, randomness: Randomness = NOTHING_DRAWN, **share: int) -> ImageStream:
    """The images of data.train; share: of Share, where it is not the default of these tests."""
    return ImageStream.open(config, "train", share_of(**share), randomness)


def latents(
    config: DataConfig, randomness: Randomness = NOTHING_DRAWN, **share: int
) -> LatentStream:
    """The latents; share: of Share, where it is not the default of these tests."""
    return LatentStream.open(config, share_of(**share), randomness)


def share_of(*, rank: int = 0, world: int = 1, micro_batch: int = 2) -> Share:
    return Share(seed=3, rank=rank, world=world, global_batch=GLOBAL_BATCH, micro_batch=micro_batch)


def take(stream: Stream, steps: int, start: int = 0) -> list[Batch]:
    """Whole steps, each as one batch."""
    iterator = stream.steps(start)
    batches = [joined(step) for step in islice(iterator, steps)]
    iterator.close()
    return batches


def joined(parts: list[Batch]) -> Batch:
    return Batch(
        epoch=np.concatenate([part.epoch for part in parts]),
        index=np.concatenate([part.index for part in parts]),
        keys=[key for part in parts for key in part.keys],
        captions=[caption for part in parts for caption in part.captions],
        arrays={name: torch.cat([part.arrays[name] for part in parts]) for name in parts[0].arrays},
        boxes=[boxes for part in parts for boxes in part.boxes],
    )
