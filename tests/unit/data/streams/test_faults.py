"""Damaged samples, missing and cut shards, sets of another kind."""

import multiprocessing
import os
import shutil
import signal
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from data.config import CaptionForm, DataConfig
from data.shards.codecs import encode_npy
from data.shards.manifest import Kind, ManifestError
from data.shards.writer import ShardSetWriter
from data.streams.stream import Randomness
from tests.support.data_sets import DataSet, moments
from tests.support.stream_sets import assert_same, by_sample, damage, expected_image, latents_info
from tests.support.streams import images, joined, latents, take


@pytest.mark.parametrize("workers", [1, 3])
def test_a_killed_worker_is_an_error_after_which_nothing_is_missing_or_twice(
    image_set: DataSet, workers: int
) -> None:
    config = image_set(prefetch=1)
    expected = take(images(config, micro_batch=8), 12)
    config.workers = workers
    iterator = images(config, micro_batch=8).steps(0)
    found = list(islice(iterator, 2))
    pid = multiprocessing.active_children()[-1].pid or 0
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # raises nothing, nor does any other code
    with pytest.raises(ChildProcessError, match=rf"^data\.workers: one of {workers} decoding"):
        for step in iterator:
            found.append(step)
            assert len(found) < 12
    resumed = images(config, micro_batch=8).steps(len(found))
    found += islice(resumed, 12 - len(found))
    resumed.close()
    for (batch,), other in zip(found, expected, strict=True):
        assert_same(batch, other)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("extension", ["png", "txt"])
def test_a_damaged_sample_is_replaced_and_no_other_moves(
    image_set: DataSet, workers: int, extension: str
) -> None:
    config = image_set(max_rejected_share=0.05, workers=workers)
    sound = take(images(config, micro_batch=4), 6)
    damage(config.train, 4, extension)
    stream = images(config, micro_batch=4)
    for step, (batch, expected) in enumerate(zip(take(stream, 6), sound, strict=True)):
        np.testing.assert_array_equal(batch.index, expected.index)
        for row, number in enumerate(batch.index):
            if number == 4:
                substitute = next(stream.plan.substitutes(step, row))
                assert batch.keys[row] == f"{substitute:09d}"
                assert torch.equal(batch.arrays["images"][row], expected_image(substitute))
            else:
                assert batch.keys[row] == expected.keys[row]
                assert torch.equal(batch.arrays["images"][row], expected.arrays["images"][row])
    (rejected,) = stream.quarantine.rejected
    assert (rejected.shard, rejected.key) == ("000000.tar", "000000004")
    assert rejected.reason == f"the checksum of .{extension} does not match"


def test_every_number_of_ranks_takes_the_same_substitute(latent_set: DataSet) -> None:
    config = latent_set(max_rejected_share=0.1)
    damage(config.latents, 4, "moments.npy")
    damage(config.latents, 5, "moments.npy")
    alone = take(latents(config), 5)
    ranks = [take(latents(config, rank=rank, world=4, micro_batch=1), 5) for rank in range(4)]
    for parts, whole in zip(zip(*ranks, strict=True), alone, strict=True):
        assert_same(joined(list(parts)), whole)
        assert {"000000004", "000000005"}.isdisjoint(whole.keys)


def test_too_many_damaged_samples_stop_the_run(image_set: DataSet) -> None:
    config = image_set(max_rejected_share=0.05)
    damage(config.train, 4, "png")
    damage(config.train, 15, "png")
    with pytest.raises(ValueError, match=r"data.max_rejected_share: 2 of 20 samples of data.train"):
        take(images(config), 6)


def test_reading_by_number_leaves_damaged_samples_out(image_set: DataSet) -> None:
    config = image_set(max_rejected_share=0.05)
    damage(config.train, 4, "png")
    stream = images(config)
    batch = stream.read(np.array([3, 4, 5]))
    assert batch.index.tolist() == [3, 5]
    assert batch.captions == ["caption 3", "caption 5"]
    assert torch.equal(batch.arrays["images"][1], expected_image(5))
    assert [item.key for item in stream.quarantine.rejected] == ["000000004"]
    with pytest.raises(ValueError, match=r"data\.train: none of the 1 samples"):
        stream.read(np.array([4]))
    assert len(stream.quarantine.rejected) == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_a_missing_shard_is_named(image_set: DataSet, workers: int) -> None:
    config = image_set(workers=workers)
    (Path(config.train) / "000001.tar").unlink()
    with pytest.raises(
        ManifestError, match=r"^[^\n]*000001\.tar: the manifest in .* lists this shard.*$"
    ):
        take(images(config), 6)


@pytest.mark.parametrize("lost_bytes", [1, 512, 5000])
def test_a_shard_that_was_cut_off_is_named(image_set: DataSet, lost_bytes: int) -> None:
    config = image_set()
    shard = Path(config.train) / "000001.tar"
    shard.write_bytes(shard.read_bytes()[:-lost_bytes])
    with pytest.raises(ManifestError, match=r"000001\.tar has \d+ bytes, but the manifest"):
        take(images(config), 6)


def test_a_changed_index_is_named(image_set: DataSet) -> None:
    config = image_set()
    index = Path(config.train) / "000001.tar.index.npy"
    payload = bytearray(index.read_bytes())
    payload[-1] ^= 1
    index.write_bytes(payload)
    with pytest.raises(ManifestError, match=r"000001\.tar\.index\.npy is not the index"):
        take(images(config), 6)


def test_latents_of_another_shape_are_bad_samples(latent_set: DataSet) -> None:
    config = latent_set(max_rejected_share=1.0)
    shutil.rmtree(config.latents)
    with ShardSetWriter(Path(config.latents), Kind.latents, 5) as writer:
        for array in (moments(0), moments(1)[:, :2], moments(2).astype(np.float32)):
            writer.write({"moments.npy": encode_npy(array), "txt": b"a"})
    info = latents_info(config, writer)
    info.save(Path(config.latents))
    stream = latents(config)
    assert stream.read(np.arange(3)).index.tolist() == [0]
    assert [item.reason for item in stream.quarantine.rejected] == [
        "moments of float16 (2, 2, 2, 2)",
        "moments of float32 (2, 4, 2, 2)",
    ]


def test_what_the_latents_lack_is_named(latent_set: DataSet) -> None:
    config = latent_set()
    with pytest.raises(ValueError, match=r"data\.flip: .* has no mirrored latents"):
        latents(config, Randomness(flip=by_sample))
    config.store_text = True
    with pytest.raises(ValueError, match=r"data\.store_text: .* has no text embeddings"):
        latents(config)


def test_a_set_of_the_other_kind_is_refused(latent_set: DataSet, image_set: DataSet) -> None:
    config = latent_set()
    config.train = config.latents
    with pytest.raises(ManifestError, match=r"data\.train: .* holds latents, not images"):
        images(config)


def test_a_missing_set_names_its_option(tmp_path: Path) -> None:
    config = DataConfig(dir="d", train="d/train", val="d/val", latents="d/latents", image_size=8)
    with pytest.raises(ManifestError, match=r"data\.latents: no manifest"):
        latents(config)
    with pytest.raises(ManifestError, match=r"data\.train: no manifest"):
        images(config)


def test_another_caption_stands_in_for_a_prompt_that_cannot_be_read(image_set: DataSet) -> None:
    bad = {number: {"txt": b"a" * 2**17} for number in (3, 4, 19)}
    config = image_set(more=lambda number: bad.get(number, {}), max_rejected_share=0.2)
    stream = images(config)
    captions = stream.captions(np.array([2, 3, 4, 19, 3]))
    assert captions == [f"caption {number}" for number in (2, 5, 5, 0, 5)]
    assert [item.key for item in stream.quarantine.rejected] == [f"{n:09d}" for n in (3, 4, 19)]


def test_too_many_captions_that_cannot_be_read_are_told(image_set: DataSet) -> None:
    config = image_set(more=lambda number: {"txt": b"a" * 2**17}, max_rejected_share=0.1)
    with pytest.raises(
        ValueError, match=r"max_rejected_share: 3 of 20 .* text of 131072 bytes is over"
    ):
        images(config).captions(np.array([0]))
    config.max_rejected_share = 1
    with pytest.raises(ValueError, match=r"data\.train: no sample has a caption"):
        images(config).captions(np.array([0]))


@pytest.mark.parametrize("of_latents", [True, False])
@pytest.mark.parametrize("form", list(CaptionForm))
def test_a_caption_without_a_condition_costs_its_sample(
    image_set: DataSet, latent_set: DataSet, of_latents: bool, form: CaptionForm
) -> None:
    def classes(number: int) -> dict[str, bytes]:
        name = b"cat" if number == 4 else b"7"
        return {"txt": name, "cls": name, "json": b'{"captions": ["%s"]}' % name}

    make, open_stream = (latent_set, latents) if of_latents else (image_set, images)
    stream = open_stream(make(more=classes, captions=form, max_rejected_share=0.05))
    stream.caption_problem = lambda caption: "" if caption == "7" else "no class"
    batches = take(stream, 6)
    assert {caption for batch in batches for caption in batch.captions} == {"7"}
    assert [(item.key, item.reason) for item in stream.quarantine.rejected] == [
        ("000000004", "no class")
    ]
    assert stream.captions(np.array([4])) == ["7"]
