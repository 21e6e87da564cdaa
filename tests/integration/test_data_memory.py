"""Reading a set far larger than the memory that it may take."""

import hashlib
from contextlib import closing
from pathlib import Path
from tarfile import BLOCKSIZE, TarInfo

import numpy as np
import psutil
import pytest

from data.codecs import encode_npy
from data.config import DataConfig
from data.latent_stream import LatentStream
from data.manifest import Kind, LatentInfo, Manifest, Shard
from data.storage import map_bytes
from data.tar import index_shard

SHAPE = (4, 512, 512)
SHARDS = 20


def write_sparse_tar(path: Path, samples: int) -> None:
    """Write latents of zeros, 4 MiB each, that take nearly no room on the disk."""
    moments = encode_npy(np.zeros((2, *SHAPE), np.float16))
    header = moments[: -2 * 2 * int(np.prod(SHAPE))]
    with path.open("wb") as tar:
        for number in range(samples):
            for extension, start, size in (("moments.npy", header, len(moments)), ("txt", b"", 0)):
                member = TarInfo(f"{number:04d}.{extension}")
                member.size = size
                tar.write(member.tobuf())
                tar.write(start)
                tar.seek(-(-size // BLOCKSIZE) * BLOCKSIZE - len(start), 1)
        tar.truncate(tar.tell() + 2 * BLOCKSIZE)


def write_sparse_set(folder: Path, shard_samples: int) -> None:
    folder.mkdir()
    for number in range(SHARDS):
        write_sparse_tar(folder / f"{number}.tar", shard_samples)
    index, rejected = index_shard(map_bytes(str(folder / "0.tar")), [["moments.npy"]])
    assert len(index) == shard_samples and not rejected
    payload = encode_npy(index)
    for number in range(SHARDS):
        (folder / f"{number}.tar.index.npy").write_bytes(payload)
    shards = [
        Shard(
            name=f"{number}.tar",
            samples=shard_samples,
            size_bytes=(folder / f"{number}.tar").stat().st_size,
            sha256="",
            index_sha256=hashlib.sha256(payload).hexdigest(),
        )
        for number in range(SHARDS)
    ]
    info = LatentInfo(
        source_hash="", encoder="", transform="", shape=[*SHAPE], mean=[0.0] * 4, std=[1.0] * 4
    )
    Manifest(kind=Kind.latents, shards=shards, latents=info).save(folder)


@pytest.mark.parametrize(
    "shard_samples",
    [
        pytest.param(16, id="1.25 GiB"),
        pytest.param(128, id="10 GiB", marks=pytest.mark.campaign),
    ],
)
def test_a_large_set_is_read_in_little_memory(tmp_path, shard_samples):
    folder = tmp_path / "latents"
    write_sparse_set(folder, shard_samples)
    config = DataConfig(
        dir="", latents=str(folder), image_size=4096, lanes=2, shuffle_block=2 * shard_samples
    )
    stream = LatentStream(
        str(folder), config, seed=0, global_batch=2, micro_batch=2, rank=0, world=1
    )
    process, growth = psutil.Process(), []
    before = process.memory_info().rss
    read = 0
    with closing(stream.steps(0)) as steps:
        for _ in range(stream.num_samples // 2):
            (batch,) = next(steps)
            read += 2 * batch.arrays["moments"].numel()
            growth.append(process.memory_info().rss - before)
    assert read == SHARDS * shard_samples * 4 * 2**20
    assert max(growth) < 300e6, f"{max(growth) / 1e6:.0f} MB"
