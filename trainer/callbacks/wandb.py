"""Weights & Biases: a mirror of metrics.jsonl that may fail without harm."""

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import wandb

from trainer import evaluations
from trainer.config import RunConfig, WandbConfig, WandbMode
from trainer.evaluations import Values, as_logged


class Wandb:
    """Online, offline or, with `auto`, online where there is a key; the first failure ends it.

    It also sends the numbers of evaluations that were jobs of their own, each once: W&B loses rows
    of a run that two processes write to. Their steps lie behind the training's, which W&B's own
    step cannot; so the x axis is the logged value `step`.
    """

    def __init__(
        self, config: WandbConfig, run: RunConfig, about: Mapping[str, Any], run_id: str
    ) -> None:
        self._run: Any = None
        self._failed = False
        self._folder = Path(run.dir)
        mode = config.mode
        if mode is WandbMode.auto:
            mode = WandbMode.online if os.environ.get("WANDB_API_KEY") else WandbMode.offline
        self._guard(lambda: self._start(config, run, about, run_id, mode))

    def metrics(self, step: int, values: Values) -> None:
        """Log at the run's own step, which a resumed offline run would not keep."""
        self._guard(self._send_evaluations)
        self._guard(lambda: self._run.log({"step": step, **values}))

    def picture(self, step: int, path: Path) -> None:
        """Log the PNG under `samples`."""
        self._guard(lambda: self._run.log({"step": step, "samples": wandb.Image(str(path))}))

    def close(self) -> None:
        """Flush and end the run."""
        self._guard(self._send_evaluations)
        self._guard(lambda: self._run.finish())

    def _send_evaluations(self) -> None:
        for path, values in evaluations.found(self._folder):
            sent = path.with_suffix(".sent")
            if not sent.exists():
                self._run.log(as_logged(values))
                sent.touch()

    def _start(
        self,
        config: WandbConfig,
        run: RunConfig,
        about: Mapping[str, Any],
        run_id: str,
        mode: WandbMode,
    ) -> None:
        self._run = wandb.init(
            project=config.project,
            entity=config.entity or None,
            name=f"{run.experiment}/{run.name}",
            id=run_id,
            resume="allow",
            config=dict(about),
            dir=run.dir,
            mode="online" if mode is WandbMode.online else "offline",
            settings=wandb.Settings(silent=True, console="off"),
        )
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def _guard(self, action: Callable[[], object]) -> None:
        if self._failed:
            return
        try:
            action()
        except Exception as error:  # training must not care what its mirror dies of
            print(f"warning: W&B is off from here on: {error}", file=sys.stderr, flush=True)
            self._failed = True
