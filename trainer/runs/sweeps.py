"""The table of a sweep: one row for each point, stored as parquet."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pyarrow
import pyarrow.parquet

from data.storage.atomic import atomic_path
from data.storage.documents import is_json_array, parse_json
from data.storage.parquet import read_file_metadata, read_parquet
from data.storage.untrusted import read_file

arrow: Any = pyarrow  # without type stubs
parquet: Any = pyarrow.parquet

TABLE = "table.parquet"
"""Name of the table in the folder of a sweep."""
MAX_TABLE_BYTES, MAX_ROWS = 2**24, 10_000
"""Largest table that is read."""
SWEPT = b"swept"
"""Key of the file's metadata that lists the columns of options, as a JSON list."""
SCORE = "clip_score"
"""Column of the score in a trade-off."""
HIDDEN = ("_stderr", "_std", "num_samples", "protocol", "step")
"""Ends of the names of columns that Markdown tables and reports leave out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TradeOff:
    """One point of the trade-off between a distance (lower is better) and a score (higher is)."""

    name: str
    distance: float
    score: float
    distance_error: float = 0.0
    score_error: float = 0.0
    """Standard errors; 0 if they were not measured."""


def pareto_front(trade_offs: Sequence[TradeOff]) -> list[TradeOff]:
    """Return the points that no other point beats in both values, in order of distances."""
    front: list[TradeOff] = []
    for trade_off in sorted(trade_offs, key=lambda t: (t.distance, -t.score)):
        if not front or trade_off.score > front[-1].score:
            front.append(trade_off)
    return front


class SweepTable:
    """The points of a sweep, with their options and numbers.

    axes: names of the columns of distance and score; the distance is the first Fréchet distance,
    empty without one. trade_offs: the points with both numbers. best: names of the points on the
    Pareto front.
    """

    def __init__(self, rows: Sequence[tuple[Mapping[str, str], Mapping[str, Any]]]) -> None:
        """rows: (options by config path, numbers by metric name) of each point."""
        self.options: list[str] = list(dict.fromkeys(key for options, _ in rows for key in options))
        self.metrics: list[str] = list(dict.fromkeys(key for _, values in rows for key in values))
        self.rows: list[dict[str, Any]] = [{**options, **values} for options, values in rows]
        distance = next((name for name in self.metrics if name.startswith("fd_")), "")
        self.axes = (distance, SCORE)
        self.trade_offs = [
            TradeOff(
                name=self._label(row),
                distance=row[distance],
                score=row[SCORE],
                distance_error=row.get(f"{distance}_stderr") or 0.0,
                score_error=row.get(f"{SCORE}_stderr") or 0.0,
            )
            for row in self.rows
            if row.get(distance) is not None and row.get(SCORE) is not None
        ]
        self.best = {trade_off.name for trade_off in pareto_front(self.trade_offs)}

    @classmethod
    def load(cls, path: Path, *, below: Path | None = None) -> Self:
        """Read a table.

        below: folder that the file must lie in; see `open_regular`.
        Raises: OSError if the file cannot be read; ValueError if it is no table of a sweep.
        """
        content = read_file(path, limit=MAX_TABLE_BYTES, below=below)
        swept: object = parse_json(read_file_metadata(content).get(SWEPT, b"[]"))
        rows = list(read_parquet(content, list, max_rows=MAX_ROWS))
        if not is_json_array(swept) or (rows and not rows[0].keys() >= set(swept)):
            raise ValueError(f"{path} does not say which of its columns are options")
        return cls(
            [
                (
                    {key: str(row[key]) for key in swept},
                    {key: value for key, value in row.items() if key not in swept},
                )
                for row in rows
            ]
        )

    def save(self, path: Path) -> None:
        """Write the rows as parquet.

        Raises: OSError if the file cannot be written.
        """
        columns = {key: [row.get(key) for row in self.rows] for key in self.head}
        file = arrow.table(columns).replace_schema_metadata({SWEPT: json.dumps(self.options)})
        with atomic_path(path) as part:
            parquet.write_table(file, part)

    @property
    def head(self) -> list[str]:
        """Names of all columns, options first."""
        return self.options + self.metrics

    def shown(self) -> tuple[list[str], list[list[str]]]:
        """Return column names and rows as text for people; a star marks the Pareto front."""
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
        """Return the columns and rows of `shown` as an aligned Markdown table."""
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
    """Escape a word for one cell on one line."""
    return " ".join(word.split()).replace("|", r"\|")


def _word(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
