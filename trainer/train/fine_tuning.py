"""A new run that begins with the weights in checkpoint.load: those of a run, or of a file."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

import torch
from torch import Tensor, nn

from models.weights.files import check_finite, widened
from trainer.checkpoints.identity import check_begin
from trainer.checkpoints.reader import Checkpoint, open_named
from trainer.checkpoints.state import RunState
from trainer.config import Config
from trainer.config.tasks import TASKS
from trainer.engine.averages import averages
from trainer.engine.engines import checkpoint_layout
from trainer.runtime.ranks import Ranks
from trainer.train.task import TrainingTask
from trainer.train.tasks import build_task

INPUT = "unet.conv_in.weight"
"""The weight that unet.widen_input may widen."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """The weights that a new run begins with."""

    about: Mapping[str, object]
    """Their source, for the history; JSON values."""
    optimizer_of: Checkpoint | None = None
    """The checkpoint whose optimizer state the run takes, too."""


def begin_with(config: Config, ranks: Ranks) -> tuple[TrainingTask, Loaded | None]:
    """Build the task of a new run, with the weights of checkpoint.load if it is set; collective.

    A line says which weights these are.
    Raises: ValueError or OSError that names the config path, also if the weights are of another
    network.
    """
    if not config.checkpoint.load:
        return build_task(config, ranks), None
    option = TASKS[config.task].weights
    if option and attrgetter(option)(config):
        raise ValueError(f"checkpoint.load and {option} both name weights to begin with: keep one")
    path = Path(config.checkpoint.load)
    if not path.exists():
        raise FileNotFoundError(f"checkpoint.load: no run, checkpoint or weights file at {path}")
    if path.is_file():
        return _with_file(config, ranks, path, option)
    origin = open_named(path, ranks)
    differences = check_begin(config, origin.state.config, origin.path)
    task = build_task(config, ranks)
    task.begin_with(origin.state.task)
    name = _load(config, ranks, task, origin)
    optimizer = config.checkpoint.load_optimizer
    ranks.say(
        f"checkpoint.load: a new run with the {name} of {origin.path}, and "
        f"{'its averages and optimizer state' if optimizer else 'a fresh optimizer'}"
    )
    if differences:
        ranks.say(f"other options than in {origin.path}: {'; '.join(map(str, differences))}")
    about = {"from": str(origin.path), "weights": name, "optimizer": optimizer}
    return task, Loaded(about, origin if optimizer else None)


def with_weights(config: Config, path: str) -> Config:
    """Copy the config with another file of weights to begin with; empty: none."""
    copied, option = deepcopy(config), TASKS[config.task].weights
    if option:
        section, _, field = option.rpartition(".")
        setattr(attrgetter(section)(copied), field, path)
    return copied


def _with_file(
    config: Config, ranks: Ranks, path: Path, option: str
) -> tuple[TrainingTask, Loaded]:
    """Build the task with a weights file, like with the option that names such a file."""
    choices = config.checkpoint
    if not option or choices.load_raw or choices.load_optimizer:
        raise ValueError(
            f"checkpoint.load={path}: a file has no averages and no optimizer state, and not every "
            "task reads one: name a run or a checkpoint"
        )
    try:
        task = build_task(with_weights(config, str(path)), ranks)
    except ValueError as error:
        raise ValueError(f"checkpoint.load, as {error}") from error
    ranks.say(f"checkpoint.load: a new run with the weights in {path}, and a fresh optimizer")
    return task, Loaded({"from": str(path), "weights": "file", "optimizer": False})


def _load(config: Config, ranks: Ranks, task: TrainingTask, origin: Checkpoint) -> str:
    """Load the weights of all modules; return the name of the averaged module's weights."""
    options = config.checkpoint
    if (options.load_raw or options.load_optimizer) and not isinstance(origin.state, RunState):
        raise ValueError(f"checkpoint.load: {origin.path} has averages alone, no raw weights")
    if options.load_optimizer:
        own = [average.name for average in averages(config.ema)]
        if own != origin.state.averages:
            raise ValueError(
                f"checkpoint.load_optimizer: {origin.path} has {', '.join(origin.state.averages)}, "
                f"and ema.decays and ema.sigma_rels name {', '.join(own)}: name the same averages"
            )
        # the engines load everything, once they exist
        layout = checkpoint_layout(task.modules, task.averaged, config)
        origin.check_layout(layout, "checkpoint.load")
        return "raw weights"
    for name, module in task.modules.items():
        if name != task.averaged:
            _load_other(ranks, name, module, origin)
    module = task.modules[task.averaged]
    if options.load_raw:
        chosen, weights = "raw weights", origin.tensors("weight")["weight"]
    else:
        average, weights = origin.average(config.ema.use)
        chosen = f"average {average}"
    if config.unet.widen_input and INPUT in weights:
        weights = widened(weights, INPUT, module.get_parameter(INPUT))
    _fill(module, weights, origin.tensors("buffer")["buffer"], origin.path)
    return chosen


def _load_other(ranks: Ranks, name: str, module: nn.Module, origin: Checkpoint) -> None:
    """Load a module without averages, such as a discriminator; the checkpoint may lack it."""
    kinds = (f"{name}.weight", f"{name}.buffer")
    weights, buffers = origin.tensors(*kinds).values()
    if weights:
        _fill(module, weights, buffers, origin.path)
    else:
        ranks.say(f"{origin.path} has no {name}: it begins untrained")


@torch.no_grad()
def _fill(
    module: nn.Module, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor], path: Path
) -> None:
    """Copy tensors into a module.

    Raises: ValueError naming a tensor that is missing, extra, of another shape or not finite.
    """
    own = {name: value for name, value in module.named_parameters() if value.requires_grad}
    for places, found in ((own, weights), (dict(module.named_buffers()), buffers)):
        for name in sorted(places.keys() | found.keys()):
            here, there = (
                list(tensors[name].shape) if name in tensors else "missing"
                for tensors in (places, found)
            )
            if here != there:
                hint = "; unet.widen_input=true adds channels of zeros" if name == INPUT else ""
                raise ValueError(
                    f"checkpoint.load: {path} is of another network: {name} is {there} there, and "
                    f"{here} here{hint}"
                )
        check_finite(found, path, "checkpoint.load")
        for name, place in places.items():
            place.copy_(found[name])
