"""Reading a large set takes no more memory than reading a small one."""

import hashlib
from contextlib import closing
from pathlib import Path
from tarfile import BLOCKSIZE, TarInfo

import numpy as np
import psutil
import pytest

from data.config import DataConfig
from data.order.batches import Share
from data.shards.codecs import encode_npy
from data.shards.index import index_shard
from data.shards.manifest import Kind, LatentInfo, Manifest, Shard
from data.storage.files import open_file
from data.streams.latents import LatentStream

SHAPE = (4, 512, 512)
SAMPLE_BYTES = 2 * 2 * 4 * 512 * 512
FEW, MANY = 5, 20
"""Shards."""


def write_sparse_tar(path: Path, samples: int) -> None:
    """Write latents of zeros, 4 MiB each, that take nearly no room on the disk."""
    moments = encode_npy(np.zeros((2, *SHAPE), np.float16))
    header = moments[:-SAMPLE_BYTES]
    with path.open("wb") as tar:
        for number in range(samples):
            for extension, start, size in (("moments.npy", header, len(moments)), ("txt", b"", 0)):
                member = TarInfo(f"{number:04d}.{extension}")
                member.size = size
                tar.write(member.tobuf())
                tar.write(start)
                tar.seek(-(-size // BLOCKSIZE) * BLOCKSIZE - len(start), 1)
        tar.truncate(tar.tell() + 2 * BLOCKSIZE)


def write_sparse_set(folder: Path, shards: int, shard_samples: int) -> None:
    folder.mkdir()
    for number in range(shards):
        write_sparse_tar(folder / f"{number}.tar", shard_samples)
    index, rejected = index_shard(open_file(str(folder / "0.tar")), [["moments.npy"]])
    assert len(index) == shard_samples and not rejected
    payload = encode_npy(index)
    for number in range(shards):
        (folder / f"{number}.tar.index.npy").write_bytes(payload)
    entries = [
        Shard(
            name=f"{number}.tar",
            samples=shard_samples,
            size_bytes=(folder / f"{number}.tar").stat().st_size,
            sha256="",
            index_sha256=hashlib.sha256(payload).hexdigest(),
        )
        for number in range(shards)
    ]
    info = LatentInfo(
        source_hash="", encoder="", transform="", shape=[*SHAPE], mean=[0.0] * 4, std=[1.0] * 4
    )
    Manifest(kind=Kind.latents, shards=entries, latents=info).save(folder)


def growth_bytes(folder: Path, shards: int, shard_samples: int) -> int:
    """How much this process grows at most while it reads an epoch of such a set."""
    write_sparse_set(folder, shards, shard_samples)
    config = DataConfig(
        dir="", latents=str(folder), image_size=4096, lanes=2, shuffle_block=2 * shard_samples
    )
    process, growth, read = psutil.Process(), 0, 0
    before = process.memory_info().rss
    stream = LatentStream.open(config, Share(seed=0, global_batch=2, micro_batch=2))
    with closing(stream.steps(0)) as steps:
        for _ in range(stream.num_samples // 2):
            (batch,) = next(steps)
            read += batch.arrays["moments"].numel()
            growth = max(growth, process.memory_info().rss - before)
    assert 2 * read == shards * shard_samples * SAMPLE_BYTES
    return growth


@pytest.mark.parametrize(
    "shard_samples",
    [
        pytest.param(16, id="1.25 GiB"),
        pytest.param(128, id="10 GiB", marks=pytest.mark.campaign),
    ],
)
def test_four_times_the_data_are_read_in_the_same_memory(
    tmp_path: Path, shard_samples: int
) -> None:
    small = growth_bytes(tmp_path / "small", FEW, shard_samples)
    large = growth_bytes(tmp_path / "large", MANY, shard_samples)
    more = (MANY - FEW) * shard_samples * SAMPLE_BYTES
    assert large - small < 0.1 * more, f"{small / 1e6:.0f} MB, then {large / 1e6:.0f} MB"
