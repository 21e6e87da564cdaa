"""Ends a job that hangs, and leaves every rank's stack behind."""

import faulthandler
import os
import socket
import sys
import threading
import time
from datetime import datetime
from pathlib import Path

from trainer.config import WatchdogConfig
from trainer.distributed import Ranks

HANG_EXIT_CODE = 86
POLL_S = 1.0
GATHER_S = 10.0
"""How long the first rank to give up waits for the stacks of the others."""


class Watchdog:
    """A thread that ends the process with exit code 86 when a phase lasts too long.

    The loop says what it does. While a rank hangs, the others wait for it in some collective, each
    with a watchdog of its own, and all write their stacks into stacks/START of the run folder: the
    one that differs is the culprit. A rank that writes none is stuck outside Python, or gone.
    """

    def __init__(self, config: WatchdogConfig, folder: Path, ranks: Ranks) -> None:
        self._config, self._ranks = config, ranks
        # the start of rank 0 keeps apart what several starts of a run leave
        start = ranks.gather(f"{datetime.now():%Y%m%d_%H%M%S}")[0]
        self._folder = folder / "stacks" / start
        self._own = self._folder / f"rank_{ranks.rank:05d}.txt"
        self._now = ("start", 0, time.monotonic(), config.pause_timeout_s)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def step(self, step: int) -> None:
        """Optimizer step `step` (from 0) begins, with its data."""
        self._now = ("training", step, time.monotonic(), self._config.step_timeout_s)

    def pause(self, phase: str, step: int) -> None:
        """Something begins that may take longer than a step: `phase`, after step `step`."""
        self._now = (phase, step, time.monotonic(), self._config.pause_timeout_s)

    def close(self) -> None:
        """The run is over."""
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(POLL_S):
            phase, step, since_s, timeout_s = self._now
            lasted_s = time.monotonic() - since_s
            if timeout_s <= 0:
                continue
            # past half of its own time a rank looks whether another one has given up already
            others = lasted_s > timeout_s / 2 and self._folder.exists()
            if lasted_s > timeout_s or others:
                self._give_up(phase, step, lasted_s)

    def _give_up(self, phase: str, step: int, lasted_s: float) -> None:
        head = (
            f"rank {self._ranks.rank} of {self._ranks.world_size} on {socket.gethostname()}, "
            f"process {os.getpid()}: {phase}, step {step}, for {lasted_s:.0f} s\n"
        )
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            part = self._own.with_suffix(".part")
            with part.open("w") as file:
                file.write(head)
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            part.rename(self._own)
            text = self._own.read_text()
        except OSError as error:  # a file system that hangs or is full may be the very reason
            text = f"{head}(no stack written: {error})\n"
        sys.stderr.write(text)
        sys.stderr.flush()
        self._wait_for_others()
        if self._ranks.is_main:
            print(
                f"error: {phase} at step {step} took over {lasted_s:.0f} s: the job hangs; every "
                f"rank's stack is in {self._folder}; a longer watchdog.step_timeout_s or "
                "watchdog.pause_timeout_s waits longer",
                file=sys.stderr,
                flush=True,
            )
        os._exit(HANG_EXIT_CODE)  # the main thread would never hear of a softer end

    def _wait_for_others(self) -> None:
        deadline = time.monotonic() + GATHER_S
        while time.monotonic() < deadline:
            if len(list(self._folder.glob("rank_*.txt"))) >= self._ranks.world_size:
                return
            time.sleep(POLL_S / 10)
