"""The start of a training: untrained, with the weights of another run, or where it stopped."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.checkpoints.identity import Difference, check_resume
from trainer.checkpoints.reader import Checkpoint, latest_checkpoint
from trainer.config import Config
from trainer.engine.engines import checkpoint_layout
from trainer.engine.optim import describe_peak
from trainer.runs.data_set import write_data_set
from trainer.runs.events import add_event
from trainer.runs.paths import CHECKPOINTS
from trainer.runs.record import open_run
from trainer.runtime.ranks import Ranks
from trainer.train.fine_tuning import begin_with, with_weights
from trainer.train.task import TrainingTask
from trainer.train.tasks import build_task


@dataclass(frozen=True, slots=True)
class TrainingStart:
    """A task with its data, and the state to start from."""

    task: TrainingTask
    checkpoint: Checkpoint | None
    """The checkpoint of this run to go on from."""
    optimizer_of: Checkpoint | None
    """The checkpoint of another run whose optimizer state a new run takes."""


def open_training(config: Config, ranks: Ranks) -> TrainingStart:
    """Build the task, find what it starts from, and open the run folder; collective.

    The run folder does not change before everything is compared with the checkpoint.
    Raises: ValueError or OSError that names the config path, also if the checkpoint is of another
    run than the config's.
    """
    folder = Path(config.run.dir)
    if config.optim.scale_lr:
        peak = describe_peak(config.optim, config.train.global_batch_size)
        ranks.say(f"learning rate after warm-up: {peak}")
    damaged: list[str] = []
    checkpoint = latest_checkpoint(folder / CHECKPOINTS, ranks, damaged=damaged.append)
    if checkpoint is None:
        task, loaded = begin_with(config, ranks)
        if ranks.is_main:
            write_data_set(open_run(config, task.kernels), task.stream.manifest.facts)
            _skipped(folder, 0, damaged)
            add_event(folder, 0, "start", **({"loaded": loaded.about} if loaded else {}))
        return TrainingStart(task, None, loaded.optimizer_of if loaded else None)
    changes = check_resume(config, checkpoint.training.config, checkpoint.path)
    task = build_task(with_weights(config, ""), ranks)  # the checkpoint has the weights
    _check(config, task, checkpoint)
    if ranks.is_main:
        write_data_set(open_run(config, task.kernels), task.stream.manifest.facts)
        _skipped(folder, checkpoint.step, damaged)
        _tell(config, checkpoint, changes)
    return TrainingStart(task, checkpoint, None)


def _check(config: Config, task: TrainingTask, checkpoint: Checkpoint) -> None:
    """Compare data, networks and task with the checkpoint."""
    saved = checkpoint.training
    try:
        saved.cursor.check(task.stream.cursor(0))
    except ValueError as error:
        raise ValueError(f"{task.stream.option}: {error}") from error
    checkpoint.check_layout(checkpoint_layout(task.modules, task.averaged, config), "run.dir")
    task.load(saved.task)


def _skipped(folder: Path, step: int, damaged: Sequence[str]) -> None:
    """Add the damaged checkpoints to the history."""
    for problem in damaged:
        add_event(folder, step, f"{problem}: skipped, going on")


def _tell(config: Config, checkpoint: Checkpoint, changes: Sequence[Difference]) -> None:
    """Print the changed options, and add this start to the history."""
    folder, step = Path(config.run.dir), checkpoint.step
    changed = {one.path: {"old": one.old, "new": one.new} for one in changes}
    add_event(folder, step, "resume", **({"changed": changed} if changed else {}))
    if changes:
        print(f"changed since step {step}: {'; '.join(map(str, changes))}", flush=True)
    if config.checkpoint.load:
        print(f"checkpoint.load is not read: {folder} has checkpoints of its own", flush=True)
