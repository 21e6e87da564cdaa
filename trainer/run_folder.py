"""A run folder as its reader sees it: metrics, config, versions and sample grids."""

import json
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

Points = list[tuple[int, float]]
"""Steps and values, in order of steps."""

CHECKPOINTS, MANIFEST = "checkpoints", "manifest.json"
"""The folder of checkpoints, and the file that makes one of a folder."""

QUARANTINE = "quarantine.jsonl"
"""The file of samples that were replaced in training."""

LARGEST = 1e30
"""What is not below it, infinite or not, is a run that diverged."""


@dataclass(slots=True)
class RunFolder:
    """All that a run wrote about itself, as read from its folder."""

    path: Path
    series: dict[str, dict[int, float]]
    """Key → step → value."""
    damaged_lines: int
    written_s: float
    """Unix time of the last line."""
    config_text: str
    config: dict[str, Any]
    versions: dict[str, str]
    pictures: list[tuple[int, Path]]
    """Steps and sample grids, oldest first."""

    @property
    def name(self) -> str:
        """experiment / name, or the folder's name."""
        run = self.section("run")
        parts = [str(run[key]) for key in ("experiment", "name") if run.get(key)]
        return " / ".join(parts) or self.path.resolve().name

    @property
    def last_step(self) -> int:
        """Step of the newest line."""
        return max(step for points in self.series.values() for step in points)

    def section(self, name: str) -> dict[str, Any]:
        """A part of the config; empty where it is missing."""
        section = self.config.get(name)
        return section if isinstance(section, dict) else {}

    def number(self, section: str, name: str) -> float | None:
        """A number of the config."""
        return _number(self.section(section).get(name))

    def points(self, key: str) -> Points:
        """Values below LARGEST, in order of steps."""
        found = sorted(self.series.get(key, {}).items())
        return [(step, value) for step, value in found if abs(value) < LARGEST]

    def trained(self, key: str) -> Points:
        """The points after step 0, where nothing has been trained yet."""
        return [(step, value) for step, value in self.points(key) if step > 0]

    def untrained(self, key: str) -> float | None:
        """The value at step 0."""
        return dict(self.points(key)).get(0)

    def last(self, key: str) -> float | None:
        """The newest of these values."""
        points = self.points(key)
        return points[-1][1] if points else None


def read_run(path: Path) -> RunFolder:
    """Raises FileNotFoundError where path is no run folder, ValueError where nothing is logged."""
    log = path / "metrics.jsonl"
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: there is no such run folder")
    if not log.is_file():
        raise FileNotFoundError(
            f"{path} has no metrics.jsonl: give the run.dir of a training that has started"
        )
    series, damaged = read_metrics(log.read_text(encoding="utf-8", errors="replace"))
    if not series:
        raise ValueError(f"{log} holds no metrics yet: the run has not logged a step")
    config_text = _read_if_there(path / "config.yaml")
    versions = _read_if_there(path / "versions.json")
    return RunFolder(
        path=path,
        series=series,
        damaged_lines=damaged,
        written_s=log.stat().st_mtime,
        config_text=config_text,
        config=_mapping(yaml.safe_load, config_text),
        versions={name: str(version) for name, version in _mapping(json.loads, versions).items()},
        pictures=sorted(
            (int(picture.stem.removeprefix("step_")), picture)
            for picture in (path / "samples").glob("step_*.png")
            if picture.stem.removeprefix("step_").isdecimal()
        ),
    )


def read_metrics(text: str) -> tuple[dict[str, dict[int, float]], int]:
    """JSON lines → key → step → value, and how many lines cannot be read.

    Where a resumed run repeats a step, the later line wins.
    """
    series: dict[str, dict[int, float]] = defaultdict(dict)
    damaged = 0
    for line in text.split("\n"):
        if not line.strip():
            continue
        values = _mapping(json.loads, line)
        step = _number(values.pop("step", None))
        if step is None or not 0 <= step < 2**53:
            damaged += 1
            continue
        for key, value in values.items():
            if (number := _number(value)) is not None:
                series[key][int(step)] = number
    return dict(series), damaged


def _number(value: object) -> float | None:
    """None for all but JSON's numbers; a number beyond floating point is infinite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _read_if_there(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _mapping(parse: Callable[[str], object], text: str) -> dict[str, Any]:
    """What text holds, or nothing where it is damaged: the metrics are worth a page without it."""
    try:
        found = parse(text)
    except (ValueError, yaml.YAMLError, RecursionError):
        return {}
    return {str(key): value for key, value in found.items()} if isinstance(found, dict) else {}
