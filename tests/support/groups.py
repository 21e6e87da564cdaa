"""Process groups: who is left of one."""

import os
import signal
import time
from pathlib import Path

import psutil

from trainer.config import Config
from trainer.precompute import decode
from trainer.precompute.job import precompute


def members(group: int) -> list[psutil.Process]:
    """The processes of a group that still run."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def wait_for_members(group: int, count: int, timeout_s: float = 60) -> None:
    """Wait until so many processes of a group run."""
    deadline_s = time.monotonic() + timeout_s
    while len(left := members(group)) != count:
        assert time.monotonic() < deadline_s, f"{count} expected, but there are {left}"
        time.sleep(0.005)


def decode_for_ever(config: Config, workers: Path) -> None:
    """Precompute in a group of its own; each worker adds its number to a file and stands still."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    def stand_still(*_: object, **__: object) -> None:
        with workers.open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(600)

    decode.decode_square = stand_still
    precompute(config)
