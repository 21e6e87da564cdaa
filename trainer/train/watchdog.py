"""The watchdog: a thread that ends a job that hangs, and writes the stacks of all ranks."""

import faulthandler
import os
import socket
import sys
import threading
import time
import traceback
from datetime import datetime
from pathlib import Path

from data.storage.atomic import atomic_path
from trainer.config import WatchdogConfig
from trainer.runs.paths import STACKS
from trainer.runtime.launcher import HANG_EXIT_CODE
from trainer.runtime.ranks import Ranks

POLL_S = 1.0
GATHER_S = 10.0
"""Longest time that a rank waits for the stacks of the others before it ends, in seconds."""


class Watchdog:
    """A thread that ends the process with exit code 86 when a phase exceeds its time limit.

    The training loop announces its phases by `step` and `pause`. If one rank hangs, the others wait
    for it in a collective. Every rank has a watchdog, and writes its stack into stacks/START of the
    run folder. The stack that differs belongs to the rank that hangs. A rank without a stack hangs
    outside Python, or its process has ended. The constructor is collective.
    """

    def __init__(self, config: WatchdogConfig, folder: Path, ranks: Ranks) -> None:
        self._config, self._ranks = config, ranks
        # each start of a run has its own folder, named by the clock of rank 0
        start = ranks.gather(f"{datetime.now():%Y%m%d_%H%M%S}")[0]
        self._folder = folder / STACKS / start
        self._own = self._folder / f"rank_{ranks.rank:05d}.txt"
        self._now = ("start", 0, time.monotonic(), config.pause_timeout_s)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def step(self, step: int) -> None:
        """Begin optimizer step `step` (from 0), including the wait for its data."""
        self._now = ("training", step, time.monotonic(), self._config.step_timeout_s)

    def pause(self, phase: str, step: int) -> None:
        """Begin `phase`, which may take longer than a step, after step `step`."""
        self._now = (phase, step, time.monotonic(), self._config.pause_timeout_s)

    def close(self) -> None:
        """End the watchdog, because the run is over."""
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(POLL_S):
            phase, step, since_s, timeout_s = self._now
            lasted_s = time.monotonic() - since_s
            if timeout_s <= 0:
                continue
            # after half of the time limit: has another rank written its stack already?
            others = lasted_s > timeout_s / 2 and self._folder.exists()
            if lasted_s > timeout_s or others:
                self._give_up(phase, step, lasted_s)

    def _give_up(self, phase: str, step: int, lasted_s: float) -> None:
        head = (
            f"rank {self._ranks.rank} of {self._ranks.world_size} on {socket.gethostname()}, "
            f"process {os.getpid()}: {phase}, step {step}, for {lasted_s:.0f} s\n"
        )
        end = (
            f"error: {phase} at step {step} took over {lasted_s:.0f} s: the job hangs; the stacks "
            f"of all ranks are in {self._folder}; a longer watchdog.step_timeout_s or "
            "watchdog.pause_timeout_s waits longer\n"
        )
        end = end if self._ranks.is_main else ""
        try:
            write_stacks(self._own, head, end)
        except OSError as error:  # the disk may be full, which may be the cause of the hang
            _say(f"{head}(no stack written: {error})\n{end}")
        self._wait_for_others()
        os._exit(HANG_EXIT_CODE)  # an exception would not reach a main thread that hangs

    def _wait_for_others(self) -> None:
        deadline = time.monotonic() + GATHER_S
        while time.monotonic() < deadline:
            if len(list(self._folder.glob("rank_*.txt"))) >= self._ranks.world_size:
                return
            time.sleep(POLL_S / 10)


def write_stacks(path: Path, head: str, end: str = "") -> None:
    """Print `head`, the stacks of the threads of this process and `end`; then keep them in a file.

    The file appears last. A rank ends as soon as it sees the files of all ranks, and the launcher
    then ends the other ranks, who must have said everything by then. `end` is not in the file.
    The main thread comes first: of more than 100 threads faulthandler leaves out the oldest ones.
    Raises: OSError if the file cannot be written; an older file at `path` is then unchanged.
    """
    with atomic_path(path) as part:
        with part.open("w") as file:
            file.write(f"{head}Main thread (most recent call last):\n")
            frames = vars(sys)["_current_frames"]()  # public, in spite of its name
            traceback.print_stack(frames[threading.main_thread().ident], file=file)
            file.flush()  # faulthandler writes to the descriptor, past Python's buffer
            faulthandler.dump_traceback(file, all_threads=True)
        _say(part.read_text() + end)


def _say(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()
