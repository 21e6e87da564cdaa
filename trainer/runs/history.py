"""Reading a run folder: metrics, config, versions and sample grids."""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.secrets import public
from data.storage.documents import DocumentError, is_json_object, parse_json, parse_yaml
from data.storage.untrusted import read_text
from data.text import printable
from trainer.runs.events import read_events
from trainer.runs.paths import (
    CONFIG,
    HISTORY,
    INCIDENTS,
    METRICS,
    SAMPLES,
    STEPS,
    VERSIONS,
)

Points = list[tuple[int, float]]
"""Steps and values, in order of steps."""
LARGEST = 1e30
"""Limit of the values that are shown; larger ones mean that the run diverged."""
MOST_SERIES = 500
"""Largest number of metrics; a log of more was not written by a training."""
MAX_LOG_BYTES = 2**28
MOST_STEPS = 2**53
MOST_EVENTS, LONGEST_TEXT = 10_000, 300
"""Largest number of events that are kept, and of characters of one."""
MAX_RECORD_BYTES = 2**20
"""Largest config.yaml or versions.json that is read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened to a run: see trainer.runs.events."""

    time_s: float
    """Unix time, in seconds."""
    step: int | None
    what: str
    details: str
    """Further facts, such as the options that changed; empty without."""
    back_to: int | None
    """The step that a rewind went back to; None for other events."""

    @property
    def resumes(self) -> bool:
        """Whether the run went on from a checkpoint here."""
        return self.what == "resume"


@dataclass(slots=True)
class RunFolder:
    """The content of a run folder."""

    path: Path
    series: dict[str, dict[int, float]]
    """Metric's key → step → value."""
    damaged_lines: int
    """Number of lines of metrics.jsonl that cannot be parsed."""
    written_s: float
    """Unix time of the last line, in seconds."""
    config_text: str
    config: dict[str, Any]
    versions: dict[str, str]
    pictures: list[tuple[int, Path]]
    """Steps and sample grids, oldest first."""
    events: list[Event]
    """Starts, outages and incidents, oldest first."""

    @property
    def name(self) -> str:
        """The experiment and the name of the run; the folder's name if the config is missing."""
        run = self.section("run")
        words = [run.get(key) for key in ("experiment", "name")]
        names = [word for word in words if isinstance(word, str) and word]
        return " / ".join(names) or self.path.resolve().name

    @property
    def last_step(self) -> int:
        """The largest step of any metric."""
        return max(step for points in self.series.values() for step in points)

    def section(self, name: str) -> dict[str, Any]:
        """A section of the config; empty if it is missing."""
        section: object = self.config.get(name)
        return section if is_json_object(section) else {}

    def number(self, section: str, name: str) -> float | None:
        """A number of the config; None if it is missing or no number."""
        return _number(self.section(section).get(name))

    def points(self, key: str) -> Points:
        """The values of a metric that are smaller than LARGEST."""
        found = sorted(self.series.get(key, {}).items())
        return [(step, value) for step, value in found if abs(value) < LARGEST]

    def trained(self, key: str) -> Points:
        """The points after step 0, which measures the untrained model."""
        return [(step, value) for step, value in self.points(key) if step > 0]

    def untrained(self, key: str) -> float | None:
        """The value at step 0; None without one."""
        return dict(self.points(key)).get(0)

    def last(self, key: str) -> float | None:
        """The value at the largest step; None without one."""
        points = self.points(key)
        return points[-1][1] if points else None


def read_run(path: Path) -> RunFolder:
    """Read a run folder, which may be a stranger's: nothing outside of it is read.

    Raises: FileNotFoundError if `path` is no run folder; ValueError if it has no metrics yet;
    OSError if its log is no regular file, or over MAX_LOG_BYTES.
    """
    log = path / METRICS
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: there is no such run folder")
    if not log.exists():
        raise FileNotFoundError(
            f"{path} has no metrics.jsonl: give the run.dir of a training that has started"
        )
    series, damaged = read_metrics(read_text(log, limit=MAX_LOG_BYTES, below=path))
    if not series:
        raise ValueError(f"{log} holds no metrics yet: the run has not logged a step")
    config_text = _read_if_there(path, CONFIG)
    versions = _read_if_there(path, VERSIONS)
    return RunFolder(
        path=path,
        series=series,
        damaged_lines=damaged,
        written_s=log.stat().st_mtime,
        config_text=config_text,
        config=public(_mapping(parse_yaml, config_text)),
        versions={name: str(version) for name, version in _mapping(parse_json, versions).items()},
        pictures=sorted(
            (int(picture.stem.removeprefix("step_")), picture)
            for picture in (path / SAMPLES).glob(f"{STEPS}.png")
            if picture.stem.removeprefix("step_").isdecimal()
        ),
        events=sorted(_events(path), key=lambda event: event.time_s),
    )


def read_metrics(text: str) -> tuple[dict[str, dict[int, float]], int]:
    """Parse JSON lines; return (key → step → value, number of damaged lines).

    If a step stands in several lines, the last one counts.
    """
    series: dict[str, dict[int, float]] = defaultdict(dict)
    damaged = 0
    for line in text.split("\n"):
        if not line.strip():
            continue
        values = _mapping(parse_json, line)
        step = _step(_number(values.pop("step", None)))
        if step is None:
            damaged += 1
            continue
        for key, value in values.items():
            is_known = key in series or len(series) < MOST_SERIES
            if is_known and (number := _number(value)) is not None:
                series[key][step] = number
    return dict(series), damaged


def _events(run: Path) -> Iterator[Event]:
    for name in (HISTORY, INCIDENTS):
        try:
            found = read_events(run, name)
        except OSError:
            continue
        for entry in found[-MOST_EVENTS:]:
            time_s, step, back_to = (_number(entry.get(key)) for key in ("time", "step", "back_to"))
            if time_s is None or not abs(time_s) < LARGEST:
                continue
            yield Event(
                time_s=time_s,
                step=_step(step),
                what=printable(str(entry.get("what")), LONGEST_TEXT),
                details=printable("; ".join(_facts(entry)), LONGEST_TEXT),
                back_to=_step(back_to),
            )


def _facts(entry: Mapping[str, Any]) -> Iterator[str]:
    """Yield the details of an event in words, its changed options as `optim.lr: 0.001 → 0.0005`."""
    for key, value in entry.items():
        if key == "changed" and is_json_object(value):
            for path, change in value.items():
                old, new = (
                    (change.get("old"), change.get("new")) if is_json_object(change) else ("", "")
                )
                yield f"{path}: {json.dumps(old)} → {json.dumps(new)}"
        elif key not in ("time", "step", "what", "back_to", "samples"):
            yield f"{key}: {json.dumps(value)}"


def _step(value: float | None) -> int | None:
    return int(value) if value is not None and 0 <= value < MOST_STEPS else None


def _number(value: object) -> float | None:
    """Return a JSON number as a float, infinite if it is too large; None for other values."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _read_if_there(run: Path, name: str) -> str:
    """Read a file of a run; empty if there is none that may be read."""
    try:
        return read_text(run / name, limit=MAX_RECORD_BYTES, below=run)
    except OSError:
        return ""


def _mapping(parse: Callable[[str], object], text: str) -> dict[str, Any]:
    """Parse text into a dict; empty if the text is damaged: a report works without it."""
    try:
        found = parse(text)
    except DocumentError:
        return {}
    return {str(key): value for key, value in found.items()} if is_json_object(found) else {}
