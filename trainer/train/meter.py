"""Metrics of a logging interval: mean losses over all ranks, throughput, waits."""

import resource
import time
from collections import defaultdict
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager

import torch

from trainer.config import Precision
from trainer.engine.engine import StepResult
from trainer.runtime.devices import peak_flops_per_s
from trainer.runtime.ranks import Ranks
from trainer.train.task import Loss

GIB = 2**30
SKIPPED = "optim/skipped_share"


class Meter:
    """Adds up losses and times; waits for the device and the ranks once an interval."""

    def __init__(self, ranks: Ranks, precision: Precision) -> None:
        self._ranks = ranks
        self._peak_flops_per_s = peak_flops_per_s(ranks.device, precision)
        self.flops_per_image = 0.0
        """FLOPs of a sample's forward and backward pass; 0 until they are counted."""
        self._reset()

    def _reset(self) -> None:
        self._sums: defaultdict[str, torch.Tensor] = defaultdict(
            lambda: torch.zeros(2, dtype=torch.float64, device=self._ranks.device)
        )
        self._skipped = torch.zeros(2, dtype=torch.float64)
        """Number of skipped steps, and of all; on the CPU, where they are counted."""
        self._steps = self._images = 0
        self._wait_s = 0.0
        self._forward = Stopwatch(self._ranks.device)
        self._reset_peak()
        self._start_s = time.perf_counter()

    def waited(self, seconds: float) -> None:
        """Add the seconds of a wait for data."""
        self._wait_s += seconds

    def forward(self) -> AbstractContextManager[None]:
        """Return a context manager that measures the forward pass inside.

        Only forward passes show a slow rank: the backward pass has collectives, so all ranks take
        as long as the slowest. (At ZeRO stage 3 forward passes gather weights, too.)
        """
        return self._forward.running()

    def loss(self, loss: Loss) -> None:
        """Add the loss of one micro batch."""
        for name, pair in loss.sums.items():
            self._sums[name] += torch.stack(pair).double()

    def step(self, result: StepResult, images: int) -> None:
        """Add one optimizer step; images: number of samples over all ranks."""
        self._skipped += torch.tensor([not result.applied, True])
        self._last = result
        self._steps += 1
        self._images += images

    def exclude(self, seconds: float) -> None:
        """Exclude a pause, such as an evaluation, from the interval's throughput and memory."""
        self._start_s += seconds
        self._reset_peak()

    def state(self) -> dict[str, list[float]]:
        """Return {metric: [sum, count]} of the interval over all ranks; collective."""
        sums = {name: value.clone() for name, value in self._sums.items()}
        sums[SKIPPED] = self._skipped.clone()
        self._ranks.sum_(sums)
        found = {name: value.cpu().numpy().tolist() for name, value in sums.items()}
        if not found[SKIPPED][1]:
            del found[SKIPPED]
        return found

    def load(self, state: dict[str, list[float]]) -> None:
        """Restore the sums of an interval from `state`, after a stop or a rewind."""
        self._reset()
        for name, pair in state.items():
            # every rank has every name, because sums over ranks need it
            own = torch.tensor(pair if self._ranks.is_main else [0.0, 0.0], dtype=torch.float64)
            if name == SKIPPED:
                self._skipped = own
            else:
                self._sums[name] = own.to(self._ranks.device)

    def values(self) -> dict[str, float]:
        """Return the interval's metrics by name, and begin a new interval; collective."""
        seconds = time.perf_counter() - self._start_s
        rate = self._images / seconds
        forward_s, wait_s = self._of_all_ranks(self._forward.total_s(), self._wait_s)
        values = {name: total / count for name, (total, count) in self.state().items() if count}
        values |= {
            "optim/lr": self._last.lr,
            "optim/grad_norm": float(self._last.grad_norm),
            "throughput/images_per_s": rate,
            "throughput/images_per_s_per_device": rate / self._ranks.world_size,
            "time/step_s": seconds / self._steps,
            "time/data_wait_pct": 100 * sum(wait_s) / len(wait_s) / seconds,
            "time/data_wait_max_pct": 100 * max(wait_s) / seconds,
            "time/data_wait_max_rank": wait_s.index(max(wait_s)),
            "time/forward_s": sum(forward_s) / len(forward_s) / self._steps,
            "time/slowest_rank": forward_s.index(max(forward_s)),
            "time/slowest_rank_ratio": max(forward_s) * len(forward_s) / max(sum(forward_s), 1e-9),
            **self._peak_memory(),
        }
        if self._peak_flops_per_s is not None and self.flops_per_image:
            flops_per_s = self.flops_per_image * rate / self._ranks.world_size
            values["throughput/mfu_pct"] = 100 * flops_per_s / self._peak_flops_per_s
        self._reset()
        return values

    def _of_all_ranks(self, *values: float) -> list[list[float]]:
        """Return the list over all ranks of each value; collective."""
        table = torch.zeros(len(values), self._ranks.world_size, dtype=torch.float64)
        table[:, self._ranks.rank] = torch.tensor(values, dtype=torch.float64)
        self._ranks.sum_({"table": table})
        return table.numpy().tolist()

    def _peak_memory(self) -> dict[str, float]:
        """Return the peaks of the interval on a GPU, or of the process's whole life on a CPU.

        Reserved memory is that which torch holds: the allocated one, and gaps of fragmentation.
        """
        device = self._ranks.device
        if device.type != "cuda":
            resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            return {"memory/max_allocated_gib": resident / GIB}
        return {
            "memory/max_allocated_gib": torch.cuda.max_memory_allocated(device) / GIB,
            "memory/max_reserved_gib": torch.cuda.max_memory_reserved(device) / GIB,
        }

    def _reset_peak(self) -> None:
        if self._ranks.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._ranks.device)


class Stopwatch:
    """Adds up the seconds that the device works, without waiting for the work."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._total_s = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Generator[None]:
        """Measure the work inside."""
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
        """Wait for the device, and return the seconds so far."""
        for start, end in self._events:
            end.synchronize()
            self._total_s += start.elapsed_time(end) / 1000
        self._events.clear()
        return self._total_s
