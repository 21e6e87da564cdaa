"""A command that signals itself while it works.

python -m tests.support.stop_at NUMBER SIGNAL COMMAND OVERRIDES…: run `python -m COMMAND`; its last
rank gets the signal just before it answers for the NUMBER-th time whether to stop.
"""

import os
import runpy
import signal
import sys
from itertools import count

from trainer.runtime.launcher import world_size
from trainer.train.stop import StopRequest


def main() -> None:
    number, name, command, *overrides = sys.argv[1:]
    answers, agreed = count(1), StopRequest.agreed
    is_last = int(os.environ.get("RANK") or 0) == world_size() - 1

    def signalled(self: StopRequest, must: bool = False, *, late: bool = False) -> bool:
        if next(answers) == int(number) and is_last:
            os.kill(os.getpid(), signal.Signals[name])
        return agreed(self, must, late=late)

    StopRequest.agreed = signalled
    sys.argv = [command, *overrides]
    runpy.run_module(command, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
