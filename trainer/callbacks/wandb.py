"""Weights & Biases: a mirror of metrics.jsonl in a process of its own.

Whatever the network or the service does, a training waits for neither: it hands lines to a queue,
and at the end gives the mirror CLOSE_TIMEOUT_S to finish.
"""

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer import evaluations
from trainer.config import RunConfig, WandbConfig, WandbMode
from trainer.evaluations import Values, as_logged

CLOSE_TIMEOUT_S = 20.0
"""Short enough for a job that is being preempted."""
MAX_LINES_WAITING = 10_000


class Wandb:
    """Online, offline or, with `auto`, online where there is a key; fails without harm."""

    def __init__(
        self, config: WandbConfig, run: RunConfig, about: Mapping[str, Any], run_id: str
    ) -> None:
        self._folder = Path(run.dir)
        mode = config.mode
        if mode is WandbMode.auto:
            mode = WandbMode.online if os.environ.get("WANDB_API_KEY") else WandbMode.offline
        self._lines: queue.Queue[str | None] = queue.Queue(MAX_LINES_WAITING)
        self._send(
            {
                "project": config.project,
                "entity": config.entity or None,
                "name": f"{run.experiment}/{run.name}",
                "id": run_id,
                "config": dict(about),
                "dir": str(Path(run.dir).resolve()),
                "mode": mode.value,
            }
        )
        self._mirror = subprocess.Popen(
            [sys.executable, "-m", "trainer.callbacks.wandb_mirror"],
            stdin=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            start_new_session=True,  # Ctrl-C is for the training
        )
        self._feeder = threading.Thread(target=self._feed, name="wandb-feeder", daemon=True)
        self._feeder.start()

    def metrics(self, step: int, values: Values) -> None:
        """Log with the run's own step, which neither W&B's offline runs nor a rewind would keep."""
        self._send_evaluations()
        self._send({"step": step, **values})

    def picture(self, step: int, path: Path) -> None:
        """Log the PNG under `samples`."""
        self._send({"step": step, "picture": str(path.resolve())})

    def rewound(self, step: int) -> None:
        """Steps that come again are logged again."""

    def close(self) -> None:
        """Let the mirror finish what it has been given, within bounds."""
        self._send_evaluations()
        self._send(None)
        try:
            self._mirror.wait(CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._mirror.kill()
            self._warn(f"did not finish within {CLOSE_TIMEOUT_S:.0f} s")
        else:
            if self._mirror.returncode:
                self._warn(f"ended with exit code {self._mirror.returncode}")

    def _send_evaluations(self) -> None:
        """Those that were jobs of their own: W&B loses rows of a run that two processes write."""
        for path, values in evaluations.found(self._folder):
            sent = path.with_suffix(".sent")
            if not sent.exists():
                self._send(as_logged(values))
                sent.touch()

    def _send(self, message: Mapping[str, Any] | None) -> None:
        line = None if message is None else json.dumps(message) + "\n"
        try:
            self._lines.put_nowait(line)
        except queue.Full:  # the service is slow beyond measure; metrics.jsonl has the line
            if line is None:
                self._mirror.kill()

    def _feed(self) -> None:
        """Pass lines on; the pipe may be full, or its other end gone."""
        pipe = self._mirror.stdin
        assert pipe is not None
        try:
            while (line := self._lines.get()) is not None:
                pipe.write(line)
                pipe.flush()
            pipe.close()
        except (OSError, ValueError):
            pass  # the mirror is gone; close() says so

    def _warn(self, what: str) -> None:
        print(
            f"warning: W&B {what}; metrics.jsonl in the run folder is complete",
            file=sys.stderr,
            flush=True,
        )
