"""Progress bars of long jobs, and the callable that asks whether to stop."""

import sys
from collections.abc import Callable
from typing import NoReturn

from tqdm import tqdm

LINE_EVERY_S = 60.0
"""Interval of lines in a log file, in seconds."""

Stopping = Callable[[str], bool]
"""Maps the name of a phase to whether to stop; called between batches; collective.

A training resets its watchdog at each call.
"""


def never(phase: str) -> bool:
    """Return false: the Stopping of a job that never stops early."""
    return False


def progress_bar(
    total: int, label: str, unit: str, *, scaled: bool = False, hidden: bool = False
) -> "tqdm[NoReturn]":
    """Make a progress bar; outside a terminal it prints a line every LINE_EVERY_S.

    total: number of units; unit: their name; scaled: whether 1500 is written as 1.5k.
    """
    every_s = 0.1 if sys.stderr.isatty() else LINE_EVERY_S
    return tqdm(
        total=total,
        desc=label,
        unit=unit,
        unit_scale=scaled,
        mininterval=every_s,
        maxinterval=every_s,
        disable=hidden,
    )


def byte_bar(total_bytes: int, label: str) -> "tqdm[NoReturn]":
    """Make a progress bar of bytes."""
    return progress_bar(total_bytes, label, "B", scaled=True)
