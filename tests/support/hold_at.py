"""A command that stands still in a training step, until it is killed.

python -m tests.support.hold_at STEP FILE COMMAND OVERRIDES…: run `python -m COMMAND`; each rank
stops before its first loss of that step (from 0), and rank 0 then makes FILE.
"""

import os
import runpy
import sys
from pathlib import Path

from tests.support.faults import before_each_loss, hang_for_ever


def main() -> None:
    held, file, command, *overrides = sys.argv[1:]

    def hold(step: int) -> None:
        if step == int(held):
            if int(os.environ.get("RANK") or 0) == 0:
                Path(file).touch()
            hang_for_ever()

    before_each_loss(hold)
    sys.argv = [command, *overrides]
    runpy.run_module(command, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
