"""The task of a config, by its entry in TASKS."""

from models.config.targets import resolve
from trainer.config import Config
from trainer.config.tasks import TASKS
from trainer.runtime.ranks import Ranks
from trainer.train.task import StepPlan, TrainingTask


def build_task(config: Config, ranks: Ranks) -> TrainingTask:
    """Open the data and build the task with its initial weights.

    Raises: ValueError or OSError that names the config path.
    """
    return resolve(TASKS[config.task].build)(config, ranks)


def plan_step(config: Config) -> StepPlan:
    """Plan a training step from the config alone, for `trainer.plan`."""
    return resolve(TASKS[config.task].plan)(config)
