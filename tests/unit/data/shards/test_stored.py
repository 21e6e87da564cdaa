"""Texts that are read together with the arrays before them, and shards that change meanwhile."""

import io
import os
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.config import DataConfig
from data.order.batches import Share
from data.shards.codecs import BadSampleError, decode_npy, encode_npy
from data.shards.manifest import Kind, Manifest
from data.shards.reader import ShardReader
from data.shards.register import register_shard
from data.shards.stored import ArrayLayout, StoredBatch
from data.streams.latents import LatentStream
from tests.support.data_sets import DataSet

LAYOUT = ArrayLayout.of(np.float16, (2, 30))


def opened(folder: Path, samples: Sequence[dict[str, bytes]]) -> StoredBatch:
    """Pack samples, members in the given order, and find all of them."""
    with tarfile.open(folder / "0.tar", "w") as tar:
        for number, members in enumerate(samples):
            for extension, payload in members.items():
                info = tarfile.TarInfo(f"{number}.{extension}")
                info.size = len(payload)
                tar.addfile(info, io.BytesIO(payload))
    shard = register_shard(folder, "0.tar", Kind.latents).shard
    reader = ShardReader(str(folder), Manifest(kind=Kind.latents, shards=[shard]))
    return reader.find(np.arange(len(samples)))


def copied(batch: StoredBatch) -> tuple[np.ndarray, list[bool], list[str], list[bool]]:
    """Read arrays and texts: the values and texts, and which of them are sound."""
    arrays, texts = np.empty((len(batch), *LAYOUT.shape), np.float16), batch.texts("txt")
    whole = batch.copy(batch.members("moments.npy"), LAYOUT, arrays, texts)
    captions, readable = texts.decode()
    return arrays, whole.tolist(), captions, readable.tolist()


@settings(deadline=None, max_examples=100)
@given(
    orders=st.lists(st.permutations(["moments.npy", "txt", "json"]), min_size=1, max_size=5),
    text_bytes=st.integers(0, 1500),
    bound_bytes=st.integers(-2, 2),
    most_bytes=st.sampled_from([1, 100, 1000, 10_000]),
    damage=st.lists(st.sampled_from(["moments.npy", "txt", "json"]), max_size=2),
    at=st.integers(0, 10_000),
)
def test_what_is_read_together_is_what_is_read_one_by_one(
    orders: list[list[str]],
    text_bytes: int,
    bound_bytes: int,
    most_bytes: int,
    damage: list[str],
    at: int,
) -> None:
    """A text right behind its array ends before, at or behind the bound; reads may be short.

    bound_bytes: how much farther than that text the bound is. most_bytes: of one read.
    """
    payloads = [
        {
            "moments.npy": encode_npy(np.full(LAYOUT.shape, number, np.float16)),
            "txt": bytes([ord("a") + number]) * text_bytes,
            "json": b"{}",
        }
        for number in range(len(orders))
    ]
    gap_bytes = 512 + -LAYOUT.file_bytes % 512
    preadv = os.preadv

    def read_few(handle: int, buffers: Sequence[bytearray | memoryview], offset: int) -> int:
        return preadv(handle, [memoryview(buffers[0])[:most_bytes]], offset)

    with tempfile.TemporaryDirectory() as root, pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.shards.stored.NEAR_BYTES", gap_bytes + text_bytes + bound_bytes)
        samples = [
            {extension: members[extension] for extension in order}
            for members, order in zip(payloads, orders, strict=True)
        ]
        batch = opened(Path(root), samples)
        with (Path(root) / "0.tar").open("r+b") as tar:
            for row, extension in enumerate(damage[: len(orders)]):
                offset, size, _ = batch.members(extension)[row].item()
                if size:
                    tar.seek(offset + at % size)
                    tar.write(b"\xff")
        patch.setattr(os, "preadv", read_few)
        arrays, whole, captions, readable = copied(batch)
        for row, sample in enumerate(batch):
            assert whole[row] == is_sound(sample.payload, "moments.npy")
            assert readable[row] == is_sound(sample.payload, "txt")
            if whole[row]:
                np.testing.assert_array_equal(
                    arrays[row], decode_npy(sample.payload("moments.npy"))
                )
            assert captions[row] == (sample.payload("txt").decode() if readable[row] else "")


def is_sound(payload: Callable[[str], bytes], extension: str) -> bool:
    try:
        payload(extension)
    except BadSampleError:
        return False
    return True


def test_a_text_behind_an_array_costs_no_system_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = encode_npy(np.zeros(LAYOUT.shape, np.float16))
    samples = [{"moments.npy": array, "txt": b"one"}, {"moments.npy": array, "txt": b"two"}]
    batch, preadv = opened(tmp_path, samples), os.preadv
    reads: list[int] = []

    def counted(handle: int, buffers: Sequence[bytearray | memoryview], offset: int) -> int:
        reads.append(offset)
        return preadv(handle, buffers, offset)

    def not_called(*_: int) -> bytes:
        raise AssertionError("a text was read by itself")

    monkeypatch.setattr(os, "preadv", counted)
    monkeypatch.setattr(os, "pread", not_called)
    assert copied(batch)[1:] == ([True, True], ["one", "two"], [True, True])
    assert len(reads) == 2


def first_tar(config: DataConfig) -> Path:
    return min(Path(config.latents).glob("*.tar"))


def opened_stream(config: DataConfig) -> LatentStream:
    return LatentStream.open(config, Share(seed=0, global_batch=4, micro_batch=4))


def test_a_text_that_is_cut_off_with_the_file_is_an_error_that_names_it(
    latent_set: DataSet,
) -> None:
    stream = opened_stream(config := latent_set())
    (sample,) = stream.reader.find(np.array([0]))
    stream.read(np.arange(4))
    offset, size, _ = sample.shard.index["txt"][0].item()
    os.truncate(first_tar(config), offset + size - 1)
    with pytest.raises(OSError, match=rf"{first_tar(config).name} was cut off while it was read"):
        stream.read(np.arange(1))


def test_samples_of_a_shard_that_is_overwritten_are_bad_ones(latent_set: DataSet) -> None:
    stream = opened_stream(config := latent_set(max_rejected_share=1.0))
    stream.read(np.arange(4))
    size_bytes = first_tar(config).stat().st_size
    with first_tar(config).open("r+b") as tar:
        tar.write(bytes(size_bytes))
    with pytest.raises(ValueError, match=r"data\.latents: none of the 4 samples"):
        stream.read(np.arange(4))
    assert {item.reason for item in stream.quarantine.rejected} == {
        "the checksum of .txt does not match"
    }


def test_a_shard_that_another_file_replaces_is_read_on(latent_set: DataSet) -> None:
    """The other file has the name, the open one stays as it was."""
    stream = opened_stream(config := latent_set())
    before = stream.read(np.arange(4))
    other = Path(config.latents) / "other"
    other.write_bytes(b"")
    other.replace(first_tar(config))
    after = stream.read(np.arange(4))
    assert torch.equal(before.arrays["moments"], after.arrays["moments"])
    assert before.captions == after.captions
