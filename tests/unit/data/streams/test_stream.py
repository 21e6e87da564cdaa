"""Streams: the plan's samples with the shards' values, whatever the ranks, workers and faults."""

import multiprocessing
import shutil
import threading
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from data.order.cursor import Cursor
from data.shards.manifest import Kind, Manifest, ManifestError
from data.shards.stored import ArrayLayout
from data.shards.transforms import Crop, square
from data.shards.writer import ShardSetWriter
from data.streams.latents import ArrayMember, LatentStream
from data.streams.stream import Randomness
from tests.support.data_sets import SIZE, DataSet, moments, pixels_of, png
from tests.support.stream_sets import assert_same, by_sample, expected_image, move_to_store
from tests.support.streams import GLOBAL_BATCH, images, joined, latents, take


def test_images_are_those_of_the_plan(image_set: DataSet) -> None:
    stream = images(image_set())
    for step, batch in enumerate(take(stream, 6)):
        epoch, index = stream.plan.rank_slice(step, 0, 1)
        np.testing.assert_array_equal(batch.epoch, epoch)
        np.testing.assert_array_equal(batch.index, index)
        assert batch.keys == [f"{number:09d}" for number in index]
        assert batch.captions == [f"caption {number}" for number in index]
        assert torch.equal(batch.arrays["images"], torch.stack([*map(expected_image, index)]))
    assert stream.num_samples == 20


def test_latents_are_those_of_the_plan(latent_set: DataSet) -> None:
    stream = latents(latent_set(text=True, store_text=True))
    for step, batch in enumerate(take(stream, 6)):
        index = stream.plan.rank_slice(step, 0, 1)[1]
        expected = np.stack([moments(number) for number in index]).astype(np.float32)
        np.testing.assert_array_equal(batch.arrays["moments"].numpy(), expected)
        assert batch.arrays["text"][:, 0, 0].tolist() == index.tolist()
        assert batch.arrays["text"].shape == (GLOBAL_BATCH, 3, 5)
        assert batch.arrays["text"].dtype == batch.arrays["moments"].dtype == torch.float16
    assert "text" not in latents(latent_set(text=True)).read(np.arange(2)).arrays


def test_latents_have_the_members_that_the_stream_is_given(latent_set: DataSet) -> None:
    plain = latents(latent_set(text=True, flip=True))
    layouts = {"moments": ArrayLayout.of("f2", (2, 4, 2, 2)), "text": ArrayLayout.of("f2", (3, 5))}
    for names in (["text"], ["text", "moments"]):
        stream = LatentStream(
            plain.data_set,
            plain.config,
            plain.share,
            Randomness(flip=by_sample),
            members=[ArrayMember(name, layouts[name], name == "moments") for name in names],
        )
        (batch,) = take(stream, 1)
        assert list(batch.arrays) == names
        assert batch.arrays["text"][:, 0, 0].tolist() == batch.index.tolist()
    flips = by_sample(batch.epoch, batch.index)
    numbers = np.where(flips, 1000 + batch.index, batch.index)
    expected = np.stack([moments(number) for number in numbers])
    np.testing.assert_array_equal(batch.arrays["moments"].numpy(), expected)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_steps_of_one(latent_set: DataSet, world: int) -> None:
    config = latent_set()
    alone = take(latents(config), 5)
    ranks = [
        take(latents(config, rank=rank, world=world, micro_batch=1), 5) for rank in range(world)
    ]
    for parts, whole in zip(zip(*ranks, strict=True), alone, strict=True):
        assert_same(joined(list(parts)), whole)


def test_a_step_has_the_micro_batches_of_its_rank(latent_set: DataSet) -> None:
    stream = latents(latent_set(), rank=1, world=2, micro_batch=2)
    assert [len(batch.keys) for batch in next(stream.steps(0))] == [2, 2]


def test_a_stream_resumes_at_any_step(latent_set: DataSet) -> None:
    config = latent_set()
    whole = take(latents(config), 8)
    for start in range(8):
        assert_same(take(latents(config), 1, start)[0], whole[start])


@pytest.mark.parametrize("prefetch", [0, 3])
def test_workers_and_read_ahead_change_nothing(image_set: DataSet, prefetch: int) -> None:
    config = image_set(prefetch=prefetch)
    alone = take(images(config), 4, 2)
    config.workers = 2
    torch.manual_seed(0)
    state = torch.get_rng_state()
    for batch, expected in zip(take(images(config), 4, 2), alone, strict=True):
        assert_same(batch, expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_nothing_runs_on_after_a_stream_is_closed(image_set: DataSet) -> None:
    threads = threading.active_count()
    take(images(image_set()), 2)
    assert threading.active_count() <= threads  # those of an earlier test may still be ending
    take(images(image_set(workers=2)), 2)
    assert multiprocessing.active_children() == []


def test_flips_follow_the_sample_and_mirror_images(image_set: DataSet) -> None:
    config = image_set()
    plain = take(images(config), 6)
    flipped = take(images(config, Randomness(flip=by_sample)), 6)
    seen = set()
    for batch, expected in zip(flipped, plain, strict=True):
        for row, flip in enumerate(by_sample(batch.epoch, batch.index)):
            image = expected.arrays["images"][row]
            assert torch.equal(batch.arrays["images"][row], image.flip(-1) if flip else image)
            seen.add((int(batch.index[row]), bool(flip)))
    assert {(number, flip) for number, flip in seen if number == 4} == {(4, False), (4, True)}


def crop_by_sample(epoch: np.ndarray, index: np.ndarray) -> np.ndarray:
    """A quarter of the picture, another one at the next visit."""
    half = np.full(len(index), 0.5)
    return np.stack([half, (index + epoch) % 2, index // 2 % 2], axis=1)


@pytest.mark.parametrize("workers", [0, 1])
def test_crops_follow_the_visit_on_any_number_of_ranks(image_set: DataSet, workers: int) -> None:
    config = image_set(workers=workers)
    randomness = Randomness(crop=crop_by_sample)
    alone = take(images(config, randomness), 4)
    seen: set[tuple[int, float]] = set()
    for batch in alone:
        crops = crop_by_sample(batch.epoch, batch.index).tolist()
        for row, (number, crop) in enumerate(zip(batch.index.tolist(), crops, strict=True)):
            pixels = square(Image.fromarray(pixels_of(png(number))), SIZE, Crop(*crop))
            expected = torch.tensor(pixels).permute(2, 0, 1) / 127.5 - 1
            assert torch.equal(batch.arrays["images"][row], expected)
            seen.add((number, crop[1]))
    assert any((number, 1.0 - x) in seen for number, x in seen)
    parts = [
        take(images(config, randomness, rank=rank, world=2, micro_batch=1), 4) for rank in (0, 1)
    ]
    for of_ranks, whole in zip(zip(*parts, strict=True), alone, strict=True):
        assert_same(joined(list(of_ranks)), whole)
    (first,) = images(config, randomness).read(np.array([3])).arrays["images"]
    assert torch.equal(first, expected_image(3))


def test_flips_choose_the_mirrored_latents(latent_set: DataSet) -> None:
    stream = latents(latent_set(flip=True), Randomness(flip=by_sample))
    for batch in take(stream, 6):
        flips = by_sample(batch.epoch, batch.index)
        numbers = np.where(flips, 1000 + batch.index, batch.index)
        expected = np.stack([moments(number) for number in numbers]).astype(np.float32)
        np.testing.assert_array_equal(batch.arrays["moments"].numpy(), expected)


@pytest.mark.parametrize("index", [[-1], [20], [0, 99]])
def test_numbers_outside_the_set_are_an_error(image_set: DataSet, index: list[int]) -> None:
    with pytest.raises(IndexError, match="of 20"):
        images(image_set()).read(np.array(index))


def test_a_set_whose_samples_carry_classes(tmp_path: Path, image_set: DataSet) -> None:
    config = image_set()
    shutil.rmtree(config.train)
    with ShardSetWriter(Path(config.train), Kind.images, 5) as writer:
        writer.write({"jpg": png(1), "cls": b"7\n"})
    Manifest(kind=Kind.images, shards=writer.shards).save(Path(config.train))
    assert images(config).read(np.array([0])).captions == ["7"]


def test_a_remote_set_reads_as_the_local_one(image_set: DataSet, tmp_path: Path) -> None:
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


@pytest.mark.parametrize("workers", [0, 2])
def test_a_remote_set_streams_as_the_local_one_in_a_small_cache(
    image_set: DataSet, tmp_path: Path, workers: int
) -> None:
    config = image_set(samples=60, shard_samples=5)
    expected = take(images(config), 15)
    config.workers = workers
    bound = move_to_store(config, f"memory://{tmp_path.name}/remote", 0.7)
    for batch, other in zip(take(images(config), 15), expected, strict=True):
        assert_same(batch, other)
    assert sum(file.stat().st_size for file in Path(config.cache.dir).iterdir()) <= bound


def test_reading_by_number_lets_go_of_shards_when_the_cache_is_full(
    image_set: DataSet, tmp_path: Path
) -> None:
    config = image_set(samples=60, shard_samples=5)
    move_to_store(config, f"memory://{tmp_path.name}/remote", 0.3)
    stream = images(config)
    for number in range(0, 60, 5):
        assert stream.read(np.array([number])).keys == [f"{number:09d}"]
    assert len(stream.reader._open) == 3


def test_a_shard_is_let_go_when_its_blocks_are_done(image_set: DataSet, tmp_path: Path) -> None:
    config = image_set(samples=60, shard_samples=5, prefetch=0)
    move_to_store(config, f"memory://{tmp_path.name}/remote")
    stream = images(config, micro_batch=8)
    for step in range(15):
        take(stream, 1, step)
        needed = set(stream.plan.shards(step, 0, 1, steps_ahead=0).tolist())
        assert 1 < len(stream.reader._open) <= len(needed) < 12
        assert stream.reader._open.keys() <= needed


def test_few_shards_are_open_at_a_time(image_set: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.shards.reader.MAX_OPEN_SHARDS", 2)
    stream = images(image_set(shard_samples=2))
    batch = stream.read(np.arange(20))
    assert torch.equal(batch.arrays["images"], torch.stack([*map(expected_image, range(20))]))
    assert len(stream.reader._open) == 2


def test_the_cursor_counts_trained_samples_and_names_what_changed(image_set: DataSet) -> None:
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
def test_a_foreign_cursor_is_refused(image_set: DataSet, change: dict[str, Any]) -> None:
    values = images(image_set()).cursor(5).to_json()
    with pytest.raises(ValueError, match="not a data cursor"):
        Cursor.from_json(values | change)
