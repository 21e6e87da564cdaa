"""What a run does about steps that go wrong: gradients not finite, and losses that leap."""

import json
import math
import statistics
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from data.stream import Batch, Stream
from trainer.config import GuardsConfig
from trainer.distributed import Ranks

MEMORY = 100
"""Losses whose median says what is usual."""
MEMORY_LEAST = 20
NAMED = 5
"""Samples that a line names; the file has all."""


def end_together(ranks: Ranks, reason: str) -> NoReturn:
    """Leave on every rank, for a reason that all of them know, in one line of rank 0."""
    if ranks.is_main:
        print(f"error: {reason}", file=sys.stderr, flush=True)
    ranks.barrier()  # the launcher kills the others as soon as one is gone
    raise SystemExit(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Where a sample of a step lies."""

    rank: int
    shard: str
    key: str
    epoch: int


class Incidents:
    """incidents.jsonl of the run folder: what went wrong at which step, and with which samples."""

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self.path = folder / "incidents.jsonl"
        self._ranks = ranks

    def add(self, what: str, step: int, samples: Sequence[Sample] = (), **details: Any) -> None:
        """Write a line to the file and to the log; for all ranks to call, rank 0 does it."""
        if not self._ranks.is_main:
            return
        line = {"time": time.time(), "step": step, "what": what, **details}
        line["samples"] = [asdict(sample) for sample in samples]
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        more = f" Samples: {name(samples)}; {self.path} has all." if samples else ""
        print(f"warning: step {step}: {what}.{more}", file=sys.stderr, flush=True)


def name(samples: Sequence[Sample]) -> str:
    """The first few samples in words."""
    shown = ", ".join(f"{sample.key} in {sample.shard}" for sample in samples[:NAMED])
    return shown + (f" and {len(samples) - NAMED} more" if len(samples) > NAMED else "")


class FiniteGuard:
    """Counts the updates that gradients which are not finite prevent, and names their samples.

    The engine skips such an update on all ranks alike, and weights, moments and averages stay as
    they were. Losses stay on the device until something is wrong.
    """

    def __init__(
        self, config: GuardsConfig, stream: Stream, ranks: Ranks, incidents: Incidents
    ) -> None:
        self._limit = config.max_consecutive_skips
        self._stream, self._ranks, self._incidents = stream, ranks, incidents
        self._seen: list[tuple[Batch, Tensor]] = []
        self.total = self.in_a_row = 0

    def loss(self, batch: Batch, loss: Tensor) -> None:
        """A micro batch of this step, and its mean loss."""
        self._seen.append((batch, loss.detach()))

    def step(self, step: int, applied: bool) -> None:
        """Step `step` (from 1) is over. Collective where it was not applied.

        Raises: SystemExit past guards.max_consecutive_skips.
        """
        seen, self._seen = self._seen, []
        if applied:
            self.in_a_row = 0
            return
        self.total += 1
        self.in_a_row += 1
        broken = [batch for batch, loss in seen if not loss.isfinite().item()]
        own = (self._samples(broken), self._samples([batch for batch, _ in seen]))
        gathered = self._ranks.gather(own)
        # a backward pass can overflow from finite losses: then it may be any sample of the step
        samples = list(dict.fromkeys(sample for found, _ in gathered for sample in found))
        loss_finite = not samples
        if loss_finite:
            samples = list(dict.fromkeys(sample for _, found in gathered for sample in found))
        self._incidents.add(
            "gradients are not finite, the update is skipped",
            step,
            samples,
            loss_finite=loss_finite,
            skipped_in_a_row=self.in_a_row,
        )
        if self.in_a_row > self._limit:
            end_together(
                self._ranks,
                f"step {step}: {self.in_a_row} updates in a row were skipped, as gradients were "
                f"not finite, more than guards.max_consecutive_skips={self._limit}; last samples: "
                f"{name(samples)}; all are in {self._incidents.path}. Take bad samples out of the "
                "data, or lower optim.lr",
            )

    def state(self) -> dict[str, int]:
        """For a checkpoint."""
        return {"total": self.total, "in_a_row": self.in_a_row}

    def load(self, state: dict[str, int]) -> None:
        """Go on from what `state` gave."""
        self.total, self.in_a_row = state["total"], state["in_a_row"]

    def _samples(self, batches: Sequence[Batch]) -> list[Sample]:
        return [
            Sample(rank=self._ranks.rank, shard=shard, key=key, epoch=int(epoch))
            for batch in batches
            for shard, key, epoch in zip(
                self._stream.shard_names(batch.index), batch.keys, batch.epoch, strict=True
            )
        ]


class SpikeGuard:
    """Finds leaps of the loss, and keeps the data that led to them out of the run from then on.

    As Chowdhery et al. 2022 (PaLM), section 5.1: go back to a checkpoint before the spike, and on
    without the batches before it. What is skipped is part of the run's state, so that it resumes
    in the same order on any number of ranks.
    """

    def __init__(self, config: GuardsConfig) -> None:
        self._config = config
        self._losses: deque[float] = deque(maxlen=MEMORY)
        self._windows: list[tuple[int, int]] = []
        """Skipped steps of the plan, in order: first and number."""
        self._rewinds = 0

    @property
    def active(self) -> bool:
        """Whether anything is to be guarded against."""
        return self._config.spike_factor > 0

    @property
    def exhausted(self) -> bool:
        """Whether there have been guards.max_rewinds."""
        return self._rewinds >= self._config.max_rewinds

    def plan_step(self, step: int) -> int:
        """The step of the data's plan that optimizer step `step` (both from 0) trains on."""
        for first, count in self._windows:
            if step >= first:
                step += count
        return step

    def is_spike(self, loss: float) -> bool:
        """Whether this step's loss, over all ranks, is out of all proportion to those before."""
        usual = statistics.median(self._losses) if len(self._losses) >= MEMORY_LEAST else math.inf
        self._losses.append(loss)
        return loss > self._config.spike_factor * usual

    def first_bad_step(self, step: int) -> int:
        """Where the window of a spike at optimizer step `step` (both from 0) begins."""
        return max(step - self._config.spike_window + 1, 0)

    def rewind(self, step: int, state: dict[str, Any]) -> str:
        """Go back to a checkpoint's `state`, and skip the window of a spike at step `step`.

        Returns what is skipped, in words.
        """
        first, last = self.plan_step(self.first_bad_step(step)), self.plan_step(step)
        # windows since that checkpoint stay, but for those within the new one
        kept = [old for old in self._windows if not first <= old[0] <= last]
        self.load({**state, "windows": kept, "rewinds": self._rewinds + 1})
        self._windows = sorted([*kept, (first, last - first + 1)])
        return f"steps {first} to {last} of the data's plan"

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"losses": list(self._losses), "windows": self._windows, "rewinds": self._rewinds}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self._losses = deque(state["losses"], maxlen=MEMORY)
        self._windows = [(first, count) for first, count in state["windows"]]
        self._rewinds = state["rewinds"]
