"""Skipped data, spikes, and what the ranks report of themselves before the first step."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.config import GuardsConfig
from trainer.train.guards import MEDIAN_LOSSES, MIN_LOSSES, SpikeGuard
from trainer.train.preflight import RankFacts, disagreements


def guard(window: int = 3) -> SpikeGuard:
    return SpikeGuard(GuardsConfig(spike_factor=3.0, spike_window=window))


def test_a_spike_is_out_of_proportion_to_the_median_of_what_came_before() -> None:
    spikes = guard()
    assert not any(spikes.is_spike(1.0 + step / 100) for step in range(MIN_LOSSES))
    assert not spikes.is_spike(3.2)
    assert spikes.is_spike(3.4)
    assert not guard().is_spike(1e9)  # nothing is known yet


def test_what_is_usual_moves_along() -> None:
    spikes = guard()
    for _ in range(MIN_LOSSES):
        spikes.is_spike(1.0)
    for _ in range(MEDIAN_LOSSES):
        spikes.is_spike(10.0)
    assert not spikes.is_spike(20.0)


def trained(spikes: SpikeGuard, steps: int) -> list[int]:
    return [spikes.data_step(step) for step in range(steps)]


def test_the_window_of_a_spike_is_skipped_and_no_other_step() -> None:
    spikes = guard(window=3)
    before = spikes.state()
    assert spikes.first_bad_step(7) == 5
    assert spikes.rewind(7, before) == "data steps 5 to 7"
    assert trained(spikes, 7) == [0, 1, 2, 3, 4, 8, 9]
    # the next spike is at step 6, on data step 9; its window covers the first one
    spikes.rewind(6, before)
    assert trained(spikes, 6) == [0, 1, 2, 3, 10, 11]


@given(
    st.integers(1, 6),
    st.lists(st.integers(0, 40), max_size=8),
)
def test_windows_never_come_back_and_every_other_step_is_trained_once_in_order(
    window: int, rewinds: list[int]
) -> None:
    spikes = guard(window)
    start = spikes.state()
    gone: set[int] = set()
    for spike in rewinds:
        first = spikes.first_bad_step(spike)
        seen = {spikes.data_step(step) for step in range(first, spike + 1)}
        gone |= set(range(min(seen), max(seen) + 1))
        spikes.rewind(spike, start)
        steps = trained(spikes, 100)
        assert steps == [step for step in range(max(steps) + 1) if step not in gone]
        resumed = guard(window)
        resumed.load(spikes.state())
        assert trained(resumed, 100) == steps


FACTS = RankFacts(
    host="node1",
    device="NVIDIA H100",
    device_id="a",
    versions={"torch": "2.14.1", "numpy": "2.4.6"},
    config="c",
    problem="",
)


def test_ranks_that_agree_have_nothing_to_say() -> None:
    assert list(disagreements([FACTS, replace(FACTS, device_id="b")])) == []
    assert list(disagreements([FACTS, replace(FACTS, host="node2")])) == []
    cpu = replace(FACTS, device="CPU", device_id="")
    assert list(disagreements([cpu, cpu])) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"device": "NVIDIA A100"}, "has NVIDIA A100, but rank 0 on node1 has NVIDIA H100"),
        ({"versions": {"torch": "2.13.0", "numpy": "2.4.6"}}, "torch 2.13.0 and not 2.14.1"),
        ({"versions": {"torch": "2.14.1"}}, "numpy None and not 2.4.6"),
        ({"config": "d"}, "has another config"),
        ({"problem": "data.latents: gone"}, "data.latents: gone"),
        ({"host": "node1"}, "shares its GPU with rank 0"),
    ],
)
def test_what_differs_is_named_with_its_rank(change: dict[str, object], words: str) -> None:
    other = replace(replace(FACTS, host="node2"), **change)
    (line,) = disagreements([FACTS, other])
    assert line.startswith(f"rank 1 on {other.host}")
    assert words in line
