"""Callbacks, which show or send a run's numbers and pictures. Rank 0 alone has them.

A new callback is a file in this folder and an entry in CALLBACKS.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.callbacks.callback import Callback, Start
from trainer.callbacks.console import Console
from trainer.callbacks.jsonl import open_jsonl
from trainer.callbacks.wandb import open_wandb
from trainer.runs.evaluations import Values
from trainer.runs.outages import Outages


@dataclass(frozen=True, slots=True)
class CallbackEntry:
    """A kind of callback."""

    open: Callable[[Start], Callback | None]
    """Makes the callback; returns None if the config turns it off."""
    sends_evaluations: bool = False
    """Whether its `close` sends the evaluations that ran as their own jobs."""


CALLBACKS = [
    CallbackEntry(lambda start: Console(start.step, start.config.train.max_steps)),
    CallbackEntry(open_jsonl),
    CallbackEntry(open_wandb, sends_evaluations=True),
]


class Callbacks:
    """All callbacks of a run, called in the order of CALLBACKS; a disk that fails ends no call.

    folder: the run folder, and outages: what says that it fails; both unused without callbacks.
    """

    def __init__(
        self,
        callbacks: Sequence[Callback] = (),
        folder: Path = Path(),
        outages: Outages | None = None,
    ) -> None:
        self._callbacks, self._folder = callbacks, folder
        self._outages = outages or Outages()

    @classmethod
    def open(cls, start: Start) -> "Callbacks":
        """Open the callbacks that the config does not turn off."""
        opened = [made for entry in CALLBACKS if (made := entry.open(start)) is not None]
        return cls(opened, start.folder, start.files.outages)

    def metrics(self, step: int, values: Values) -> None:
        """Pass numbers of step `step` to every callback."""
        self._each(lambda callback: callback.metrics(step, values))

    def picture(self, step: int, path: Path) -> None:
        """Pass a PNG of step `step` to every callback."""
        self._each(lambda callback: callback.picture(step, path))

    def rewound(self, step: int) -> None:
        """Tell every callback that the run went back to step `step`."""
        self._each(lambda callback: callback.rewound(step))

    def close(self) -> None:
        """Close every callback."""
        self._each(lambda callback: callback.close())

    def _each(self, tell: Callable[[Callback], None]) -> None:
        failed = False
        for callback in self._callbacks:
            try:
                tell(callback)
            except OSError as error:
                failed = True
                missed = f"{type(callback).__name__} misses numbers; the run goes on"
                self._outages.failed(self._folder, error, missed)
        if not failed:
            self._outages.written(self._folder)


def send_evaluations(start: Start) -> None:
    """Send the evaluations that ended after the training."""
    for entry in CALLBACKS:
        callback = entry.open(start) if entry.sends_evaluations else None
        if callback is not None:
            callback.close()
