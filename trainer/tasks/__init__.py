"""What one training step is, for each thing that can be trained."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from data.stream import Batch, Stream
from trainer.config import TrainConfig


@dataclass(frozen=True, slots=True)
class Loss:
    """The loss of a micro batch, and what it is worth logging of it."""

    mean: Tensor
    """Scalar to differentiate."""
    sums: dict[str, tuple[Tensor, Tensor]]
    """Metric name → (sum, count), so that any number of micro batches and ranks can be averaged."""


def memory_format(config: TrainConfig) -> torch.memory_format:
    """Of a network's input, which its convolutions pass on: train.channels_last."""
    return torch.channels_last if config.channels_last else torch.contiguous_format


def averaged(numbers: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Means over a micro batch by name (without `train/`), as sums for a Loss."""
    return {
        f"train/{name}": (number.detach(), torch.ones_like(number))
        for name, number in numbers.items()
    }


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Numbers by metric name (without `eval/`), and a picture of what the model can do."""

    metrics: Mapping[str, float | str]
    """`protocol` is the hash of how they were measured."""
    picture: Tensor
    """[3, H, W] uint8."""


class TrainingTask(Protocol):
    """Modules, their data and losses; the loop knows nothing else of what it trains."""

    @property
    def modules(self) -> dict[str, nn.Module]:
        """What is trained, by name, each with an optimizer of its own.

        The first is the one that has an EMA and is evaluated. The others serve it.
        """
        ...

    @property
    def stream(self) -> Stream:
        """Where its batches come from."""
        ...

    def state(self) -> dict[str, Any]:
        """What a checkpoint must say beside weights, as JSON values."""
        ...

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        ...

    def turns(self, step: int) -> Sequence[str]:
        """Names of the modules that optimizer step `step` (from 0) trains, one after the other."""
        ...

    def losses(
        self, name: str, model: nn.Module, micro_batches: Sequence[Batch], step: int
    ) -> Iterator[Loss]:
        """The loss of each micro batch in a module's turn at a step; `model` is what to call.

        Each is differentiated before the next is asked for; then the module's optimizer steps.
        Every turn of a step gets the same micro batches.
        """
        ...

    def baselines(self) -> dict[str, float]:
        """What no model can beat or should stay below, by metric name; measured once a run."""
        ...

    def evaluate(
        self, weights: dict[str, Tensor], stopping: Callable[[], bool]
    ) -> Evaluation | None:
        """Measure averaged weights; collective, and without effect on the training.

        `stopping` is collective, too, and may be asked between batches; None where it said yes.
        """
        ...

    def finish(self, weights: dict[str, Tensor], folder: Path) -> Iterator[str]:
        """Write what the run is for beside its checkpoints; yields lines to print."""
        ...
