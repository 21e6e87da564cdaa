"""The engines of all modules that a task trains: saved to one checkpoint, loaded from one."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from trainer.checkpoint import Checkpoint
from trainer.config import Config
from trainer.distributed import Ranks
from trainer.engine import Engine


class Engines:
    """An engine for each module, of which the first has averages of its weights.

    In a checkpoint the kinds of its tensors are called as the engine calls them (`weight`), those
    of another module `module.weight`.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        config: Config,
        ranks: Ranks,
    ) -> None:
        self._engines: dict[str, Engine] = {}
        self._prefixes: dict[str, str] = {}
        for name, module in modules.items():
            self._prefixes[name] = f"{name}." if self._engines else ""
            self._engines[name] = Engine(module, config, ranks, averaged=not self._engines)

    def load(self, checkpoint: Checkpoint) -> None:
        """Make weights, moments, averages and buffers those of a checkpoint; collective."""
        for name, engine in self._engines.items():
            prefix = self._prefixes[name]
            with checkpoint.reading(prefix) as read:
                engine.load(read, checkpoint.state[f"{prefix}adam_steps"])
                for buffer, value in engine.module.named_buffers():
                    value.copy_(read("buffer", buffer))

    @property
    def first(self) -> Engine:
        """The one that is averaged and evaluated."""
        return next(iter(self._engines.values()))

    def __getitem__(self, module: str) -> Engine:
        return self._engines[module]

    def tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """See Engine.tensors; collective."""
        for name, engine in self._engines.items():
            for kind, parameter, tensor in engine.tensors(engine.kinds):
                yield self._prefixes[name] + kind, parameter, tensor

    def num_bytes(self) -> int:
        """Of all `tensors`, over all ranks."""
        return sum(engine.num_bytes(engine.kinds) for engine in self._engines.values())

    def buffers(self) -> dict[str, Tensor]:
        """kind/name → buffer."""
        return {
            f"{self._prefixes[name]}buffer/{buffer}": value
            for name, engine in self._engines.items()
            for buffer, value in engine.module.named_buffers()
        }

    def state(self) -> dict[str, Any]:
        """What a checkpoint must say beside the tensors, as JSON values."""
        steps = {
            f"{self._prefixes[name]}adam_steps": engine.adam_steps()
            for name, engine in self._engines.items()
        }
        return {"averages": self.first.averages, **steps}
