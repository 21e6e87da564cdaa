"""Timing things against each other on a machine that does other things, too."""

import time
from collections.abc import Callable
from typing import Any


def least_seconds(*calls: Callable[[], Any], rounds: int) -> list[float]:
    """The least processor seconds of each, over rounds in which they take turns, after a first."""
    spent: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds + 1):
        for call, times in zip(calls, spent, strict=True):
            start_s = time.process_time()
            call()
            times.append(time.process_time() - start_s)
    return [min(times[1:]) for times in spent]
