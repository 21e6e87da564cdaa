"""The rule by which a global batch is divided, in the one place that states it."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.order.batches import Share, batch_problems, check_batch
from tests.support.paths import ROOT

SIZES = st.integers(1, 64)


@given(SIZES, SIZES, SIZES, SIZES)
def test_a_batch_is_sound_when_every_rank_and_lane_gets_whole_parts(
    ranks: int, micro_batch: int, steps: int, lanes: int
) -> None:
    whole = ranks * micro_batch * steps
    assert batch_problems(whole, ranks=ranks, micro_batch=micro_batch) == []
    assert bool(batch_problems(whole, lanes=lanes)) == (whole % lanes > 0)
    share = Share(seed=0, world=ranks, global_batch=whole, micro_batch=micro_batch)
    assert (share.samples, share.grad_accum_steps) == (micro_batch * steps, steps)


@given(SIZES, SIZES, SIZES)
def test_what_does_not_divide_is_refused_everywhere(
    total: int, ranks: int, micro_batch: int
) -> None:
    problems = batch_problems(total, ranks=ranks, micro_batch=micro_batch)
    assert len(problems) == (total % (ranks * micro_batch) > 0)
    if problems:
        with pytest.raises(ValueError, match=r"train\.global_batch_size=\d+ does not divide into"):
            check_batch(total, ranks=ranks, micro_batch=micro_batch)
        with pytest.raises(ValueError, match="does not divide into"):
            Share(seed=0, world=ranks, global_batch=total, micro_batch=micro_batch)


@given(SIZES, SIZES, SIZES)
def test_the_fix_that_is_named_helps(total: int, ranks: int, micro_batch: int) -> None:
    for problem in batch_problems(total, ranks=ranks, micro_batch=micro_batch):
        number = int(problem.rpartition("=" if "set train" in problem else " ")[2])
        if "set train.micro_batch_size" in problem:
            assert number <= micro_batch
            assert batch_problems(total, ranks=ranks, micro_batch=number) == []
        else:
            assert batch_problems(number, ranks=ranks) == []


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(ValueError) as caught:
        check_batch(8, ranks=3, lanes=5)
    assert str(caught.value) == (
        "train.global_batch_size=8 does not divide into 3 ranks: set it to a multiple, such as 9; "
        "data.lanes=5 does not divide train.global_batch_size=8"
    )


@pytest.mark.parametrize(("total", "micro", "lanes"), [(0, 1, 1), (8, 0, 1), (8, 1, -1)])
def test_sizes_below_one_are_refused(total: int, micro: int, lanes: int) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        check_batch(total, micro_batch=micro, lanes=lanes)


def test_the_rule_is_at_hand_before_torch_or_numpy() -> None:
    code = "import sys, data.order.batches; print({'torch', 'numpy'} & set(sys.modules))"
    words = [sys.executable, "-c", code]
    assert subprocess.run(words, cwd=ROOT, capture_output=True, text=True).stdout == "set()\n"
