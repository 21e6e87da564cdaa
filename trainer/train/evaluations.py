"""The evaluations that a training makes between its steps."""

from pathlib import Path

from trainer.callbacks import Callbacks
from trainer.config import Config
from trainer.engine.engine import Engine
from trainer.pictures.png import encode_png
from trainer.runs.evaluations import with_log_keys
from trainer.runs.files import RunFiles
from trainer.runs.paths import SAMPLES, step_name
from trainer.runtime.ranks import Ranks
from trainer.train.stop import StopRequest
from trainer.train.task import TrainingTask
from trainer.train.watchdog import Watchdog


class Evaluations:
    """Measures the averages of a run, and shows the numbers and a picture of the first average."""

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        task: TrainingTask,
        engine: Engine,
        files: RunFiles,
        watchdog: Watchdog,
    ) -> None:
        """engine: of the averaged module. files: the run folder's, used on rank 0."""
        self._folder, self._files = Path(config.run.dir), files
        self._ranks, self._task, self._engine, self._watchdog = ranks, task, engine, watchdog
        self._last: dict[int, dict[str, float | str]] = {}

    def at(self, step: int) -> dict[str, float | str]:
        """Return the numbers of the last evaluation if it was at `step`; otherwise none."""
        return self._last.get(step, {})

    def make(self, step: int, stop: StopRequest, callbacks: Callbacks) -> bool:
        """Measure every average after optimizer step `step`; collective.

        Returns False if a request to stop came: then no numbers are shown.
        """

        def stopping(phase: str) -> bool:
            self._watchdog.pause(phase, step)
            return stop.agreed()

        self._watchdog.pause("evaluation", step)
        values: dict[str, float | str] = {}
        for average in self._engine.averages:
            is_first = average == self._engine.averages[0]
            weights = self._engine.ema_weights(average)
            found = self._task.evaluate(weights, stopping, baselines=is_first and step == 0)
            if found is None:
                return False
            values |= with_log_keys(found.metrics, "" if is_first else average)
            for path, payload in found.files.items():
                self._files.replace(path, payload)
            if is_first and self._ranks.is_main:
                self._show(step, encode_png(found.picture, found.about), callbacks)
        self._last = {step: values}
        callbacks.metrics(step, values)
        return True

    def _show(self, step: int, picture: bytes, callbacks: Callbacks) -> None:
        """Write a picture, and hand it to the callbacks when it is there."""
        path = self._folder / SAMPLES / f"{step_name(step)}.png"
        self._files.replace(path, picture, lambda: callbacks.picture(step, path))
