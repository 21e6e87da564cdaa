"""One epoch of a stream over latents that lie in a store."""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from data.config import CacheConfig, DataConfig
from data.order.batches import Share
from data.streams.latents import LatentStream

SAMPLES, SHARD_SAMPLES, GLOBAL_BATCH = 120, 10, 8
SHARDS = SAMPLES // SHARD_SAMPLES
STEPS = SAMPLES // GLOBAL_BATCH

Epoch = list[tuple[list[int], list[str], list[str], bytes]]


def config_of(location: str, cache: Path, max_gib: float = 1.0, lanes: int = 2) -> DataConfig:
    return DataConfig(
        dir="",
        latents=location,
        image_size=64,
        lanes=lanes,
        shuffle_block=6,
        cache=CacheConfig(dir=str(cache), max_gib=max_gib),
    )


def stream_of(config: DataConfig, rank: int = 0, world: int = 1) -> LatentStream:
    share = Share(
        seed=5,
        rank=rank,
        world=world,
        global_batch=GLOBAL_BATCH,
        micro_batch=GLOBAL_BATCH // world,
    )
    return LatentStream.open(config, share)


def epoch(
    config: DataConfig, after_step: Callable[[], object] = lambda: None, **place: Any
) -> Epoch:
    """Every sample of an epoch, with its bytes."""
    batches = []
    with closing(stream_of(config, **place).steps(0)) as steps:
        for _ in range(STEPS):
            (batch,) = next(steps)
            tensors = batch.arrays["moments"].numpy().tobytes()
            batches.append((batch.index.tolist(), batch.keys, batch.captions, tensors))
            after_step()
    return batches


def cached(folder: Path) -> list[Path]:
    return [file for file in folder.iterdir() if file.name != "lock"]
