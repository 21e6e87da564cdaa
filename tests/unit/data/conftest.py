"""Small data sets, made by our own writer."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.codecs import encode_npy, encode_png
from data.config import CacheConfig, DataConfig
from data.manifest import Kind, LatentInfo, Manifest
from data.writer import ShardSetWriter

SIZE = 8


def png(number: int, size: int = SIZE) -> bytes:
    """An image of noise that no other number gives."""
    pixels = np.random.default_rng(number).integers(0, 256, (size, size, 3), np.uint8)
    return encode_png(Image.fromarray(pixels))


def pixels_of(payload: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(payload)))


def moments(number: int) -> np.ndarray:
    return np.random.default_rng(number).standard_normal((2, 4, 2, 2)).astype(np.float16)


def no_more(number: int) -> dict[str, bytes]:
    return {}


@pytest.fixture
def image_set(tmp_path: Path) -> Callable[..., DataConfig]:
    """A factory of image data sets: sample i is png(i), captioned `caption i`; `more`: members."""

    def make(samples: int = 20, shard_samples: int = 7, more=no_more, **options) -> DataConfig:
        folder = tmp_path / "train"
        with ShardSetWriter(folder, Kind.images, shard_samples) as writer:
            for number in range(samples):
                members = {"png": png(number), "txt": f"caption {number}".encode()}
                writer.write(members | more(number))
        Manifest(kind=Kind.images, shards=writer.shards).save(folder)
        return data_config(tmp_path, **options)

    return make


@pytest.fixture
def latent_set(tmp_path: Path) -> Callable[..., DataConfig]:
    """A factory of latent data sets: sample i is moments(i), its mirror image moments(-i)."""

    def make(
        samples: int = 20, flip: bool = False, text: bool = False, more=no_more, **options
    ) -> DataConfig:
        folder = tmp_path / "latents"
        with ShardSetWriter(folder, Kind.latents, 7) as writer:
            for number in range(samples):
                members = {
                    "moments.npy": encode_npy(moments(number)),
                    "txt": f"caption {number}".encode(),
                }
                if flip:
                    members["flip.moments.npy"] = encode_npy(moments(1000 + number))
                if text:
                    members["text.npy"] = encode_npy(np.full((3, 5), number, np.float16))
                writer.write(members | more(number))
        info = LatentInfo(
            source_hash="s",
            encoder="e",
            transform="t",
            shape=[4, 2, 2],
            mean=[0.0] * 4,
            std=[1.0] * 4,
            flip=flip,
            text_encoder="x" if text else "",
        )
        Manifest(kind=Kind.latents, shards=writer.shards, latents=info).save(folder)
        return data_config(tmp_path, **options)

    return make


def data_config(root: Path, **options) -> DataConfig:
    defaults = {
        "dir": str(root),
        "train": str(root / "train"),
        "val": str(root / "val"),
        "latents": str(root / "latents"),
        "image_size": SIZE,
        "lanes": 2,
        "shuffle_block": 5,
        "cache": CacheConfig(dir=str(root / "cache")),
    }
    return DataConfig(**(defaults | options))
