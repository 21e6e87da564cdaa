"""Averages of a logging interval: losses over all ranks, and where the time went."""

import resource
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from trainer.config import Precision
from trainer.devices import peak_flops_per_s
from trainer.distributed import Ranks
from trainer.engine import StepResult
from trainer.tasks import Loss

GIB = 2**30


class Meter:
    """Collects on the device, without waiting for it, and reduces once an interval."""

    def __init__(self, ranks: Ranks, precision: Precision) -> None:
        self._ranks = ranks
        self._peak_flops_per_s = peak_flops_per_s(ranks.device, precision)
        self.flops_per_image = 0.0
        """Of a forward and backward pass, once they have been counted."""
        self._reset()

    def _reset(self) -> None:
        self._sums = defaultdict(lambda: self._tensor([0.0, 0.0]))
        self._steps = self._images = 0
        self._wait_s = 0.0
        self._forward = Stopwatch(self._ranks.device)
        self._start_s = time.perf_counter()

    def waited(self, seconds: float) -> None:
        """The loop stood still this long for data."""
        self._wait_s += seconds

    def forwards(self, losses: Iterator[Loss]) -> Iterator[Loss]:
        """Pass losses on, and measure how long each takes to compute.

        Forward passes alone tell a slow rank: in the backward pass, which holds the collectives,
        all ranks take as long as the slowest. (Those of ZeRO stage 3 gather weights, too.)
        """
        while True:
            with self._forward.running():
                loss = next(losses, None)
            if loss is None:
                return
            yield loss

    def loss(self, loss: Loss) -> None:
        """One micro batch."""
        for name, pair in loss.sums.items():
            self._sums[name] += torch.stack(pair).double()

    def step(self, result: StepResult, images: int) -> None:
        """One optimizer step over `images` samples of all ranks."""
        self._sums["optim/skipped_share"] += self._tensor([float(not result.applied), 1.0])
        self._last = result
        self._steps += 1
        self._images += images

    def exclude(self, seconds: float) -> None:
        """This much of the interval was no training."""
        self._start_s += seconds

    def state(self) -> dict[str, list[float]]:
        """The interval's sums so far, over all ranks, for a checkpoint; collective."""
        sums = {name: value.clone() for name, value in self._sums.items()}
        self._ranks.sum_(sums)
        return {name: value.tolist() for name, value in sums.items()}

    def load(self, state: dict[str, list[float]]) -> None:
        """Go on with the sums of an interval that a stop or a rewind cut in two."""
        self._reset()
        if self._ranks.is_main:
            for name, pair in state.items():
                self._sums[name] = self._tensor(pair)

    def values(self) -> dict[str, float]:
        """The interval's metrics by name; collective. A new interval begins."""
        seconds = time.perf_counter() - self._start_s
        rate = self._images / seconds
        forward_s, wait_s = self._of_all_ranks(self._forward.total_s(), self._wait_s)
        values = {name: total / count for name, (total, count) in self.state().items() if count}
        values |= {
            "optim/lr": self._last.lr,
            "optim/grad_norm": self._last.grad_norm,
            "throughput/images_per_s": rate,
            "throughput/images_per_s_per_device": rate / self._ranks.world_size,
            "time/step_s": seconds / self._steps,
            "time/data_wait_pct": 100 * sum(wait_s) / len(wait_s) / seconds,
            "time/data_wait_max_pct": 100 * max(wait_s) / seconds,
            "time/data_wait_max_rank": wait_s.index(max(wait_s)),
            "time/forward_s": sum(forward_s) / len(forward_s) / self._steps,
            "time/slowest_rank": forward_s.index(max(forward_s)),
            "time/slowest_rank_ratio": max(forward_s) * len(forward_s) / max(sum(forward_s), 1e-9),
            "memory/max_allocated_gib": self._memory_gib(),
        }
        if self._peak_flops_per_s is not None and self.flops_per_image:
            flops_per_s = self.flops_per_image * rate / self._ranks.world_size
            values["throughput/mfu_pct"] = 100 * flops_per_s / self._peak_flops_per_s
        self._reset()
        return values

    def _of_all_ranks(self, *values: float) -> list[list[float]]:
        """Each value of every rank; collective."""
        table = torch.zeros(len(values), self._ranks.world_size, dtype=torch.float64)
        table[:, self._ranks.rank] = torch.tensor(values, dtype=torch.float64)
        self._ranks.sum_({"table": table})
        return table.tolist()

    def _tensor(self, pair: list[float]) -> torch.Tensor:
        return torch.tensor(pair, dtype=torch.float64, device=self._ranks.device)

    def _memory_gib(self) -> float:
        if self._ranks.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / GIB
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


class Stopwatch:
    """Adds up how long the device is busy with pieces of work, without waiting for any of them."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._total_s = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count what is inside."""
        if self._cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._events.append((start, end))
        else:
            start_s = time.perf_counter()
            yield
            self._total_s += time.perf_counter() - start_s

    def total_s(self) -> float:
        """So far; waits for the device."""
        for start, end in self._events:
            end.synchronize()
            self._total_s += start.elapsed_time(end) / 1000
        self._events.clear()
        return self._total_s
