"""A sweep of trainings (-m): each point in a run folder of its own, and a line for each at the end.

sweeps/optim.lr=0.001,run.seed=1/   the run folder of a point, in that of the command
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from trainer.config import Config
from trainer.runs.paths import newest_checkpoint, step_of
from trainer.train.loop import fit


def train_point(config: Config) -> None:
    """Train one point, or go on with it.

    Raises: SystemExit if asked to stop, which ends the whole sweep; else as `fit`.
    """
    if os.environ.get("WANDB_RUN_ID"):
        raise ValueError("WANDB_RUN_ID is the id of one run, and a sweep has several: unset it")
    code = fit(config)
    if code:
        raise SystemExit(code)


def summarise(combinations: Sequence[tuple[Mapping[str, str], Config]]) -> int:
    """Print the folder and the newest checkpoint of each point.

    combinations: (swept options, config) of each point.
    Returns the exit code: 0, or 1 if a point has not trained to its end.
    """
    missing = 0
    for options, config in combinations:
        newest = newest_checkpoint(Path(config.run.dir))
        step, last = step_of(newest) if newest is not None else 0, config.train.max_steps
        missing += step < last
        named = " ".join(f"{path}={value}" for path, value in options.items())
        print(f"{named or 'without swept options'}: step {step}/{last} in {config.run.dir}")
    if missing:
        print(f"{missing} of {len(combinations)} points are unfinished: the same command goes on")
    return 1 if missing else 0
