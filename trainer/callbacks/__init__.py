"""Where a run's numbers and pictures go. Rank 0 alone has callbacks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from trainer.evaluations import Values


class Callback(Protocol):
    """Told of everything that is worth showing; never changes the training."""

    def metrics(self, step: int, values: Values) -> None:
        """Numbers, and names of protocols, after optimizer step `step`, such as train/loss."""
        ...

    def picture(self, step: int, path: Path) -> None:
        """A PNG of samples or reconstructions after optimizer step `step`."""
        ...

    def rewound(self, step: int) -> None:
        """The run has gone back to the end of step `step`: what was said of later ones is void."""
        ...

    def close(self) -> None:
        """The run ends, whether done or stopped early."""
        ...


class Callbacks:
    """All of them, told in turn."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._callbacks = callbacks

    def metrics(self, step: int, values: Values) -> None:
        """See Callback."""
        for callback in self._callbacks:
            callback.metrics(step, values)

    def picture(self, step: int, path: Path) -> None:
        """See Callback."""
        for callback in self._callbacks:
            callback.picture(step, path)

    def rewound(self, step: int) -> None:
        """See Callback."""
        for callback in self._callbacks:
            callback.rewound(step)

    def close(self) -> None:
        """See Callback."""
        for callback in self._callbacks:
            callback.close()
