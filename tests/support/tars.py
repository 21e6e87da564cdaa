"""Tars as other programs write them, and what an index finds in them."""

import io
import tarfile
from typing import Any

import numpy as np

from data.shards.index import index_shard

REQUIRED = (("png", "jpg"), ("txt",))


def tar_of(
    members: list[tuple[str, bytes]], tar_format: int = tarfile.USTAR_FORMAT, **facts: Any
) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for name, payload in members:
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            for fact, value in facts.items():
                setattr(info, fact, value)
            tar.addfile(info, io.BytesIO(payload))
    return buffer.getvalue()


def keys(index: np.ndarray) -> list[str]:
    return [key.decode() for key in index["key"]]


def reasons(shard: bytes) -> dict[str, str]:
    return {item.key: item.reason for item in index_shard(shard, REQUIRED)[1]}


def record(key: str, value: str) -> bytes:
    length = len(f" {key}={value}\n".encode())
    total = next(n for n in range(length, length + 9) if n == length + len(str(n)))
    return f"{total} {key}={value}\n".encode()
