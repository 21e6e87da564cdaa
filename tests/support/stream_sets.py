"""Expected samples of small sets, and damage to them."""

from pathlib import Path

import fsspec
import numpy as np
import torch

from data.config import DataConfig
from data.shards.manifest import Kind, Manifest
from data.shards.reader import ShardReader
from data.shards.writer import ShardSetWriter
from data.streams.stream import Batch
from tests.support.data_sets import pixels_of, png


def assert_same(batch: Batch, other: Batch) -> None:
    np.testing.assert_array_equal(batch.epoch, other.epoch)
    np.testing.assert_array_equal(batch.index, other.index)
    assert (batch.keys, batch.captions) == (other.keys, other.captions)
    assert batch.boxes == other.boxes
    assert batch.arrays.keys() == other.arrays.keys()
    for name, array in batch.arrays.items():
        assert torch.equal(array, other.arrays[name])


def expected_image(number: int) -> torch.Tensor:
    pixels = torch.from_numpy(pixels_of(png(number)).copy()).permute(2, 0, 1)
    return pixels.float() / 127.5 - 1


def damage(folder: str, number: int, extension: str) -> None:
    """Change one byte of a sample's member on disk."""
    manifest = Manifest.load(folder, option="data.train")
    (stored,) = ShardReader(folder, manifest).find(np.array([number]))
    path = Path(folder) / stored.shard.name
    payload = bytearray(path.read_bytes())
    offset = int(stored.shard.index[extension]["offset"][stored.row])
    payload[offset + 3] ^= 1
    path.write_bytes(payload)


def by_sample(epoch: np.ndarray, index: np.ndarray) -> np.ndarray:
    return (epoch + index) % 2 == 1


def move_to_store(config: DataConfig, base: str, share: float = 10.0) -> float:
    """Move the images to fsspec's memory, with a cache for a share of them; return its bound."""
    store, root = fsspec.core.url_to_fs(base)
    sizes = []
    for file in Path(config.train).iterdir():
        store.pipe_file(f"{root}/{file.name}", file.read_bytes())
        sizes.append(file.stat().st_size)
    config.train, config.cache.max_gib = base, share * sum(sizes) / 2**30
    return share * sum(sizes)


def latents_info(config: DataConfig, writer: ShardSetWriter) -> Manifest:
    from data.shards.manifest import LatentInfo

    info = LatentInfo(
        source_hash="", encoder="", transform="", shape=[4, 2, 2], mean=[0.0] * 4, std=[1.0] * 4
    )
    return Manifest(kind=Kind.latents, shards=writer.shards, latents=info)
