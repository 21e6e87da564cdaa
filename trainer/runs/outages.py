"""Files that cannot be written: the waits between attempts, and the lines about them."""

import shutil
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

FIRST_RETRY_S = 0.5
"""Wait before the second attempt, in seconds; it doubles from attempt to attempt."""
LONGEST_RETRY_S = 10.0
"""Longest wait between two attempts, in seconds."""
SAY_EVERY_S = 60.0
"""Shortest time between two lines about a disk."""


def retry_delays() -> Callable[[], float]:
    """Return a function whose calls return the waits in seconds before the next attempts."""
    delay = FIRST_RETRY_S / 2

    def following() -> float:
        nonlocal delay
        delay = min(2 * delay, LONGEST_RETRY_S)
        return delay

    return following


@dataclass(slots=True)
class _Outage:
    """Failed attempts to write one path."""

    since_s: float
    attempts: int = 0
    said: bool = False


class Outages:
    """Files that cannot be written: says so at most once a minute, and notes each end of one.

    Threads may share it. note: writes an event with details into the run's history.
    """

    def __init__(self, note: Callable[..., None] | None = None) -> None:
        self.note = note or _unnoted
        self._open: dict[Path, _Outage] = {}
        self._lock = threading.Lock()
        self._said_s = -SAY_EVERY_S

    def failed(self, path: Path, error: Exception, more: str = "") -> None:
        """Count a failed attempt to write `path`; more: its consequence in words."""
        now_s = time.monotonic()
        with self._lock:
            outage = self._open.setdefault(path, _Outage(now_s))
            outage.attempts += 1
            if now_s - self._said_s < SAY_EVERY_S:
                return
            outage.said, self._said_s = True, now_s
        line = f"warning: {path} cannot be written: {_reason(error)}; {free_space(path)}"
        print(f"{line}; {more}" if more else line, file=sys.stderr, flush=True)

    def written(self, path: Path) -> None:
        """End the outage of `path`, if there is one."""
        with self._lock:
            outage = self._open.pop(path, None)
        if outage is None:
            return
        lasted_s = time.monotonic() - outage.since_s
        event = f"{path} is written, after {outage.attempts} failed attempts in {lasted_s:.0f} s"
        if outage.said:
            print(event, file=sys.stderr, flush=True)
        self.note(event, attempts=outage.attempts, seconds=round(lasted_s, 3))


def _unnoted(event: str, **details: object) -> None:
    """Stand in for the history of a run where there is none."""


def free_space(path: Path) -> str:
    """Say how many bytes are free on the disk of a path, which need not exist."""
    for place in (path, *path.parents):
        try:
            return f"{shutil.disk_usage(place).free:,} bytes free"
        except FileNotFoundError:
            continue
        except OSError:
            break
    return "free bytes unknown"


def _reason(error: Exception) -> str:
    """Return an error's text on one line, without the path that it may name."""
    named = error.strerror if isinstance(error, OSError) else None
    return " ".join((named or str(error)).split())
