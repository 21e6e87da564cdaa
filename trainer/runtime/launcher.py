"""The environment variables of the launcher (torchrun, srun), and exit codes for it.

The job scripts print the meaning of a code in the log of the job:

    python -m trainer.runtime.launcher 85
"""

import os
import signal
import sys
from collections.abc import Mapping

UNWRITTEN_EXIT_CODE = 74
"""Done, but records did not reach the disk (EX_IOERR of sysexits.h). The last checkpoint has them:
the same command writes them."""
CRASH_EXIT_CODE = 70
"""A stack trace was printed; another start may do better (EX_SOFTWARE of sysexits.h)."""
REQUEUE_EXIT_CODE = 85
"""Stopped early with a checkpoint: the same command continues the run."""
HANG_EXIT_CODE = 86
"""A phase exceeded its time limit; the stacks of all ranks are in the run folder."""
MEANINGS = {
    0: "done",
    1: "an error to mend",
    CRASH_EXIT_CODE: "a crash",
    UNWRITTEN_EXIT_CODE: "done, but a file of the run folder is incomplete",
    REQUEUE_EXIT_CODE: "stopped early, with a checkpoint",
    HANG_EXIT_CODE: "a rank hangs",
}


def meaning(code: int) -> str:
    """Explain a shell's exit code in a few words."""
    if code in MEANINGS:
        return MEANINGS[code]
    numbers = {number.value: number.name for number in signal.Signals}
    return f"killed by {numbers[code - 128]}" if code - 128 in numbers else "unknown"


def world_size(variables: Mapping[str, str] = os.environ) -> int:
    """Return the number of ranks of this job from the launcher's environment; 1 without one.

    A process that srun did not start, in a batch script or in salloc's shell, is a job of one rank.
    Raises: ValueError naming the variable that is no number over 0.
    """
    for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        if word := variables.get(name):
            if not word.isdecimal() or int(word) == 0:
                raise ValueError(f"{name}={word} is no number of ranks: start with torchrun")
            return int(word)
    return 1


if __name__ == "__main__":
    print(meaning(int(sys.argv[1])))
