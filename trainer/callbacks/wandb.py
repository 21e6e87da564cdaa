"""Weights & Biases: a mirror of metrics.jsonl in a process of its own.

A training puts lines into a queue and never waits for the network or the service. At the end of the
training the mirror has CLOSE_TIMEOUT_S to finish.
"""

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from data.secrets import hidden, public, restore
from trainer.callbacks.callback import Callback, Start
from trainer.callbacks.wandb_settings import chosen_mode, environment, init_arguments
from trainer.config import WandbConfig, WandbMode
from trainer.runs.evaluations import Values, read_evaluations, to_log_line
from trainer.runs.events import read_events
from trainer.runs.outages import retry_delays

CLOSE_TIMEOUT_S = 20.0
"""Longest wait at the end, in seconds; a preempted job has enough time for it."""
MAX_LINES_WAITING = 10_000
"""Size of the queue; further lines are dropped."""
STARTS = 6
"""How often the mirror is started in one training."""


def open_wandb(start: Start) -> Callback | None:
    """Make the callback; None if logger.wandb.mode or W&B's own variables turn it off."""
    options = start.config.logger.wandb
    if chosen_mode(options, os.environ) is WandbMode.disabled:
        return None
    return Wandb(options, start)


class Wandb(Callback):
    """Sends numbers and pictures to the mirror; its failures do not stop a training."""

    def __init__(self, options: WandbConfig, start: Start) -> None:
        self._folder, self._files = start.folder, start.files
        self._sent: set[Path] = set()
        self._lines: queue.Queue[str | None] = queue.Queue(MAX_LINES_WAITING)
        arguments = init_arguments(options, start.config.run, start.wandb_id, os.environ)
        Path(arguments["dir"]).mkdir(parents=True, exist_ok=True)
        arguments |= {name: public(arguments[name]) for name in ("project", "entity", "name")}
        for name in ("project", "entity"):  # the run's address: W&B needs what a variable holds
            arguments[name] = arguments[name] and restore(arguments[name])
        config = public({**start.public_config, "history": read_events(self._folder)})
        self._head = {**arguments, "config": config, "hidden": hidden()}
        self._closing = threading.Event()
        self._mirror = self._start()
        self._feeder = threading.Thread(target=self._feed, name="wandb-feeder", daemon=True)
        self._feeder.start()

    def metrics(self, step: int, values: Values) -> None:
        """Log numbers, with `step` as a metric: W&B's own step cannot decrease after a rewind."""
        self._send_evaluations()
        self._send({"step": step, **values})

    def picture(self, step: int, path: Path) -> None:
        """Log the PNG under `samples`."""
        self._send({"step": step, "picture": str(path.resolve())})

    def close(self) -> None:
        """Wait for the mirror to finish, at most CLOSE_TIMEOUT_S."""
        self._send_evaluations()
        self._closing.set()
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
        """Send evaluations of other jobs: W&B loses rows if two processes write to one run."""
        for path, values in read_evaluations(self._folder):
            sent = path.with_suffix(".sent")
            if sent not in self._sent and not sent.exists():
                self._send(to_log_line(values))
                self._sent.add(sent)
                self._files.replace(sent, b"")

    def _start(self) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "trainer.callbacks.wandb_mirror"],
            stdin=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            env=environment(os.environ, str(self._head["mode"])),
            start_new_session=True,  # Ctrl-C is for the training
        )

    def _send(self, message: Mapping[str, Any] | None) -> None:
        line = None if message is None else _encoded(message)
        try:
            self._lines.put_nowait(line)
        except queue.Full:  # the service is too slow; metrics.jsonl has this line, too
            if line is None:
                self._mirror.kill()

    def _feed(self) -> None:
        """Move lines from the queue to the mirror; start it again if it ends too early."""
        delay_s = retry_delays()
        line: str | None = ""
        for starts_left in reversed(range(STARTS)):
            line = self._feed_mirror(line)
            if line is None or not starts_left or self._closing.wait(delay_s()):
                return  # `close` prints a warning if the mirror has failed
            self._warn(f"ended with exit code {self._mirror.wait()} and starts again")
            self._head["resume"] = "allow"
            self._mirror = self._start()

    def _feed_mirror(self, line: str | None) -> str | None:
        """Move a line and those after it to the pipe; return the line at which the mirror ended."""
        pipe = self._mirror.stdin
        assert pipe is not None
        try:
            pipe.write(_encoded(self._head))
            while line is not None:
                pipe.write(line)
                pipe.flush()
                line = self._lines.get()
            pipe.close()
        except (OSError, ValueError):
            with suppress(OSError):  # what the pipe still holds
                pipe.close()
            return line
        return None

    def _warn(self, failure: str) -> None:
        print(
            f"warning: W&B {failure}; metrics.jsonl in the run folder is complete",
            file=sys.stderr,
            flush=True,
        )


def _encoded(message: Mapping[str, Any]) -> str:
    return json.dumps(message) + "\n"
