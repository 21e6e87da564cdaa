"""The state of a checkpoint, without its tensors: the content of state.json."""

from dataclasses import MISSING, asdict, dataclass, field, fields
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin

from data.order.cursor import Cursor
from data.shards.manifest import Rejected
from data.storage.documents import is_json_array, is_json_object

State = TypeVar("State", bound="WeightsState")

MAX_STEP = 10**12
"""Largest step of a state; no training comes near."""
ADAM_STEPS = "adam_steps"
"""Key of the averaged module's applied updates; another module's key is `module.adam_steps`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsState:
    """The part of the state that sampling and exporting need."""

    step: int
    """Optimizer steps taken."""
    averages: list[str]
    """Names of the averages; the first is the one to show."""
    images_seen: int
    task: dict[str, Any]
    """State of the task, from TrainingTask.state."""
    config: dict[str, Any]
    """Config of the run that wrote the checkpoint, as JSON values."""

    def to_json(self) -> dict[str, Any]:
        """Return the content of state.json."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotState(WeightsState):
    """The state of a snapshot; trainer.ema computes averages of other widths from snapshots."""

    updates: int
    """Number of applied updates of the averages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState(WeightsState):
    """The state of a checkpoint; with its tensors it is enough to resume a run."""

    evaluated: bool
    """False if an evaluation is due at this step and was not made."""
    wandb_id: str
    adam_steps: dict[str, int]
    """Applied updates by module; the averaged module's name is empty."""
    metrics: dict[str, float | str]
    """Numbers of the evaluation at this step; empty without one."""
    cursor: Cursor
    finite: dict[str, int]
    """State of trainer.train.guards.FiniteGuard."""
    spikes: dict[str, Any]
    """State of trainer.train.guards.SpikeGuard."""
    quarantine: list[Rejected]
    meter: dict[str, list[float]]
    """Sums of the unfinished logging interval, by metric name."""
    world_size: int
    """Ranks of the job that wrote the checkpoint; any other number can resume."""
    unwritten: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    """Lines of the run's records that had not reached the disk, by the name of their file."""

    def to_json(self) -> dict[str, Any]:
        """Return the content of state.json."""
        values = asdict(self) | {"cursor": self.cursor.to_json()}
        return values | {
            f"{module}.{ADAM_STEPS}" if module else ADAM_STEPS: steps
            for module, steps in values.pop(ADAM_STEPS).items()
        }


def parse_state(values: object) -> RunState | SnapshotState:
    """Parse the content of state.json.

    Raises: ValueError naming an entry that is missing or of the wrong type.
    """
    if not is_json_object(values):
        raise ValueError("not a JSON object")
    step: object = values.get("step")
    if type(step) is int and not 0 <= step <= MAX_STEP:
        raise ValueError(f"step {step} is not from 0 to {MAX_STEP}")
    averages: object = values.get("averages")
    if is_json_array(averages) and not all(isinstance(name, str) for name in averages):
        raise ValueError("no names in 'averages'")
    if "updates" in values:
        return _build(SnapshotState, values)
    steps = {
        key.removesuffix(ADAM_STEPS).removesuffix("."): value
        for key, value in values.items()
        if key == ADAM_STEPS or key.endswith(f".{ADAM_STEPS}")
    }
    parsed = values | {ADAM_STEPS: steps}
    cursor: object = values.get("cursor")
    if is_json_object(cursor):
        parsed["cursor"] = Cursor.from_json(cursor)
    try:
        parsed["quarantine"] = [Rejected(**item) for item in values["quarantine"]]
    except (KeyError, TypeError) as error:
        raise ValueError("no list of samples in 'quarantine'") from error
    return _build(RunState, parsed)


def _build(kind: type[State], values: dict[str, Any]) -> State:
    found: dict[str, Any] = {}
    for entry in fields(kind):
        if entry.name not in values and entry.default_factory is not MISSING:
            continue  # checkpoints of earlier versions have no such entry
        if not _is(values.get(entry.name), entry.type):
            wanted: Any = get_origin(entry.type) or entry.type
            raise ValueError(f"no {wanted.__name__} in {entry.name!r}, or no such content")
        found[entry.name] = values[entry.name]
    return kind(**found)


def _is(value: Any, wanted: Any) -> bool:
    """Say whether a value is of a type of a state's entry, with all that it holds.

    Numbers of type int are counts, so they are not negative.
    """
    origin, parts = get_origin(wanted), get_args(wanted)
    if origin is UnionType:
        return any(_is(value, part) for part in parts)
    if type(value) is not (origin or wanted):
        return wanted is Any or (wanted is float and type(value) is int)
    if origin is dict:
        return all(_is(key, parts[0]) and _is(item, parts[1]) for key, item in value.items())
    if origin is list:
        return all(_is(item, parts[0]) for item in value)
    return type(value) is not int or value >= 0
