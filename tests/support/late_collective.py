"""A command whose last collective has ended for it, but not yet for gloo's thread.

The thread is in Python when the command ends, and needs Python's lock while Python ends.
"""

import sys
import time
from collections.abc import Callable
from types import ModuleType
from typing import cast

import torch
import torch.distributed as dist

from trainer.cli import main
from trainer.config import Config
from trainer.runtime.ranks import join


class SlowEnd:
    """An object that Python deletes when it ends, which then takes three seconds."""

    def __del__(self, sleep: Callable[[float], None] = time.sleep) -> None:
        sleep(3)


def reduce(_: Config) -> None:
    join()
    work = dist.all_reduce(torch.ones(1), async_op=True)
    assert work is not None
    work.get_future().then(lambda _: time.sleep(2))
    sys.modules["slow_end"] = cast(ModuleType, SlowEnd())
    print("ended")


if __name__ == "__main__":
    main("tests.support.late_collective:reduce", about=__doc__, options="run")
