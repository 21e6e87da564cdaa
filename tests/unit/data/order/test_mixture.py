from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.config import CaptionForm, DataConfig, MixtureConfig
from data.order.batches import Share
from data.order.lanes import LanePlan
from data.order.mixture import MixturePlan, join_latents, share_lanes
from data.shards.index import decode_index
from data.shards.manifest import Kind, LatentInfo, Manifest, ManifestError
from data.streams.latents import LatentStream
from tests.support.data_sets import data_config, moments

WORLDS = (1, 2, 3, 4, 6)


Mixture = tuple[MixturePlan, list[np.ndarray], np.ndarray]
"""The plan, the sizes of the shards of each set, and the set of each lane."""


@st.composite
def mixtures(draw: st.DrawFn) -> Mixture:
    count = draw(st.integers(1, 3))
    weights = draw(st.lists(st.floats(0.5, 2), min_size=count, max_size=count))
    lanes = 12
    sizes = [
        np.array(draw(st.lists(st.integers(5, 40), min_size=3, max_size=6))) for _ in range(count)
    ]
    options = {"seed": draw(st.integers(0, 9)), "lanes": lanes, "block": draw(st.integers(1, 9))}
    plan = MixturePlan(sizes, weights, **options, global_batch=lanes * draw(st.integers(1, 3)))
    return plan, sizes, share_lanes(weights, lanes)


@settings(deadline=None, max_examples=60)
@given(mixtures(), st.integers(0, 30))
def test_every_world_reads_the_same_batch_in_fixed_shares(mixture: Mixture, step: int) -> None:
    plan, sizes, sets = mixture
    epochs, samples = plan.rank_slice(step, 0, 1)
    for world in WORLDS:
        parts = [plan.rank_slice(step, rank, world) for rank in range(world)]
        assert np.array_equal(np.concatenate([epoch for epoch, _ in parts]), epochs)
        assert np.array_equal(np.concatenate([index for _, index in parts]), samples)
    ends = np.cumsum([size.sum() for size in sizes])
    found = np.searchsorted(ends, samples, side="right")
    assert np.array_equal(found, np.repeat(sets, plan.global_batch // len(sets)))


@settings(deadline=None, max_examples=30)
@given(mixtures())
def test_no_sample_comes_twice_in_an_epoch_of_its_set(mixture: Mixture) -> None:
    plan, sizes, _ = mixture
    steps = 2 * max(size.sum() for size in sizes)
    visits = Counter(
        visit
        for step in range(min(steps, 60))
        for visit in zip(*(part.tolist() for part in plan.rank_slice(step, 0, 1)), strict=True)
    )
    assert set(visits.values()) == {1}


def test_a_mixture_of_one_set_is_its_plan() -> None:
    sizes = np.array([7, 20, 13])
    options = {"seed": 3, "lanes": 4, "block": 5, "global_batch": 8}
    one, mixed = LanePlan(sizes, **options), MixturePlan([sizes], [2.0], **options)
    for step in range(12):
        for rank in range(2):
            mine, theirs = mixed.rank_slice(step, rank, 2), one.rank_slice(step, rank, 2)
            assert all(map(np.array_equal, mine, theirs))
        assert list(mixed.substitutes(step, 5)) == list(one.substitutes(step, 5))


def test_substitutes_come_from_the_set_of_the_bad_sample() -> None:
    sizes = [np.array([30]), np.array([20, 30])]
    plan = MixturePlan(sizes, [1, 1], seed=0, lanes=4, block=6, global_batch=8)
    _, samples = plan.rank_slice(2, 0, 1)
    for place, sample in enumerate(samples):
        stand_ins = list(plan.substitutes(2, place))
        assert {number < 30 for number in stand_ins} == {bool(sample < 30)}
        assert sample not in stand_ins


def test_the_shards_ahead_are_those_that_a_rank_reads() -> None:
    sizes = [np.array([7, 9, 11, 5]), np.array([6, 8, 10])]
    plan = MixturePlan(sizes, [2, 1], seed=1, lanes=6, block=4, global_batch=12)
    ends = np.cumsum(np.concatenate(sizes))
    for step in range(20):
        for rank in range(3):
            _, samples = plan.rank_slice(step, rank, 3)
            read = set(np.searchsorted(ends, samples, side="right").tolist())
            assert read <= set(plan.shards(step, rank, 3, steps_ahead=0).tolist())


def test_lanes_are_shared_by_weight_and_spread() -> None:
    assert share_lanes([3, 1], 8).tolist() == [0, 0, 1, 0, 0, 0, 1, 0]
    assert Counter(share_lanes([5, 3, 2], 100).tolist()) == {0: 50, 1: 30, 2: 20}


def test_a_weight_without_a_lane_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.mixture: set 1 gets no lane.*data\.lanes=10"):
        share_lanes([9, 1], 4)
    with pytest.raises(ValueError, match="weights must be positive"):
        share_lanes([1, 0], 4)


Factory = Callable[..., DataConfig]


@pytest.fixture
def two_sets(latent_set: Factory, tmp_path: Path) -> list[str]:
    """A set of 20 samples, and one of 12."""
    folders = []
    for name, samples in (("photos", 20), ("drawings", 12)):
        latent_set(samples)
        (tmp_path / "latents").rename(tmp_path / name)
        folders.append(str(tmp_path / name))
    return folders


def open_mixture(
    folders: list[str], root: Path, weights: tuple[float, ...] = (3, 1), **options: Any
) -> LatentStream:
    config = data_config(root, lanes=4, **options)
    config.mixture = [
        MixtureConfig(latents=folder, weight=weight)
        for folder, weight in zip(folders, weights, strict=True)
    ]
    return LatentStream.open(config, Share(seed=0, global_batch=8, micro_batch=8))


def test_a_stream_reads_every_set_of_a_mixture(two_sets: list[str], tmp_path: Path) -> None:
    stream = open_mixture(two_sets, tmp_path)
    assert stream.num_samples == 32
    first_epoch = Counter()
    for (batch,) in islice(stream.steps(0), 10):
        in_photos = batch.index < 20
        assert in_photos.sum() == 6
        for row, index in enumerate(batch.index.tolist()):
            number = index if index < 20 else index - 20
            assert batch.captions[row] == f"caption {number}"
            assert np.array_equal(batch.arrays["moments"][row], moments(number))
        first_epoch.update(batch.index[batch.epoch == 0].tolist())
    assert set(first_epoch.values()) == {1}


def test_each_set_of_a_mixture_has_its_place_of_captions(
    latent_set: Factory, tmp_path: Path
) -> None:
    def more(number: int) -> dict[str, bytes]:
        return {"json": b'{"short": "drawing %d"}' % number}

    for name, samples in (("photos", 20), ("drawings", 12)):
        latent_set(samples, more=more)
        (tmp_path / "latents").rename(tmp_path / name)
    config = data_config(tmp_path, lanes=4)
    config.mixture = [
        MixtureConfig(latents=str(tmp_path / "photos"), weight=3),
        MixtureConfig(
            latents=str(tmp_path / "drawings"),
            weight=1,
            captions=CaptionForm.json,
            caption_field="short",
        ),
    ]
    stream = LatentStream.open(config, Share(seed=0, global_batch=8, micro_batch=8))
    for (batch,) in islice(stream.steps(0), 10):
        for row, index in enumerate(batch.index.tolist()):
            expected = f"caption {index}" if index < 20 else f"drawing {index - 20}"
            assert batch.captions[row] == expected
    assert stream.captions(np.array([3, 25])) == ["caption 3", "drawing 5"]


def test_the_cursor_of_a_mixture_tells_its_shares(two_sets: list[str], tmp_path: Path) -> None:
    cursor = open_mixture(two_sets, tmp_path).cursor(3)
    cursor.check(open_mixture(two_sets, tmp_path, weights=(6, 2)).cursor(0))
    with pytest.raises(ValueError, match="data set"):
        cursor.check(open_mixture(two_sets, tmp_path, weights=(1, 1)).cursor(0))


def test_a_bad_sample_of_a_mixture_is_named_with_its_set(
    two_sets: list[str], tmp_path: Path
) -> None:
    shard = Path(two_sets[1]) / "000000.tar"
    index = decode_index(shard.with_name("000000.tar.index.npy").read_bytes())
    tar = bytearray(shard.read_bytes())
    tar[int(index[2]["moments.npy"]["offset"]) + 130] ^= 1
    shard.write_bytes(tar)
    stream = open_mixture(two_sets, tmp_path, max_rejected_share=0.1)
    for (batch,) in islice(stream.steps(0), 8):
        assert (batch.index < 20).sum() == 6
    (rejected,) = stream.quarantine.rejected
    assert (rejected.shard, rejected.key) == ("drawings/000000.tar", "000000002")


def test_the_statistics_are_those_of_the_mixture() -> None:
    info = LatentInfo(
        source_hash="s", encoder="e", transform="t", shape=[1, 2, 2], mean=[1.0], std=[2.0]
    )
    other = replace(info, source_hash="o", mean=[-1.0], std=[1.0])
    sets = [Manifest(kind=Kind.latents, shards=[], latents=item) for item in (info, other)]
    _, joined = join_latents(["one", "two"], sets, [3, 1])
    assert joined.latents is not None
    # E[x] = 0.75·1 - 0.25·1; E[x²] = 0.75·(4 + 1) + 0.25·(1 + 1)
    assert joined.latents.mean == [0.5]
    assert joined.latents.std == pytest.approx([(4.25 - 0.25) ** 0.5])


def test_sets_of_different_encoders_are_not_mixed(two_sets: list[str], tmp_path: Path) -> None:
    folder = Path(two_sets[1])
    manifest = Manifest.load(folder, option="data.latents")
    assert manifest.latents is not None
    replace(manifest, latents=replace(manifest.latents, encoder="another")).save(folder)
    with pytest.raises(
        ManifestError, match=r"data\.mixture: .*drawings are of another first stage"
    ):
        open_mixture(two_sets, tmp_path)


def test_sets_in_different_stores_are_not_mixed() -> None:
    sets = [Manifest(kind=Kind.latents, shards=[])] * 2
    with pytest.raises(ManifestError, match=r"data\.mixture: .* must lie in one store"):
        join_latents(["s3://one/latents", "here/latents"], sets, [1, 1])


def test_a_set_that_is_missing_is_named(two_sets: list[str], tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"data\.mixture\[1\]\.latents: no manifest"):
        open_mixture([two_sets[0], str(tmp_path / "nowhere")], tmp_path)
