"""What one training step is, for each thing that can be trained."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from data.stream import Batch, Stream


@dataclass(frozen=True, slots=True)
class Loss:
    """The loss of a micro batch, and what it is worth logging of it."""

    mean: Tensor
    """Scalar to differentiate."""
    sums: dict[str, tuple[Tensor, Tensor]]
    """Metric name → (sum, count), so that any number of micro batches and ranks can be averaged."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Numbers by metric name (without `eval/`), and a picture of what the model can do."""

    metrics: dict[str, float]
    picture: Tensor
    """[3, H, W] uint8."""


class TrainingTask(Protocol):
    """A module, its data and its loss; the loop knows nothing else of what it trains."""

    @property
    def module(self) -> nn.Module:
        """What the optimizer trains."""
        ...

    @property
    def stream(self) -> Stream:
        """Where its batches come from."""
        ...

    def state(self) -> dict[str, Any]:
        """What a checkpoint must say beside weights, as JSON values."""
        ...

    def loss(self, module: nn.Module, batch: Batch) -> Loss:
        """The loss of one micro batch."""
        ...

    def baselines(self) -> dict[str, float]:
        """What no model can beat or should stay below, by metric name; measured once a run."""
        ...

    def evaluate(self, weights: dict[str, Tensor]) -> Evaluation:
        """Measure averaged weights; collective, and without effect on the training."""
        ...

    def finish(self, weights: dict[str, Tensor], folder: Path) -> Iterator[str]:
        """Write what the run is for beside its checkpoints; yields lines to print."""
        ...
