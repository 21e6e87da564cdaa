"""A sweep of evaluations: each point measured once, then a table, a Pareto plot and a strip.

    sweeps/points/KEY.json, KEY.png   one point's numbers and pictures; KEY is of its whole config
    sweeps/NAME/table.parquet         a row a point: what was swept, then the numbers
    sweeps/NAME/table.md              the same for people
    sweeps/NAME/pareto.png            Fréchet distance against CLIP score
    sweeps/NAME/strip.png             the same samples at every point

NAME is made from what is swept, so that the same command writes the same folder.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from trainer import distributed
from trainer.charts import save_pareto_chart
from trainer.checkpoint import chosen_checkpoint
from trainer.config import Config
from trainer.contact_sheet import named_rows
from trainer.evaluator import GRID_COLUMNS, Evaluator
from trainer.images import save_picture, save_png, tiles
from trainer.pipeline import Pipeline
from trainer.run_folder import CHECKPOINTS, MANIFEST
from trainer.runs import describe
from trainer.sweep_table import FOLDER, TABLE, SweepTable

STRIP_SAMPLES = 8


@dataclass(frozen=True, slots=True)
class Point:
    """One combination of options, and where its numbers are kept."""

    options: Mapping[str, str]
    """What is swept, by config path, as it was written."""
    config: Config

    @property
    def name(self) -> str:
        """The values alone, in the order of the sweep."""
        return " ".join(Path(value).name for value in self.options.values())

    @property
    def record(self) -> Path:
        """Named after the whole config: a change of anything else is another point."""
        text = json.dumps(describe(self.config), sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        return Path(self.config.run.dir) / FOLDER / "points" / f"{key}.json"

    @property
    def picture(self) -> Path:
        """The grid of samples that was drawn on the way."""
        return self.record.with_suffix(".png")

    def values(self) -> dict[str, Any] | None:
        """What was measured, if it was, and of the checkpoint that would be measured now."""
        try:
            found = json.loads(self.record.read_bytes())
            return found["values"] if found["checkpoint"] == _checkpoint(self.config) else None
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None


def measure_point(config: Config) -> None:
    """Evaluate one point of a sweep, unless its numbers are there already.

    Raises: FileNotFoundError or ValueError naming what is missing.
    """
    point, ranks = Point({}, config), distributed.join()
    if any(ranks.gather(point.values() is not None)):
        if ranks.is_main:
            print(f"measured before: {point.record}")
        return
    identity, checkpoint = _checkpoint(config), chosen_checkpoint(config)
    evaluator = Evaluator(config, ranks)
    result = evaluator.evaluate(Pipeline.load(config, checkpoint, ranks.device))
    if result is None or not ranks.is_main:
        return
    save_png(point.picture, result.picture)
    record = {"checkpoint": identity, "values": {"step": checkpoint.step, **result.metrics}}
    part = point.record.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1) + "\n")
    part.replace(point.record)


def summarise(combinations: Sequence[tuple[Mapping[str, str], Config]]) -> int:
    """Write the table, the plot and the strip of all points; returns the exit code.

    1 where a point has no numbers: the same command measures those, and no others.
    """
    points = [Point(options, config) for options, config in combinations]
    table = SweepTable(
        [(point.options, values) for point in points if (values := point.values()) is not None]
    )
    folder = Path(points[0].config.run.dir) / FOLDER / _name(points)
    folder.mkdir(parents=True, exist_ok=True)
    table.save(folder / TABLE)
    (folder / "table.md").write_text(table.markdown())
    if table.trials:
        save_pareto_chart(folder / "pareto.png", table.trials, *table.axes)
    _save_strip(folder / "strip.png", [point for point in points if point.picture.exists()])
    print(table.markdown(), end="")
    print(f"table, plot and pictures: {folder}")
    missing = [point.name for point in points if point.values() is None]
    if missing:
        print(f"without numbers: {'; '.join(missing)}: the same command measures these")
    return 1 if missing else 0


def _name(points: Sequence[Point]) -> str:
    keys = list(points[0].options)
    whole = json.dumps([dict(point.options) for point in points] + [str(points[0].record)])
    short = "-".join(key.split(".")[-1].lstrip("+") for key in keys)
    return f"{short}_{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


def _save_strip(path: Path, points: Sequence[Point]) -> None:
    """A row of samples for each point, under the point's name."""
    rows = []
    for point in points:
        side = point.config.data.image_size
        with Image.open(point.picture) as grid:
            found = list(tiles(grid.convert("RGB"), side, side, GRID_COLUMNS))
        rows.append((point.name, found[:STRIP_SAMPLES]))
    if rows:
        save_picture(path, named_rows(rows))


def _checkpoint(config: Config) -> str:
    """Identity of the checkpoint to measure, by its list of hashes; empty where there is none."""
    chosen = [Path(config.checkpoint.load)] if config.checkpoint.load else []
    chosen = chosen or sorted((Path(config.run.dir) / CHECKPOINTS).glob("step_*"))
    manifest = chosen[-1] / MANIFEST if chosen else None
    if manifest is None or not manifest.exists():
        return ""
    return hashlib.sha256(manifest.read_bytes()).hexdigest()
