"""The engines of all modules of a task, saved to one checkpoint and loaded from one."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from trainer.checkpoints.reader import Checkpoint, average_kind
from trainer.config import Config
from trainer.engine.averages import averages
from trainer.engine.engine import Engine
from trainer.engine.zero import ADAM_MOMENTS
from trainer.runtime.ranks import Ranks


def checkpoint_layout(
    modules: Mapping[str, nn.Module], averaged: str, config: Config
) -> dict[str, torch.Size]:
    """Return the shapes of all tensors of a checkpoint, by kind/parameter name, without engines.

    modules: by name; averaged: name of the averaged module.
    """
    layout: dict[str, torch.Size] = {}
    for module_name, module in modules.items():
        kinds = ["weight", *ADAM_MOMENTS]
        if module_name == averaged:
            kinds += [average_kind(average.name) for average in averages(config.ema)]
        prefix = _prefix(module_name, averaged)
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                layout |= {f"{prefix}{kind}/{name}": parameter.shape for kind in kinds}
        for name, buffer in module.named_buffers():
            layout[f"{prefix}buffer/{name}"] = buffer.shape
    return layout


def _prefix(module_name: str, averaged: str) -> str:
    return "" if module_name == averaged else f"{module_name}."


class Engines:
    """An engine for each trained module; one module has averages of its weights.

    In a checkpoint, a kind of tensors such as `weight` is named `weight` for this averaged module,
    and `NAME.weight` for another module NAME.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        averaged: str,
        config: Config,
        ranks: Ranks,
    ) -> None:
        """modules: by name; averaged: name of the averaged module."""
        self._engines = {
            name: Engine(module, config, ranks, averaged=name == averaged)
            for name, module in modules.items()
        }
        self._prefixes = {name: _prefix(name, averaged) for name in modules}
        self.averaged = self._engines[averaged]
        """The engine whose averages are evaluated."""

    def load(self, checkpoint: Checkpoint) -> None:
        """Load weights, moments, averages and buffers from a checkpoint; collective."""
        adam_steps = checkpoint.training.adam_steps
        for name, engine in self._engines.items():
            prefix = self._prefixes[name]
            with checkpoint.reading(prefix) as read:
                engine.load(read, adam_steps[prefix.removesuffix(".")])
                for buffer, value in engine.module.named_buffers():
                    value.copy_(read("buffer", buffer))

    def __getitem__(self, module: str) -> Engine:
        return self._engines[module]

    def tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """Yield (kind, parameter name, copy of the full fp32 tensor) of all engines; collective."""
        for name, engine in self._engines.items():
            for kind, parameter, tensor in engine.tensors(engine.kinds):
                yield self._prefixes[name] + kind, parameter, tensor

    def num_bytes(self) -> int:
        """Return the size of all `tensors` over all ranks, in bytes."""
        return sum(engine.num_bytes(engine.kinds) for engine in self._engines.values())

    def buffers(self) -> dict[str, Tensor]:
        """Return the buffers of all modules, by kind/name."""
        return {
            f"{self._prefixes[name]}buffer/{buffer}": value
            for name, engine in self._engines.items()
            for buffer, value in engine.module.named_buffers()
        }

    def adam_steps(self) -> dict[str, int]:
        """Return the number of applied updates by module; the averaged module's name is empty."""
        return {
            self._prefixes[name].removesuffix("."): engine.adam_steps()
            for name, engine in self._engines.items()
        }
