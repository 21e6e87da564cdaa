"""Copies to a simulated GPU: their order, and what waits for them."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tests.support.host_waits import HostWaits
from trainer.train.feed import Feed
from trainer.train.task import shapes_only

GPU = torch.device("cuda", 0)


class Gpu:
    """Stands in for torch.cuda, and notes what happens in its streams: `events`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        self.current = "compute"
        noted = self.events

        class Stream:
            def __init__(self, device: torch.device, name: str = "copies") -> None:
                self.name = name

            def wait_event(self, event: "Event") -> None:
                noted.append(f"{self.name} waits for {event.after}")

        class Event:
            def record(self, stream: Stream) -> None:
                self.after = noted[-1]

        @contextmanager
        def entered(stream: Stream) -> Generator[None]:
            before, self.current = self.current, stream.name
            yield
            self.current = before

        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "stream", entered)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream(GPU, self.current))


class Watched(torch.Tensor):
    """A tensor that notes its copies and its users; `gpu` is set by the test."""

    gpu: Gpu

    def to(self, *place: Any, **how: Any) -> Any:
        assert place == (GPU,)
        assert how == {"non_blocking": True}
        self.gpu.events.append(f"copy {int(self[0])} in {self.gpu.current}")
        return self

    def record_stream(self, s: Any) -> None:
        self.gpu.events.append(f"{s.name} uses {int(self[0])}")


def test_each_micro_batch_is_copied_while_the_one_before_is_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = Watched.gpu = Gpu(monkeypatch)
    batches = [
        shapes_only(images=torch.full((1,), value).as_subclass(Watched)) for value in range(3)
    ]
    for number, batch in enumerate(Feed(GPU).copied(batches)):
        gpu.events.append(f"work on {number}")
        assert batch.arrays["images"].tolist() == [number]
    expected = ["copy 0 in copies"]
    for number in range(3):
        expected += [f"copy {number + 1} in copies"] * (number < 2)
        expected += [
            f"compute waits for copy {number} in copies",
            f"compute uses {number}",
            f"work on {number}",
        ]
    assert gpu.events == expected


def test_a_cpu_gets_the_batches_themselves() -> None:
    batches = [shapes_only(images=torch.zeros(2)) for _ in range(3)]
    with HostWaits() as counted:
        assert all(
            a is b for a, b in zip(Feed(torch.device("cpu")).copied(batches), batches, strict=True)
        )
    assert not counted.places
