"""Training tasks: their modules, data, turns of a training step, and evaluations."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data.streams.stream import Batch, Stream
from trainer.config import TrainConfig
from trainer.metrics.result import Evaluation
from trainer.runtime.progress import Stopping

Weights = dict[str, Tensor]
"""A state dict of full fp32 tensors."""


@dataclass(frozen=True, slots=True)
class Loss:
    """The loss of a micro batch, with the numbers to log."""

    mean: Tensor
    """Scalar to differentiate."""
    sums: dict[str, tuple[Tensor, Tensor]]
    """Metric name → (sum, count) over the micro batch; the meter adds these up."""


@dataclass(frozen=True, slots=True)
class Trained:
    """A module with its own optimizer."""

    module: nn.Module
    averaged: bool = False
    """Whether averages (EMA) of its weights are kept. Exactly one module of a task is averaged, and
    evaluated."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One optimizer's part of one training step.

    Each step has new turns, so state that `loss` and `close` share belongs to this step alone.
    """

    module_name: str
    """Name of the module that this turn trains."""
    loss: Callable[[nn.Module, Batch], Loss]
    """Computes the loss of one micro batch with the module, or the engine around it.

    The loop calls it once for each micro batch of the step, in the same order in every turn, and
    differentiates each loss before the next call."""
    close: Callable[[], None] | None = None
    """Called after the last micro batch, before the optimizer steps; collective."""


class TrainingTask(ABC):
    """A task that the loop can train."""

    stream: Stream
    trained: Mapping[str, Trained]
    kernels: Mapping[str, str] = MappingProxyType({})
    """Names of chosen kernels by what they compute, for the run folder."""

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The trained modules by name."""
        return {name: trained.module for name, trained in self.trained.items()}

    @property
    def averaged(self) -> str:
        """The name of the one module that is averaged."""
        (name,) = (name for name, trained in self.trained.items() if trained.averaged)
        return name

    @abstractmethod
    def turns(self, step: int) -> Sequence[Turn]:
        """Return the turns of optimizer step `step` (from 0), in order."""

    @abstractmethod
    def evaluate(
        self, weights: Weights, stopping: Stopping, *, baselines: bool
    ) -> Evaluation | None:
        """Measure averaged weights; collective, without effect on the training.

        stopping: to be called between batches; if it returns true, return None.
        baselines: whether to add numbers that do not depend on the weights, such as the distance of
        real images; set once in a run.
        """

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return the state of the task for checkpoints, as JSON values."""

    @abstractmethod
    def load(self, state: dict[str, Any]) -> None:
        """Restore a state from `state`.

        Raises: ValueError naming the config path if this config cannot resume from it.
        """

    def begin_with(self, state: dict[str, Any]) -> None:
        """Take from the state of another run whatever its weights need; the default is nothing."""
        return

    @abstractmethod
    def finish(self, averaged: Callable[[], Weights], folder: Path) -> str:
        """Write the result of a run into `folder`; return a line that names it; collective.

        averaged: gathers all averaged weights on every rank; collective.
        """


@dataclass(frozen=True, slots=True)
class Frozen:
    """Frozen networks that run beside the trained one."""

    parameters: int = 0
    """Number of parameters of the first stage and a frozen conditioner."""
    bytes: int = 0
    """Bytes of those that are on the device while it trains: a conditioner that runs in
    training."""
    flops_per_image: int = 0
    """FLOPs of a frozen conditioner; 0 if it does not run in training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """A training step without data and weights, which `trainer.plan` traces."""

    build_module: Callable[[], nn.Module]
    """Builds the averaged module with untrained weights."""
    loss: Callable[[nn.Module, int], Tensor]
    """Maps (module, micro batch size) to the mean loss on inputs that have shapes only."""
    frozen: Frozen
    sample_bytes: int
    """Largest size of a training sample in its shard, in bytes."""
    checkpointing: bool
    """Whether activation checkpointing is a choice."""
    not_counted: Sequence[str] = ()
    """Names of parts that the plan does not count."""


def memory_format(config: TrainConfig) -> torch.memory_format:
    """Return the memory format of a network's input, from train.channels_last."""
    return torch.channels_last if config.channels_last else torch.contiguous_format


def as_sums(numbers: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Turn means over a micro batch into the sums of a Loss, with `train/` before their names."""
    return {
        f"train/{name}": (number.detach(), torch.ones_like(number))
        for name, number in numbers.items()
    }


def shapes_only(**arrays: Tensor) -> Batch:
    """Make a batch of these arrays; its captions `0` are valid as text and as class number."""
    (size,) = {len(array) for array in arrays.values()}
    return Batch(
        epoch=np.zeros(size, np.int64),
        index=np.arange(size, dtype=np.int64),
        keys=[""] * size,
        captions=["0"] * size,
        arrays=arrays,
    )
