"""Snapshots of the power-function averages, from which trainer.ema computes other widths.

They have the format of checkpoints, and all are kept in run.dir/ema/snapshots. One for every 1/32
of the training is enough (tests/unit/trainer/engine/test_averages.py).
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoints.reader import average_kind
from trainer.checkpoints.retention import EVERYTHING
from trainer.checkpoints.state import SnapshotState
from trainer.checkpoints.writer import CheckpointWriter
from trainer.config import Config, SnapshotPrecision
from trainer.engine.averages import power_function
from trainer.engine.engine import Engine
from trainer.runs.outages import Outages
from trainer.runs.paths import SNAPSHOTS
from trainer.runtime.ranks import Ranks

DTYPES = {SnapshotPrecision.fp16: torch.float16, SnapshotPrecision.fp32: torch.float32}


def snapshots_bytes(config: Config, engine: Engine) -> int:
    """Return the size of all snapshots of a run; 0 without snapshots."""
    if not config.ema.snapshot_every:
        return 0
    count = -(-config.train.max_steps // config.ema.snapshot_every)
    return count * _snapshot_bytes(config, engine)


def _snapshot_bytes(config: Config, engine: Engine) -> int:
    kinds = [average_kind(name) for name in _names(config)]
    dtype = DTYPES[config.ema.snapshot_precision]
    return engine.num_bytes(kinds) * dtype.itemsize // torch.float32.itemsize


def _names(config: Config) -> list[str]:
    """Return the names of the averages in a snapshot."""
    return [power_function(sigma_rel).name for sigma_rel in config.ema.sigma_rels]


class Snapshots:
    """Takes snapshots every ema.snapshot_every steps and at the end; none if that is 0.

    step: the optimizer step at which the run starts or resumes.
    """

    def __init__(self, config: Config, ranks: Ranks, step: int, outages: Outages) -> None:
        self._config = config
        self._writer = (
            CheckpointWriter(
                Path(config.run.dir) / SNAPSHOTS, ranks, EVERYTHING, step, outages=outages
            )
            if config.ema.snapshot_every
            else None
        )

    def take(self, step: int, engine: Engine, shared: Callable[[], Mapping[str, Any]]) -> None:
        """Take a snapshot of `engine` after optimizer step `step`, if it is due; collective.

        shared: returns the fields of WeightsState that do not come from the engine.
        """
        every, last = self._config.ema.snapshot_every, self._config.train.max_steps
        if self._writer is None or (step % every and step != last):
            return
        names = _names(self._config)
        kinds = [average_kind(name) for name in names]
        dtype = DTYPES[self._config.ema.snapshot_precision]

        def tensors() -> Iterator[tuple[str, str, Tensor]]:
            for kind, name, tensor in engine.tensors(kinds):
                yield kind, name, tensor.to(dtype)

        num_bytes = _snapshot_bytes(self._config, engine)
        buffers = {f"buffer/{name}": value for name, value in engine.module.named_buffers()}
        updates = engine.adam_steps()
        state = SnapshotState(step=step, averages=names, updates=updates, **shared())
        self._writer.save(step, tensors(), num_bytes, buffers, state)

    def go_back(self, step: int) -> None:
        """Remove the snapshots after this step, because the run has gone back to it; collective."""
        if self._writer is not None:
            self._writer.remove_after(step)

    def wait(self) -> None:
        """Wait until no snapshot is being written."""
        if self._writer is not None:
            self._writer.wait()

    def finish(self, patience_s: float) -> None:
        """Wait for the last snapshot, for at most `patience_s` after a failed attempt to write it.

        Raises: OSError on every rank if it cannot be written.
        """
        if self._writer is not None:
            self._writer.finish(patience_s)
