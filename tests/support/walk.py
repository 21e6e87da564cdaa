"""A rank that trains several runs one after the other: a process starts slower than it trains.

Arguments: a JSON file with lists of overrides. RANK and FAULT of the environment: `hang STEP` stops
rank 1 before the loss of that step, `slow SECONDS` delays its every loss.

Buckets of gradients are small, so even small networks fill several of them in a step.
"""

import json
import os
import sys
import time
from pathlib import Path

from tests.support.faults import before_each_loss, hang_for_ever
from trainer.cli import load_config
from trainer.engine import buckets
from trainer.train.loop import fit


def plant(fault: str) -> None:
    kind, value = fault.split()

    def hang(step: int) -> None:
        if step == int(value):
            hang_for_ever()

    before_each_loss(hang if kind == "hang" else lambda step: time.sleep(float(value)))


if __name__ == "__main__":
    if "FAULT" in os.environ and os.environ["RANK"] == "1":
        plant(os.environ["FAULT"])
    buckets.OVERLAPPED_ELEMENTS = 5_000
    for overrides in json.loads(Path(sys.argv[1]).read_text()):
        assert fit(load_config(overrides)) == 0
