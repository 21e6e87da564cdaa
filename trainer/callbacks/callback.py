"""The base class of callbacks, and the facts about a start of a run that they get."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config import Config
from trainer.runs.evaluations import Values
from trainer.runs.files import RunFiles


@dataclass(frozen=True, slots=True)
class Start:
    """A start of a run, from its first step or from a checkpoint."""

    config: Config
    public_config: Mapping[str, Any]
    """The config as JSON values without secrets, from trainer.runs.record."""
    step: int
    """Optimizer steps taken before this start."""
    wandb_id: str
    """Id of the run in W&B, the same for every start."""
    files: RunFiles
    """The writer of the run folder."""
    evaluated: bool = True
    """Whether the evaluation at `step`, if one is due, was made before this start."""

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.run.dir)


class Callback:
    """Shows or sends a run's numbers and pictures; never changes the training.

    Only rank 0 has callbacks. A callback overrides the methods that it needs.
    """

    def metrics(self, step: int, values: Values) -> None:
        """Take numbers, and hashes of protocols, measured after optimizer step `step`."""

    def picture(self, step: int, path: Path) -> None:
        """Take a PNG of samples or reconstructions made after optimizer step `step`."""

    def rewound(self, step: int) -> None:
        """Forget all numbers of later steps than `step`: the run went back to it."""

    def close(self) -> None:
        """End the callback: the run is done or stops early."""
