"""Small data sets, made by our own writer."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.config import CacheConfig, DataConfig
from data.shards.codecs import encode_png

SIZE = 8

Members = Callable[[int], dict[str, bytes]]
"""More members of a sample, by its number."""

DataSet = Callable[..., DataConfig]
"""Writes a data set of the given sizes, and returns the options that open it."""


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


def data_config(root: Path, **options: Any) -> DataConfig:
    defaults: dict[str, Any] = {
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
