"""The lane plan: exactly once an epoch, the same for every number of ranks, resumable anywhere."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.order.lanes import LanePlan

plans = st.builds(
    lambda sizes, seed, lanes, per_lane, block: LanePlan(
        np.array([*sizes, lanes], np.int64),
        seed=seed,
        lanes=lanes,
        block=block,
        global_batch=lanes * per_lane,
    ),
    sizes=st.lists(st.integers(0, 40), max_size=12),
    seed=st.integers(0, 2**63),
    lanes=st.integers(1, 6),
    per_lane=st.integers(1, 7),
    block=st.integers(1, 50),
)


def epochs_of(plan: LanePlan, epochs: int) -> dict[int, list[int]]:
    """The samples of the first epochs, in the order of training."""
    per_lane = plan.global_batch // plan.lanes
    visits: dict[int, list[int]] = {}
    for step in range(-(-epochs * plan.lane_samples // per_lane)):
        for epoch, index in zip(*plan.step(step), strict=True):
            visits.setdefault(int(epoch), []).append(int(index))
    return {epoch: visits[epoch] for epoch in range(epochs)}


@settings(deadline=None, max_examples=60)
@given(plans)
def test_every_epoch_visits_each_sample_at_most_once_and_skips_exactly_the_rest(
    plan: LanePlan,
) -> None:
    for visited in epochs_of(plan, 3).values():
        assert len(set(visited)) == len(visited) == plan.samples - plan.left_over
        assert 0 <= min(visited) <= max(visited) < plan.samples
    assert 0 <= plan.left_over < plan.lanes


@settings(deadline=None, max_examples=60)
@given(plans, st.integers(0, 200))
def test_every_number_of_ranks_shares_the_same_global_batch(plan: LanePlan, step: int) -> None:
    whole = plan.step(step)
    for world in range(1, plan.global_batch + 1):
        if plan.global_batch % world:
            continue
        parts = [plan.rank_slice(step, rank, world) for rank in range(world)]
        for joined, expected in zip(zip(*parts, strict=True), whole, strict=True):
            np.testing.assert_array_equal(np.concatenate(joined), expected)


@settings(deadline=None, max_examples=4)
@given(
    st.lists(st.integers(0, 3000), min_size=1, max_size=40),
    st.sampled_from([1, 2, 6, 64, 768, 1024, 3072]),
    st.integers(1, 5000),
    st.integers(0, 300),
)
def test_the_numbers_of_ranks_of_real_runs_share_the_same_global_batch(
    sizes: list[int], lanes: int, block: int, step: int
) -> None:
    plan = LanePlan(np.array([*sizes, lanes]), seed=1, lanes=lanes, block=block, global_batch=3072)
    whole = plan.step(step)
    for world in (2, 3, 4, 6, 8, 64, 1024):
        parts = [plan.rank_slice(step, rank, world) for rank in range(world)]
        for joined, expected in zip(zip(*parts, strict=True), whole, strict=True):
            np.testing.assert_array_equal(np.concatenate(joined), expected)


@settings(deadline=None, max_examples=60)
@given(plans, st.integers(0, 100))
def test_a_fresh_plan_gives_the_same_step_as_one_that_came_all_the_way(
    plan: LanePlan, step: int
) -> None:
    for before in range(step):
        plan.step(before)
    fresh = LanePlan(
        plan._sizes,
        seed=plan.seed,
        lanes=plan.lanes,
        block=plan.block,
        global_batch=plan.global_batch,
    )
    for resumed, expected in zip(fresh.step(step), plan.step(step), strict=True):
        np.testing.assert_array_equal(resumed, expected)


@settings(deadline=None, max_examples=60)
@given(plans, st.integers(0, 50), st.data())
def test_substitutes_are_the_rest_of_the_block(
    plan: LanePlan, step: int, data: st.DataObject
) -> None:
    place = data.draw(st.integers(0, plan.global_batch - 1))
    epoch, index = (int(ids[place]) for ids in plan.step(step))
    substitutes = list(plan.substitutes(step, place))
    assert len({index, *substitutes}) == 1 + len(substitutes) <= plan.block
    assert set(substitutes) <= set(epochs_of(plan, epoch + 1)[epoch])


@settings(deadline=None, max_examples=100)
@given(plans, st.integers(0, 60), st.integers(0, 12), st.data())
def test_the_shards_ahead_are_those_of_the_blocks_ahead(
    plan: LanePlan, step: int, steps_ahead: int, data: st.DataObject
) -> None:
    divisors = [
        world for world in range(1, plan.global_batch + 1) if plan.global_batch % world == 0
    ]
    world = data.draw(st.sampled_from(divisors))
    rank = data.draw(st.integers(0, world - 1))
    ends, share = np.cumsum(plan._sizes), plan.global_batch // world
    per_lane = plan.global_batch // plan.lanes
    needed: list[set[int]] = []
    for ahead in range(steps_ahead + 1):
        needed.append(set())
        for lane in range(rank * share // per_lane, -(-(rank + 1) * share // per_lane)):
            for place in range(lane * per_lane, (lane + 1) * per_lane):
                sample = plan.step(step + ahead)[1][place]
                block = [sample, *plan.substitutes(step + ahead, place)]
                needed[-1].update(np.searchsorted(ends, block, side="right").tolist())
    shards = plan.shards(step, rank, world, steps_ahead=steps_ahead).tolist()
    assert len(shards) == len(set(shards))
    assert set(shards) == set.union(*needed)
    for ahead in range(steps_ahead + 1):
        soon = set.union(*needed[: ahead + 1])
        assert set(shards[: len(soon)]) == soon


def test_substitutes_go_on_in_the_order_of_the_block() -> None:
    plan = LanePlan(np.array([10]), seed=0, lanes=1, block=5, global_batch=1)
    block = [int(plan.step(step)[1][0]) for step in range(5)]
    assert list(plan.substitutes(2, 0)) == [block[3], block[4], block[0], block[1]]


def test_what_one_epoch_leaves_over_another_visits_even_with_one_shard() -> None:
    plan = LanePlan(np.array([11]), seed=0, lanes=4, block=3, global_batch=4)
    left = [set(range(11)) - set(visited) for visited in epochs_of(plan, 8).values()]
    assert len(set(map(frozenset, left))) > 1
    assert not set.intersection(*left)


def test_a_lane_reads_its_blocks_in_order_and_shuffles_within_them() -> None:
    plan = LanePlan(np.full(8, 8), seed=3, lanes=1, block=16, global_batch=16)
    order = np.concatenate([plan.step(step)[1] for step in range(4)])
    assert (np.diff(order) != 1).mean() > 0.8
    for step in range(4):
        assert len(set(plan.step(step)[1] // 8)) <= 3


def test_permutations_are_uniform() -> None:
    counts = np.zeros((4, 4))
    for seed in range(2000):
        plan = LanePlan(np.array([4]), seed=seed, lanes=1, block=4, global_batch=4)
        counts[plan.step(0)[1], range(4)] += 1
    assert abs(counts / 2000 - 0.25).max() < 0.05  # 5 standard deviations


def test_the_order_never_changes_between_versions() -> None:
    plan = LanePlan(np.array([3, 0, 7, 5]), seed=1, lanes=2, block=4, global_batch=6)
    assert plan.step(0)[1].tolist() == [2, 1, 3, 10, 9, 8]
    assert plan.step(2)[1].tolist() == [5, 8, 10, 13, 1, 2]
    assert plan.step(2)[0].tolist() == [0, 1, 1, 0, 1, 1]


def test_a_rank_of_a_large_run_reads_about_its_share_of_the_shards() -> None:
    plan = LanePlan(np.full(1000, 100), seed=0, lanes=64, block=512, global_batch=64)
    world = 16
    steps = plan.lane_samples
    shards = np.unique([plan.rank_slice(step, 3, world)[1] // 100 for step in range(steps)])
    assert len(shards) <= 1000 / world + 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lanes": 3}, "data.lanes=3 does not divide train.global_batch_size=8"),
        ({"lanes": 8}, "data.lanes: 8 lanes, but only 5 samples"),
        ({"block": 0}, "data.shuffle_block"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(options: dict[str, int], message: str) -> None:
    defaults = {"seed": 0, "lanes": 1, "block": 4, "global_batch": 8}
    with pytest.raises(ValueError, match=message):
        LanePlan(np.array([2, 3]), **(defaults | options))
