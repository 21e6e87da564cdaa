"""Child processes that end with their parent, whatever ends it."""

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1
"""From Linux's prctl.h."""
_prctl = getattr(ctypes.CDLL(None), "prctl", None)


def end_with_parent(parent: int) -> None:
    """Let the kernel kill this process when the thread that started it ends; Linux alone does.

    A child calls it first. Ctrl-C, which a terminal sends to both, is left to the parent.
    parent: the parent's process id.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if _prctl is not None:
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended before
        os._exit(1)
