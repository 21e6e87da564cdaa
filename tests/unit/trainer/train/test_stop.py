"""Requests to stop: all ranks get one answer, to a late question one call later."""

import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Barrier

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typing_extensions import override

from trainer.runtime.ranks import ALONE, PendingMaximum, Ranks
from trainer.train.stop import SIGNALS, StopRequest

WORLD = 3
CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def _handlers() -> Iterator[None]:
    """Put the handlers of signals back, which requests replace."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Meeting:
    """A place where threads compare numbers."""

    def __init__(self) -> None:
        self._values = [0.0] * WORLD
        self._barrier = Barrier(WORLD, timeout=60)

    def maximum(self, rank: int, value: float) -> float:
        self._values[rank] = value
        self._barrier.wait()
        found = max(self._values)
        self._barrier.wait()
        return found


@dataclass(frozen=True, slots=True)
class Threads(Ranks):
    """A rank in a thread."""

    meeting: Meeting = field(default_factory=Meeting)

    @override
    def maximum(self, value: float) -> float:
        return self.meeting.maximum(self.rank, value)

    @override
    def begin_maximum(self, value: float) -> PendingMaximum:
        return PendingMaximum(torch.tensor(self.maximum(value)), None)

    @override
    def for_thread(self) -> Ranks:
        return self


def answers(late: Sequence[bool], asking: int, call: int) -> list[list[bool]]:
    """The answers to every rank, where rank `asking` wants to stop at call number `call`."""
    meeting = Meeting()
    requests = [StopRequest(Threads(rank, WORLD, CPU, meeting=meeting)) for rank in range(WORLD)]

    def ask(rank: int) -> list[bool]:
        return [
            requests[rank].agreed(rank == asking and number == call, late=is_late)
            for number, is_late in enumerate(late)
        ]

    with ThreadPoolExecutor(WORLD) as pool:
        return list(pool.map(ask, range(WORLD)))


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.integers(0, WORLD - 1), st.data())
def test_all_ranks_stop_at_the_same_call(
    late: list[bool], asking: int, data: st.DataObject
) -> None:
    call = data.draw(st.integers(0, len(late) - 1))
    found = answers(late, asking, call)
    expected = [number == call + late[call] for number in range(len(late))]
    assert found == [expected] * WORLD


def test_a_rank_alone_stops_at_once() -> None:
    stop = StopRequest(ALONE)
    assert not stop.agreed(late=True)
    signal.raise_signal(signal.SIGTERM)
    assert stop.agreed(late=True)
    assert stop.agreed()


def test_signals_that_come_together_print_no_stack_trace(
    capsys: pytest.CaptureFixture[str],
) -> None:
    stop = StopRequest(ALONE)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    for number in SIGNALS:
        signal.raise_signal(number)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    assert stop.agreed()
    assert {signal.getsignal(number) for number in SIGNALS} == {signal.SIG_IGN}
    assert capsys.readouterr().out.count("stopping after this step") == 1
