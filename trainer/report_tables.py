"""The tables of a report: runs side by side, sweeps, checkpoints, replaced samples."""

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from markupsafe import Markup

from trainer.charts import pareto_chart, smoothed
from trainer.report_charts import Chart, metric_names, metric_title, short
from trainer.run_folder import CHECKPOINTS, MANIFEST, QUARANTINE, RunFolder
from trainer.sweep_table import FOLDER, TABLE, SweepTable

GIB = 2**30
MOST_ROWS = 50
"""Of a list of replaced samples; the newest."""


@dataclass(slots=True, kw_only=True)
class Table:
    """A head, and rows of words."""

    head: list[str]
    rows: list[list[str]]
    note: str = ""


@dataclass(slots=True, kw_only=True)
class Sweep:
    """A table of points and, where both its figures were measured, their trade-off."""

    name: str
    table: Table
    chart: Chart | None


def comparison(runs: Sequence[RunFolder]) -> Table:
    """A row for each run."""
    metrics = list(dict.fromkeys(name for run in runs for name in metric_names(run)))
    head = ["Run", "Steps", "Loss", *map(metric_title, metrics), "Images/s"]
    rows = []
    for run in runs:
        loss = smoothed(run.points("train/loss"))
        values = [loss[-1][1] if loss else None, *(run.last(f"eval/{name}") for name in metrics)]
        rate = run.last("throughput/images_per_s")
        rows.append([run.name, f"{run.last_step:,}", *map(short, [*values, rate])])
    return Table(head=head, rows=rows)


def sweeps(run: RunFolder) -> Iterator[Sweep]:
    """The sweeps over this run's checkpoints; damaged tables are passed over."""
    for number, path in enumerate(sorted((run.path / FOLDER).glob(f"*/{TABLE}"))):
        try:
            found = SweepTable.load(path)
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
            continue
        head, rows = found.shown()
        chart = None
        if found.trials:
            distance, score = (metric_title(name) for name in found.axes)
            svg = pareto_chart(f"sweep{number}", found.trials, distance, score)
            title = f"{distance} against {score}, best to the upper left"
            chart = Chart(title=title, svg=Markup(svg))
        titled = [name if name in found.options else metric_title(name) for name in head]
        yield Sweep(name=path.parent.name, table=Table(head=titled, rows=rows), chart=chart)


def checkpoints(run: RunFolder) -> Table | None:
    """What can be resumed from, newest first; None where there is nothing."""
    rows = []
    for path in sorted((run.path / CHECKPOINTS).glob(f"step_*/{MANIFEST}"), reverse=True):
        manifest = _json(path.read_text(encoding="utf-8", errors="replace"))
        files = manifest.get("files")
        if isinstance(files, dict):
            size = sum(entry.get("bytes", 0) for entry in files.values() if isinstance(entry, dict))
            written = time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
            rows.append([path.parent.name, written, f"{size / GIB:.3g}", str(len(files))])
    head = ["Checkpoint", "Written", "GiB", "Files"]
    return Table(head=head, rows=rows) if rows else None


def quarantine(run: RunFolder) -> Table | None:
    """Samples that could not be read and were replaced; None where there are none."""
    path = run.path / QUARANTINE
    if not path.is_file():
        return None
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    entries = [entry for entry in map(_json, lines) if entry]
    if not entries:
        return None
    reasons = Counter(str(entry.get("reason")) for entry in entries).most_common(5)
    rows = [
        [str(entry.get(name)) for name in ("key", "shard", "reason")]
        for entry in entries[-MOST_ROWS:][::-1]
    ]
    counts = "; ".join(f"{count:,} × {reason}" for reason, count in reasons)
    return Table(
        head=["Sample", "Shard", "Reason"], rows=rows, note=f"{len(entries):,} in all: {counts}"
    )


def _json(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
