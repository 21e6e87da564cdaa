"""The table of a sweep: a row a point, kept as parquet so that other programs can read it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from trainer.charts import Trial, pareto_front

FOLDER, TABLE = "sweeps", "table.parquet"
"""In a run's folder, and in each sweep's below it."""
SWEPT = b"swept"
"""Key of the file's metadata: which columns are options, as a JSON list."""
SCORE = "clip_score"
HIDDEN = ("_stderr", "_std", "num_samples", "protocol", "step")
"""Ends of the names that the table for people leaves out."""


class SweepTable:
    """Points with their options and numbers.

    axes: labels of the trade-off between a Fréchet distance and the CLIP score; trials: the points
    in it, none where one of the two was not measured. best: names of those on the Pareto front.
    """

    def __init__(self, rows: Sequence[tuple[Mapping[str, str], Mapping[str, Any]]]) -> None:
        """rows: (options by config path, numbers by metric name) of each point."""
        self.options = list(dict.fromkeys(key for options, _ in rows for key in options))
        self.metrics = list(dict.fromkeys(key for _, values in rows for key in values))
        self.rows = [{**options, **values} for options, values in rows]
        distance = next((name for name in self.metrics if name.startswith("fd_")), "")
        self.axes = (distance, SCORE)
        self.trials = [
            Trial(name=self._label(row), distance=row[distance], score=row[SCORE])
            for row in self.rows
            if row.get(distance) is not None and row.get(SCORE) is not None
        ]
        self.best = {trial.name for trial in pareto_front(self.trials)}

    @classmethod
    def load(cls, path: Path) -> Self:
        """Raises ValueError or OSError where there is no such table."""
        file = pq.read_table(path)
        swept = json.loads((file.schema.metadata or {}).get(SWEPT, b"[]"))
        rows = [
            (
                {key: str(row[key]) for key in swept},
                {key: value for key, value in row.items() if key not in swept},
            )
            for row in file.to_pylist()
        ]
        return cls(rows)

    def save(self, path: Path) -> None:
        """Write the rows as parquet."""
        columns = {key: [row.get(key) for row in self.rows] for key in self.head}
        file = pa.table(columns).replace_schema_metadata({SWEPT: json.dumps(self.options)})
        part = path.with_suffix(".part")
        pq.write_table(file, part)
        part.replace(path)

    @property
    def head(self) -> list[str]:
        """All columns: options first."""
        return self.options + self.metrics

    def shown(self) -> tuple[list[str], list[list[str]]]:
        """What people see of it: a head and rows of words, the Pareto front marked by a star."""
        columns = [name for name in self.head if not name.endswith(HIDDEN)]
        rows = [
            [
                *(_word(row.get(name)) for name in columns),
                "★" if self._label(row) in self.best else "",
            ]
            for row in self.rows
        ]
        return [*columns, "Pareto"], rows

    def markdown(self) -> str:
        """The same in Markdown, aligned."""
        head, rows = self.shown()
        lines = [[_cell(word) for word in line] for line in (head, *rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        lines.insert(1, ["-" * width for width in widths])
        return "".join(
            "| "
            + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
            + " |\n"
            for line in lines
        )

    def _label(self, row: Mapping[str, Any]) -> str:
        return " ".join(Path(str(row[name])).name for name in self.options)


def _cell(word: str) -> str:
    """On one line, and not two cells."""
    return " ".join(word.split()).replace("|", r"\|")


def _word(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
