"""Snapshots of the power-function averages, of which trainer.ema makes averages of other widths.

They lie in run.dir/ema/snapshots, in the format of checkpoints and apart from them: small, and all
of them stay. One at every 1/32 of the training is plenty (tests/unit/trainer/test_averages.py).
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.averages import PowerFunction, average_kind
from trainer.checkpoint_writer import CheckpointWriter
from trainer.config import Config, SnapshotPrecision
from trainer.distributed import Ranks
from trainer.engine import Engine
from trainer.retention import EVERYTHING

DTYPES = {SnapshotPrecision.fp16: torch.float16, SnapshotPrecision.fp32: torch.float32}


def snapshot_folder(config: Config) -> Path:
    """Where a run's snapshots lie."""
    return Path(config.run.dir) / "ema" / "snapshots"


class Snapshots:
    """Takes them every ema.snapshot_every steps and at the end; none where that is 0.

    step: where the run goes on from.
    """

    def __init__(self, config: Config, ranks: Ranks, step: int) -> None:
        self._config = config
        self._writer = (
            CheckpointWriter(snapshot_folder(config), ranks, EVERYTHING, step)
            if config.ema.snapshot_every
            else None
        )

    def take(self, step: int, engine: Engine, about: Callable[[], dict[str, Any]]) -> None:
        """Take one of `engine` after optimizer step `step`, if it is due; collective.

        about: what its reader must know beside.
        """
        every, last = self._config.ema.snapshot_every, self._config.train.max_steps
        if self._writer is None or (step % every and step != last):
            return
        names = [PowerFunction(sigma_rel).name for sigma_rel in self._config.ema.sigma_rels]
        kinds = [average_kind(name) for name in names]
        dtype = DTYPES[self._config.ema.snapshot_precision]

        def tensors() -> Iterator[tuple[str, str, Tensor]]:
            for kind, name, tensor in engine.tensors(kinds):
                yield kind, name, tensor.to(dtype)

        num_bytes = engine.num_bytes(kinds) * dtype.itemsize // torch.float32.itemsize
        buffers = {f"buffer/{name}": value for name, value in engine.module.named_buffers()}
        state = {**about(), "step": step, "averages": names, "updates": engine.adam_steps()}
        self._writer.save(step, tensors(), num_bytes, buffers, state)

    def wait(self) -> None:
        """Return when nothing is being written here."""
        if self._writer is not None:
            self._writer.wait()

    def finish(self) -> None:
        """Wait for the last one; raises OSError on every rank if it could not be written."""
        if self._writer is not None:
            self._writer.finish()
