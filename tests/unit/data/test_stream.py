"""Streams: the plan's samples with the shards' values, whatever the ranks, workers and faults."""

import multiprocessing
import os
import shutil
import signal
import threading
from itertools import islice
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch

from data.codecs import encode_npy
from data.config import DataConfig
from data.cursor import Cursor
from data.image_stream import ImageStream
from data.latent_stream import LatentStream
from data.manifest import Kind, Manifest, ManifestError
from data.reader import ShardReader
from data.stream import Batch, Stream
from data.writer import ShardSetWriter
from tests.unit.data.conftest import moments, pixels_of, png

GLOBAL_BATCH = 8


def images(config: DataConfig, *, rank=0, world=1, micro_batch=2, **options) -> ImageStream:
    return ImageStream(
        config.train,
        config,
        seed=3,
        global_batch=GLOBAL_BATCH,
        micro_batch=micro_batch,
        rank=rank,
        world=world,
        **options,
    )


def latents(config: DataConfig, *, rank=0, world=1, micro_batch=2, **options) -> LatentStream:
    return LatentStream(
        config.latents,
        config,
        seed=3,
        global_batch=GLOBAL_BATCH,
        micro_batch=micro_batch,
        rank=rank,
        world=world,
        **options,
    )


def take(stream: Stream, steps: int, start: int = 0) -> list[Batch]:
    """Whole steps, each as one batch."""
    iterator = stream.steps(start)
    batches = [joined(step) for step in islice(iterator, steps)]
    iterator.close()
    return batches


def joined(parts: list[Batch]) -> Batch:
    return Batch(
        epoch=np.concatenate([part.epoch for part in parts]),
        index=np.concatenate([part.index for part in parts]),
        keys=[key for part in parts for key in part.keys],
        captions=[caption for part in parts for caption in part.captions],
        arrays={name: torch.cat([part.arrays[name] for part in parts]) for name in parts[0].arrays},
    )


def assert_same(batch: Batch, other: Batch) -> None:
    np.testing.assert_array_equal(batch.epoch, other.epoch)
    np.testing.assert_array_equal(batch.index, other.index)
    assert (batch.keys, batch.captions) == (other.keys, other.captions)
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


def test_images_are_those_of_the_plan(image_set):
    stream = images(image_set())
    for step, batch in enumerate(take(stream, 6)):
        epoch, index = stream.plan.rank_slice(step, 0, 1)
        np.testing.assert_array_equal(batch.epoch, epoch)
        np.testing.assert_array_equal(batch.index, index)
        assert batch.keys == [f"{number:09d}" for number in index]
        assert batch.captions == [f"caption {number}" for number in index]
        assert torch.equal(batch.arrays["images"], torch.stack([*map(expected_image, index)]))
    assert stream.num_samples == 20


def test_latents_are_those_of_the_plan(latent_set):
    stream = latents(latent_set(text=True, store_text=True))
    for step, batch in enumerate(take(stream, 6)):
        index = stream.plan.rank_slice(step, 0, 1)[1]
        expected = np.stack([moments(number) for number in index]).astype(np.float32)
        np.testing.assert_array_equal(batch.arrays["moments"].numpy(), expected)
        assert batch.arrays["text"][:, 0, 0].tolist() == index.tolist()
        assert batch.arrays["text"].shape == (GLOBAL_BATCH, 3, 5)
        assert batch.arrays["text"].dtype == batch.arrays["moments"].dtype == torch.float16
    assert "text" not in latents(latent_set(text=True)).read(np.arange(2)).arrays


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_steps_of_one(latent_set, world):
    config = latent_set()
    alone = take(latents(config), 5)
    ranks = [
        take(latents(config, rank=rank, world=world, micro_batch=1), 5) for rank in range(world)
    ]
    for parts, whole in zip(zip(*ranks, strict=True), alone, strict=True):
        assert_same(joined(list(parts)), whole)


def test_a_step_has_the_micro_batches_of_its_rank(latent_set):
    stream = latents(latent_set(), rank=1, world=2, micro_batch=2)
    assert [len(batch.keys) for batch in next(stream.steps(0))] == [2, 2]


def test_a_stream_resumes_at_any_step(latent_set):
    config = latent_set()
    whole = take(latents(config), 8)
    for start in range(8):
        assert_same(take(latents(config), 1, start)[0], whole[start])


@pytest.mark.parametrize("prefetch", [0, 3])
def test_workers_and_read_ahead_change_nothing(image_set, prefetch):
    config = image_set(prefetch=prefetch)
    alone = take(images(config), 4, 2)
    config.workers = 2
    torch.manual_seed(0)
    state = torch.get_rng_state()
    for batch, expected in zip(take(images(config), 4, 2), alone, strict=True):
        assert_same(batch, expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_nothing_runs_on_after_a_stream_is_closed(image_set):
    threads = threading.active_count()
    take(images(image_set()), 2)
    assert threading.active_count() <= threads  # those of an earlier test may still be ending
    take(images(image_set(workers=2)), 2)
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("workers", [1, 3])
def test_a_killed_worker_is_an_error_after_which_nothing_is_missing_or_twice(image_set, workers):
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


def by_sample(epoch, index):
    return (epoch + index) % 2 == 1


def test_flips_follow_the_sample_and_mirror_images(image_set):
    config = image_set()
    plain = take(images(config), 6)
    flipped = take(images(config, flips=by_sample), 6)
    seen = set()
    for batch, expected in zip(flipped, plain, strict=True):
        for row, flip in enumerate(by_sample(batch.epoch, batch.index)):
            image = expected.arrays["images"][row]
            assert torch.equal(batch.arrays["images"][row], image.flip(-1) if flip else image)
            seen.add((int(batch.index[row]), bool(flip)))
    assert {(number, flip) for number, flip in seen if number == 4} == {(4, False), (4, True)}


def test_flips_choose_the_mirrored_latents(latent_set):
    stream = latents(latent_set(flip=True), flips=by_sample)
    for batch in take(stream, 6):
        flips = by_sample(batch.epoch, batch.index)
        numbers = np.where(flips, 1000 + batch.index, batch.index)
        expected = np.stack([moments(number) for number in numbers]).astype(np.float32)
        np.testing.assert_array_equal(batch.arrays["moments"].numpy(), expected)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("extension", ["png", "txt"])
def test_a_damaged_sample_is_replaced_and_no_other_moves(image_set, workers, extension):
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


def test_every_number_of_ranks_takes_the_same_substitute(latent_set):
    config = latent_set(max_rejected_share=0.1)
    damage(config.latents, 4, "moments.npy")
    damage(config.latents, 5, "moments.npy")
    alone = take(latents(config), 5)
    ranks = [take(latents(config, rank=rank, world=4, micro_batch=1), 5) for rank in range(4)]
    for parts, whole in zip(zip(*ranks, strict=True), alone, strict=True):
        assert_same(joined(list(parts)), whole)
        assert {"000000004", "000000005"}.isdisjoint(whole.keys)


def test_too_many_damaged_samples_stop_the_run(image_set):
    config = image_set(max_rejected_share=0.05)
    damage(config.train, 4, "png")
    damage(config.train, 15, "png")
    with pytest.raises(ValueError, match=r"data.max_rejected_share: 2 of 20 samples of data.train"):
        take(images(config), 6)


def test_reading_by_number_leaves_damaged_samples_out(image_set):
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


@pytest.mark.parametrize("index", [[-1], [20], [0, 99]])
def test_numbers_outside_the_set_are_an_error(image_set, index):
    with pytest.raises(IndexError, match="of 20"):
        images(image_set()).read(np.array(index))


def test_a_set_whose_samples_carry_classes(tmp_path, image_set):
    config = image_set()
    shutil.rmtree(config.train)
    with ShardSetWriter(Path(config.train), Kind.images, 5) as writer:
        writer.write({"jpg": png(1), "cls": b"7\n"})
    Manifest(kind=Kind.images, shards=writer.shards).save(Path(config.train))
    assert images(config).read(np.array([0])).captions == ["7"]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_missing_shard_is_named(image_set, workers):
    config = image_set(workers=workers)
    (Path(config.train) / "000001.tar").unlink()
    with pytest.raises(
        ManifestError, match=r"^[^\n]*000001\.tar: the manifest in .* lists this shard.*$"
    ):
        take(images(config), 6)


@pytest.mark.parametrize("lost_bytes", [1, 512, 5000])
def test_a_shard_that_was_cut_off_is_named(image_set, lost_bytes):
    config = image_set()
    shard = Path(config.train) / "000001.tar"
    shard.write_bytes(shard.read_bytes()[:-lost_bytes])
    with pytest.raises(ManifestError, match=r"000001\.tar has \d+ bytes, but the manifest"):
        take(images(config), 6)


def test_a_changed_index_is_named(image_set):
    config = image_set()
    index = Path(config.train) / "000001.tar.index.npy"
    payload = bytearray(index.read_bytes())
    payload[-1] ^= 1
    index.write_bytes(payload)
    with pytest.raises(ManifestError, match=r"000001\.tar\.index\.npy is not the index"):
        take(images(config), 6)


def test_a_remote_set_reads_as_the_local_one(image_set, tmp_path):
    config = image_set()
    local = images(config).read(np.arange(20))
    move_to_store(config, f"memory://{tmp_path.name}/remote")
    store, root = fsspec.core.url_to_fs(config.train)
    assert_same(images(config).read(np.arange(20)), local)
    shard = f"{root}/000000.tar"
    store.pipe_file(shard, bytes(store.size(shard)))
    assert_same(images(config).read(np.arange(20)), local)
    config.cache.dir += "_empty"
    with pytest.raises(ManifestError, match=r"000000\.tar is not the file of the manifest"):
        images(config).read(np.arange(20))


def move_to_store(config: DataConfig, base: str, share: float = 10.0) -> float:
    """Move the images to fsspec's memory, with a cache for a share of them; return its bound."""
    store, root = fsspec.core.url_to_fs(base)
    sizes = []
    for file in Path(config.train).iterdir():
        store.pipe_file(f"{root}/{file.name}", file.read_bytes())
        sizes.append(file.stat().st_size)
    config.train, config.cache.max_gib = base, share * sum(sizes) / 2**30
    return share * sum(sizes)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_remote_set_streams_as_the_local_one_in_a_small_cache(image_set, tmp_path, workers):
    config = image_set(samples=60, shard_samples=5)
    expected = take(images(config), 15)
    config.workers = workers
    bound = move_to_store(config, f"memory://{tmp_path.name}/remote", 0.7)
    for batch, other in zip(take(images(config), 15), expected, strict=True):
        assert_same(batch, other)
    assert sum(file.stat().st_size for file in Path(config.cache.dir).iterdir()) <= bound


def test_reading_by_number_lets_go_of_shards_when_the_cache_is_full(image_set, tmp_path):
    config = image_set(samples=60, shard_samples=5)
    move_to_store(config, f"memory://{tmp_path.name}/remote", 0.3)
    stream = images(config)
    for number in range(0, 60, 5):
        assert stream.read(np.array([number])).keys == [f"{number:09d}"]
    assert len(stream.reader._open) == 3


def test_a_shard_is_let_go_when_its_blocks_are_done(image_set, tmp_path):
    config = image_set(samples=60, shard_samples=5, prefetch=0)
    move_to_store(config, f"memory://{tmp_path.name}/remote")
    stream = images(config, micro_batch=8)
    for step in range(15):
        take(stream, 1, step)
        needed = set(stream.plan.shards(step, 0, 1, steps_ahead=0).tolist())
        assert 1 < len(stream.reader._open) <= len(needed) < 12
        assert stream.reader._open.keys() <= needed


def test_few_shards_are_open_at_a_time(image_set, monkeypatch):
    monkeypatch.setattr("data.reader.MAX_OPEN_SHARDS", 2)
    stream = images(image_set(shard_samples=2))
    batch = stream.read(np.arange(20))
    assert torch.equal(batch.arrays["images"], torch.stack([*map(expected_image, range(20))]))
    assert len(stream.reader._open) == 2


def test_latents_of_another_shape_are_bad_samples(latent_set):
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


def latents_info(config: DataConfig, writer: ShardSetWriter) -> Manifest:
    from data.manifest import LatentInfo

    info = LatentInfo(
        source_hash="", encoder="", transform="", shape=[4, 2, 2], mean=[0.0] * 4, std=[1.0] * 4
    )
    return Manifest(kind=Kind.latents, shards=writer.shards, latents=info)


def test_what_the_latents_lack_is_named(latent_set):
    config = latent_set()
    with pytest.raises(ValueError, match=r"data\.flip: .* has no mirrored latents"):
        latents(config, flips=by_sample)
    config.store_text = True
    with pytest.raises(ValueError, match=r"data\.store_text: .* has no text embeddings"):
        latents(config)


def test_a_set_of_the_other_kind_is_refused(latent_set, image_set):
    config = latent_set()
    config.train = config.latents
    with pytest.raises(ManifestError, match=r"data\.train: .* holds latents, not images"):
        images(config)


def test_a_missing_set_names_its_option(tmp_path):
    config = DataConfig(dir="d", train="d/train", val="d/val", latents="d/latents", image_size=8)
    with pytest.raises(ManifestError, match=r"data\.latents: no manifest"):
        latents(config)
    with pytest.raises(ManifestError, match=r"data\.train: no manifest"):
        images(config)


def test_batches_that_do_not_divide_are_refused(image_set):
    with pytest.raises(ValueError, match=r"train\.global_batch_size: 8 is no multiple"):
        images(image_set(), micro_batch=3)


def test_the_cursor_counts_trained_samples_and_names_what_changed(image_set):
    config = image_set()
    cursor = images(config).cursor(5)
    assert cursor.samples == 5 * GLOBAL_BATCH
    assert Cursor.from_json(cursor.to_json()) == cursor
    cursor.check(images(config).cursor(0))
    config.lanes = 4
    config.shuffle_block = 6
    with pytest.raises(
        ValueError, match=r"data\.lanes was 2, is 4; data\.shuffle_block was 5, is 6"
    ):
        cursor.check(images(config).cursor(0))


@pytest.mark.parametrize("change", [{"seed": "3"}, {"other": 1}, {"lanes": None}])
def test_a_foreign_cursor_is_refused(image_set, change):
    values = images(image_set()).cursor(5).to_json()
    with pytest.raises(ValueError, match="not a data cursor"):
        Cursor.from_json(values | change)
