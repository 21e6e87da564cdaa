"""A request to stop, heard at the next step boundary by every rank at once."""

import signal
from types import FrameType

from trainer.distributed import Ranks

REQUEUE_EXIT_CODE = 85
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Set by SIGTERM, SIGUSR1 (Slurm's warning before the time limit) or Ctrl-C."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._heard = False
        for number in SIGNALS:
            signal.signal(number, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        # later signals change nothing: a checkpoint is being written as fast as it can be. They
        # are ignored, as Python gives its handlers up some time before a process ends
        for other in SIGNALS:
            signal.signal(other, signal.SIG_IGN)
        if self._ranks.is_main:
            print(f"{signal.Signals(number).name}: stopping after this step", flush=True)
        self._heard = True

    def agreed(self, must: bool = False) -> bool:
        """Whether any rank was asked to stop, or must; collective: all leave at the same step."""
        # Slurm signals every process of a job. Those started before the first step, such as W&B's
        # service, have SIGUSR1 blocked as it was then, and outlive it
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
        return self._ranks.any(self._heard or must)
