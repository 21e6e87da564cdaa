"""Guards of a run against gradients that are not finite, loss spikes and damaged samples."""

import math
import statistics
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from data.shards.manifest import encode_ledger
from data.streams.quarantine import Quarantine
from data.streams.stream import Batch, Stream
from data.text import printable
from trainer.config import GuardsConfig
from trainer.runs.events import event_line
from trainer.runs.files import RunFiles
from trainer.runs.paths import HISTORY, INCIDENTS, QUARANTINE
from trainer.runtime.ranks import Ranks, end_together

MEDIAN_LOSSES = 100
"""Number of last losses whose median a spike exceeds."""
MIN_LOSSES = 20
"""Number of losses before which no loss is a spike."""
MAX_NAMED = 5
"""Largest number of samples in a line of the log; the file lists all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A sample of a step: its rank, shard, key and epoch."""

    rank: int
    shard: str
    key: str
    epoch: int


class Incidents:
    """incidents.jsonl of the run folder: the step and the samples of each incident."""

    def __init__(self, files: RunFiles, ranks: Ranks) -> None:
        self.path = files.folder / INCIDENTS
        self._files, self._ranks = files, ranks
        for name in (INCIDENTS, HISTORY):
            files.mend(name)

    def add(self, event: str, step: int, samples: Sequence[Sample] = (), **details: Any) -> None:
        """Append an incident to the file and print it; all ranks call this, rank 0 writes."""
        if not self._ranks.is_main:
            return
        listed = [asdict(sample) for sample in samples]
        self._files.append(INCIDENTS, event_line(event, step=step, **details, samples=listed))
        more = f" Samples: {list_names(samples)}; {self.path} has all." if samples else ""
        print(f"warning: step {step}: {event}.{more}", file=sys.stderr, flush=True)


def list_names(samples: Sequence[Sample]) -> str:
    """Return the names of the first MAX_NAMED samples, and the number of the others."""
    shown = ", ".join(
        f"{printable(sample.key)} in {sample.shard}" for sample in samples[:MAX_NAMED]
    )
    return shown + (f" and {len(samples) - MAX_NAMED} more" if len(samples) > MAX_NAMED else "")


class FiniteGuard:
    """Counts updates that were skipped for gradients that are not finite, and names their samples.

    The engine skips such an update on all ranks; weights, moments and averages do not change.
    Losses are copied from the device only after such an update.
    """

    def __init__(
        self, config: GuardsConfig, stream: Stream, ranks: Ranks, incidents: Incidents
    ) -> None:
        self._limit = config.max_consecutive_skips
        self._stream, self._ranks, self._incidents = stream, ranks, incidents
        self._seen: list[tuple[Batch, Tensor]] = []
        self.total = self.in_a_row = 0

    def loss(self, batch: Batch, loss: Tensor) -> None:
        """Record a micro batch of this step and its mean loss."""
        self._seen.append((batch, loss.detach()))

    def step(self, step: int, applied: bool) -> None:
        """End step `step` (from 1); collective if its update was not applied.

        Raises: SystemExit after more than guards.max_consecutive_skips skips in a row.
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
        # a backward pass can overflow from finite losses: any sample of the step can be the cause
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
                f"step {step}: {self.in_a_row} updates in a row skipped because gradients are "
                f"not finite, more than guards.max_consecutive_skips={self._limit}; last samples: "
                f"{list_names(samples)}; all are in {self._incidents.path}. Take bad samples "
                "out of the data, or lower optim.lr",
            )

    def state(self) -> dict[str, int]:
        """Return the guard's state for a checkpoint, as JSON values."""
        return {"total": self.total, "in_a_row": self.in_a_row}

    def load(self, state: dict[str, int]) -> None:
        """Restore the guard's state."""
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
    """Finds spikes of the loss, and skips the data before them.

    The run goes back to a checkpoint before the spike and skips a window of data (Chowdhery et al.
    2022, section 5.1). Windows are part of the run's state: a resumed run skips them on any number
    of ranks. Data steps count in the order of the data: without a skipped window, they are equal to
    optimizer steps.
    """

    def __init__(self, config: GuardsConfig) -> None:
        self._config = config
        self._losses: deque[float] = deque(maxlen=MEDIAN_LOSSES)
        self._windows: list[tuple[int, int]] = []
        """Skipped windows in order: first data step and number of steps."""
        self._rewinds = 0

    @property
    def active(self) -> bool:
        """Whether guards.spike_factor turns this guard on."""
        return self._config.spike_factor > 0

    @property
    def exhausted(self) -> bool:
        """Whether guards.max_rewinds rewinds were made."""
        return self._rewinds >= self._config.max_rewinds

    def data_step(self, step: int) -> int:
        """Return the data step of optimizer step `step` (both from 0)."""
        for first, count in self._windows:
            if step >= first:
                step += count
        return step

    def is_spike(self, loss: float) -> bool:
        """Add this step's mean loss over all ranks; return whether it is a spike."""
        median = statistics.median(self._losses) if len(self._losses) >= MIN_LOSSES else math.inf
        self._losses.append(loss)
        return loss > self._config.spike_factor * median

    def first_bad_step(self, step: int) -> int:
        """Return the first optimizer step of the window of a spike at step `step` (both from 0)."""
        return max(step - self._config.spike_window + 1, 0)

    def rewind(self, step: int, state: dict[str, Any]) -> str:
        """Load a checkpoint's `state`, and skip the window of a spike at optimizer step `step`.

        Returns the skipped window in words.
        """
        first, last = self.data_step(self.first_bad_step(step)), self.data_step(step)
        # the new window replaces older ones inside it
        kept = [old for old in self._windows if not first <= old[0] <= last]
        self.load({**state, "windows": kept, "rewinds": self._rewinds + 1})
        self._windows = sorted([*kept, (first, last - first + 1)])
        return f"data steps {first} to {last}"

    def state(self) -> dict[str, Any]:
        """Return the guard's state for a checkpoint, as JSON values."""
        return {"losses": list(self._losses), "windows": self._windows, "rewinds": self._rewinds}

    def load(self, state: dict[str, Any]) -> None:
        """Restore the guard's state."""
        self._losses = deque(state["losses"], maxlen=MEDIAN_LOSSES)
        self._windows = [(first, count) for first, count in state["windows"]]
        self._rewinds = state["rewinds"]


class QuarantineLedger:
    """quarantine.jsonl of the run folder: the damaged samples that any rank found."""

    def __init__(self, files: RunFiles, quarantine: Quarantine, ranks: Ranks) -> None:
        """quarantine: the quarantine of this rank's stream."""
        self._files, self._path = files, files.folder / QUARANTINE
        self._quarantine, self._ranks = quarantine, ranks

    def share(self) -> None:
        """Share the samples found since the last call with all ranks; write them; collective."""
        new = [item for items in self._ranks.gather(self._quarantine.fresh()) for item in items]
        self._quarantine.add(new)
        if new and self._ranks.is_main:
            self._files.replace(self._path, encode_ledger(self._quarantine.rejected))
            print(
                f"{len(self._quarantine)} bad samples replaced so far, listed in {self._path}; "
                f"the last: {new[-1]}",
                flush=True,
            )
