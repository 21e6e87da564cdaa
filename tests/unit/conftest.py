"""Small data sets, made by our own writer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.config import DataConfig
from data.shards.codecs import encode_npy
from data.shards.manifest import Kind, LatentInfo, Manifest
from data.shards.writer import ShardSetWriter
from tests.support.data_sets import Members, data_config, moments, no_more, png


@pytest.fixture
def image_set(tmp_path: Path) -> Callable[..., DataConfig]:
    """A factory of image data sets: sample i is png(i), captioned `caption i`; `more`: members."""

    def make(
        samples: int = 20, shard_samples: int = 7, more: Members = no_more, **options: Any
    ) -> DataConfig:
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
        samples: int = 20,
        flip: bool = False,
        text: bool = False,
        more: Members = no_more,
        **options: Any,
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
