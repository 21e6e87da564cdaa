"""Averages of a logging interval: losses over all ranks, and where the time went."""

import resource
import time
from collections import defaultdict

import torch

from trainer.distributed import Ranks
from trainer.engine import StepResult
from trainer.tasks import Loss

GIB = 2**30


class Meter:
    """Collects on the device, without waiting for it, and reduces once an interval."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._reset()

    def _reset(self) -> None:
        self._sums = defaultdict(lambda: self._tensor([0.0, 0.0]))
        self._steps = self._images = 0
        self._wait_s = 0.0
        self._start_s = time.perf_counter()

    def waited(self, seconds: float) -> None:
        """The loop stood still this long for data."""
        self._wait_s += seconds

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
        """Go on with the sums of an interval that a stop cut in two."""
        if self._ranks.is_main:
            for name, pair in state.items():
                self._sums[name] = self._tensor(pair)

    def values(self) -> dict[str, float]:
        """The interval's metrics by name; collective. A new interval begins."""
        seconds = time.perf_counter() - self._start_s
        rate = self._images / seconds
        values = {name: total / count for name, (total, count) in self.state().items() if count}
        values |= {
            "optim/lr": self._last.lr,
            "optim/grad_norm": self._last.grad_norm,
            "throughput/images_per_s": rate,
            "throughput/images_per_s_per_device": rate / self._ranks.world_size,
            "time/step_s": seconds / self._steps,
            "time/data_wait_pct": 100 * self._wait_s / seconds,
            "memory/max_allocated_gib": self._memory_gib(),
        }
        self._reset()
        return values

    def _tensor(self, pair: list[float]) -> torch.Tensor:
        return torch.tensor(pair, dtype=torch.float64, device=self._ranks.device)

    def _memory_gib(self) -> float:
        if self._ranks.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / GIB
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
