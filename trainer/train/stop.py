"""Requests to stop a job: every rank stops after the same unit of work."""

import signal
from types import FrameType

from data.child_process import stops_with_parent
from trainer.runtime.launcher import REQUEUE_EXIT_CODE
from trainer.runtime.ranks import PendingMaximum, Ranks

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def _do_nothing(number: int, frame: FrameType | None) -> None:
    """Handle a signal. Python prints a stack trace where a handler is removed before its turn."""


class StopRequest:
    """A request by SIGTERM, SIGUSR1 (Slurm's warning before the time limit) or Ctrl-C."""

    def __init__(self, ranks: Ranks, at: str = "step") -> None:
        """at: name of the unit of work after which the job stops, for the printed line."""
        self._ranks, self._at = ranks, at
        self._speaks = ranks.is_main and not stops_with_parent()
        self._heard = False
        self._asked: PendingMaximum | None = None
        """The answer to the last call with late=True, not read yet."""
        self._late_ranks: Ranks | None = None
        for number in SIGNALS:
            signal.signal(number, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        for other in SIGNALS:  # another signal may have come together with this one
            signal.signal(other, _do_nothing)
        if self._speaks:
            print(f"{signal.Signals(number).name}: stopping after this {self._at}", flush=True)
        self._heard = True

    def agreed(self, must: bool = False, *, late: bool = False) -> bool:
        """Return whether to stop: any rank got a signal, or has `must` set; collective.

        late: several ranks get the answer to the call before this one; they then need not wait for
        each other, nor for their devices.
        """
        # Slurm signals every process of a job. Processes that were started before the first call,
        # such as W&B's service, inherited a blocked SIGUSR1: the signal does not end them
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
        if self._heard:
            # Python removes its handlers before a process ends, and a signal would then kill it
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)
        before, self._asked = self._asked, None
        stopping = before is not None and before.value() > 0
        if self._ranks.world_size == 1:
            return self._heard or must
        if not late:
            return self._ranks.any(self._heard or must or stopping)
        if self._late_ranks is None:
            self._late_ranks = self._ranks.for_thread()
        self._asked = self._late_ranks.begin_maximum(float(self._heard or must))
        return stopping

    def stopping(self, phase: str) -> bool:
        """Return whether to stop, as a runtime.progress.Stopping; collective."""
        return self.agreed()

    def exit_code(self, left: str) -> int:
        """Print a line and return the exit code of a stopped job; left: the saved work in words."""
        if not self._ranks.is_main:
            # srun kills the other ranks as soon as one ends with an error code
            return 0
        if self._speaks:
            print(f"asked to stop: {left}; the same command goes on", flush=True)
        return REQUEUE_EXIT_CODE
