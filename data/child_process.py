"""Child processes that end or stop with their parent, whatever ends it."""

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1
"""From Linux's prctl.h."""
_prctl = getattr(ctypes.CDLL(None), "prctl", None)


_stops_with_parent = False


def end_with_parent(parent: int) -> None:
    """Let the kernel kill this process when the thread that started it ends; Linux alone does.

    A child calls it first. Ctrl-C, which a terminal sends to both, is left to the parent.
    parent: the parent's process id.
    """
    _follow(parent, signal.SIGKILL)


def stop_with_parent(parent: int) -> None:
    """Like `end_with_parent`, but with SIGTERM: the child has work to save."""
    global _stops_with_parent
    _stops_with_parent = True
    _follow(parent, signal.SIGTERM)


def stops_with_parent() -> bool:
    """Return whether this process follows another, which says for all that they stop."""
    return _stops_with_parent


def _follow(parent: int, number: signal.Signals) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if _prctl is not None:
        _prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it has ended before
        os._exit(1)
