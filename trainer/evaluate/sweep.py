"""A sweep of evaluations: measure each point once, then write a table, a plot and pictures.

    sweeps/points/KEY.json, KEY.png   numbers and samples of a point; KEY: hash of its whole config
    sweeps/NAME/table.parquet         a row for each point: swept options, then numbers
    sweeps/NAME/table.md              the same table in Markdown
    sweeps/NAME/pareto.png            Fréchet distance against CLIP score
    sweeps/NAME/strip.png             the same samples at every point

NAME depends on the swept options and their values: the same command writes the same folder.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from data.secrets import public
from data.shards.codecs import MAX_IMAGE_BYTES, decode_image
from data.storage.atomic import write_atomic
from data.storage.documents import read_json
from data.storage.lease import NAME
from data.storage.untrusted import read_file
from trainer.checkpoints.reader import MAX_MANIFEST_BYTES, chosen_checkpoint
from trainer.config import Config
from trainer.config.metrics import axis_label
from trainer.metrics.evaluator import build_evaluator
from trainer.pictures.charts import save_pareto_chart
from trainer.pictures.grids import GAP, tiles
from trainer.pictures.png import save_picture, save_png
from trainer.pictures.sheets import named_rows
from trainer.pipeline import Pipeline
from trainer.runs.ownership import owned
from trainer.runs.paths import MANIFEST, SWEEPS, newest_checkpoint
from trainer.runs.record import plain_config
from trainer.runs.sweeps import TABLE, SweepTable
from trainer.runtime.ranks import join
from trainer.train.stop import StopRequest

STRIP_SAMPLES = 8


@dataclass(frozen=True, slots=True)
class Point:
    """One combination of the swept options."""

    options: Mapping[str, str]
    """Config path of a swept option → its value, in the spelling of the command line."""
    config: Config

    @property
    def name(self) -> str:
        """The values of the swept options, joined by spaces."""
        return " ".join(Path(value).name for value in self.options.values())

    @property
    def record(self) -> Path:
        """Path of the file of numbers; its name is a hash of the whole config."""
        text = json.dumps(plain_config(self.config), sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        return Path(self.config.run.dir) / SWEEPS / "points" / f"{key}.json"

    @property
    def picture(self) -> Path:
        """Path of the grid of samples."""
        return self.record.with_suffix(".png")

    def values(self) -> dict[str, Any] | None:
        """Return the numbers; None if this point was not measured, or with another checkpoint."""
        try:
            found = read_json(self.record, below=Path(self.config.run.dir))
            return found["values"] if found["checkpoint"] == _checkpoint(self.config) else None
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None


def measure_point(config: Config) -> None:
    """Evaluate one point of a sweep, unless its numbers exist.

    Raises: FileNotFoundError or ValueError that names the config path of missing data or weights;
    SystemExit if asked to stop, or if another process measures this point: it ends the whole sweep.
    """
    point, ranks = Point({}, config), join()
    stop = StopRequest(ranks, "batch")
    if any(ranks.gather(point.values() is not None)):
        if ranks.is_main:
            print(f"measured before: {point.record}")
        return
    record = point.record
    remedy = "sweep it later"
    with owned(record.parent, remedy, ranks, f".{record.stem}{NAME}"):
        checkpoint = chosen_checkpoint(config, ranks)
        evaluator = build_evaluator(config, ranks)
        pipeline = Pipeline.load(config, checkpoint, ranks.device)
        result = evaluator.evaluate(pipeline, stop.stopping)
        if result is None:
            raise SystemExit(stop.exit_code("measured points are saved"))
        if ranks.is_main:
            save_png(point.picture, result.picture, result.about)
            found = {
                "checkpoint": _identity(checkpoint.path),
                "values": {"step": checkpoint.step, **result.metrics},
            }
            write_atomic(record, (json.dumps(found, indent=1) + "\n").encode())


def summarise(combinations: Sequence[tuple[Mapping[str, str], Config]]) -> int:
    """Write the table, the plot and the strip of all points.

    combinations: (swept options, config) of each point.
    Returns the exit code: 0, or 1 if a point has no numbers. The same command measures those points
    alone.
    """
    points = [Point(public(options), config) for options, config in combinations]
    table = SweepTable(
        [(point.options, values) for point in points if (values := point.values()) is not None]
    )
    folder = Path(points[0].config.run.dir) / SWEEPS / _name(points)
    table.save(folder / TABLE)
    write_atomic(folder / "table.md", table.markdown().encode())
    if table.trade_offs:
        save_pareto_chart(folder / "pareto.png", table.trade_offs, *map(axis_label, table.axes))
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
    """Write a picture with a row of samples for each point."""
    rows: list[tuple[str, list[Image.Image]]] = []
    for point in points:
        side = point.config.data.image_size
        run = Path(point.config.run.dir)
        grid = decode_image(read_file(point.picture, limit=MAX_IMAGE_BYTES, below=run))
        found = list(tiles(grid, side, side, grid.width // (side + GAP)))
        rows.append((point.name, found[:STRIP_SAMPLES]))
    if rows:
        save_picture(path, named_rows(rows))


def _checkpoint(config: Config) -> str:
    """Return the SHA-256 of the checkpoint's manifest; empty if there is no checkpoint."""
    named = Path(config.checkpoint.load or config.run.dir)
    return _identity(newest_checkpoint(named) or named)


def _identity(checkpoint: Path) -> str:
    manifest = checkpoint / MANIFEST
    if not manifest.exists():
        return ""
    content = read_file(manifest, limit=MAX_MANIFEST_BYTES, below=checkpoint)
    return hashlib.sha256(content).hexdigest()
