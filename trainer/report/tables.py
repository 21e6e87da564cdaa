"""The tables of a report: runs side by side, sweeps, checkpoints, replaced samples."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from data.storage.documents import DocumentError, is_json_array, is_json_object, parse_json
from data.storage.untrusted import read_text
from data.text import printable
from trainer.config.metrics import axis_label, find_number, title_and_unit
from trainer.pictures.charts import pareto_chart, smoothed
from trainer.report.charts import Chart, metric_names, short
from trainer.runs.data_set import read_data_set
from trainer.runs.history import Event, RunFolder
from trainer.runs.paths import CHECKPOINTS, MANIFEST, QUARANTINE, STEPS, SWEEPS
from trainer.runs.sweeps import TABLE, SweepTable

GIB = 2**30
MAX_BYTES = 2**26
"""Largest manifest of a checkpoint, and largest list of replaced samples, that is read."""
MOST_ROWS = 50
"""Most rows in the tables of events and replaced samples; they show the newest."""


@dataclass(slots=True, kw_only=True)
class Table:
    """A table of words."""

    head: list[str]
    rows: list[list[str]]
    note: str = ""


@dataclass(slots=True, kw_only=True)
class Sweep:
    """The table of a sweep, and its Pareto chart if both of its numbers were measured."""

    name: str
    table: Table
    chart: Chart | None


def comparison(runs: Sequence[RunFolder]) -> Table:
    """Return a table with a row for each run."""
    metrics = list(dict.fromkeys(name for run in runs for name in metric_names(run)))
    head = ["Run", "Steps", "Loss", *(find_number(name).title for name in metrics), "Images/s"]
    rows: list[list[str]] = []
    for run in runs:
        loss = smoothed(run.points("train/loss"))
        values = [loss[-1][1] if loss else None, *(run.last(f"eval/{name}") for name in metrics)]
        rate = run.last("throughput/images_per_s")
        rows.append([run.name, f"{run.last_step:,}", *map(short, [*values, rate])])
    return Table(head=head, rows=rows)


def sweeps(run: RunFolder) -> Iterator[Sweep]:
    """Yield the sweeps over this run's checkpoints; skip damaged tables."""
    for number, path in enumerate(sorted((run.path / SWEEPS).glob(f"*/{TABLE}"))):
        try:
            found = SweepTable.load(path, below=run.path)
        except (OSError, ValueError, KeyError, TypeError):
            continue
        head, rows = found.shown()
        chart = None
        if found.trade_offs:
            distance, score = (find_number(name).title for name in found.axes)
            labels = map(axis_label, found.axes)
            svg = pareto_chart(f"sweep{number}", found.trade_offs, *labels)
            title = f"{distance} against {score}, best to the upper left"
            chart = Chart(title=title, svg=Markup(svg))
        titled = [name if name in found.options else title_and_unit(name) for name in head]
        yield Sweep(name=path.parent.name, table=Table(head=titled, rows=rows), chart=chart)


def checkpoints(run: RunFolder) -> Table | None:
    """List the checkpoints, newest first; None if there are none."""
    rows: list[list[str]] = []
    for path in sorted((run.path / CHECKPOINTS).glob(f"{STEPS}/{MANIFEST}"), reverse=True):
        try:
            files = _json(read_text(path, limit=MAX_BYTES, below=run.path)).get("files")
            written = time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
        except (OSError, OverflowError, ValueError):  # times beyond the calendar are overflows
            continue
        if is_json_object(files):
            size = sum(map(_stated_bytes, files.values()))
            rows.append([path.parent.name, written, f"{size / GIB:.3g}", str(len(files))])
    head = ["Checkpoint", "Written", "GiB", "Files"]
    return Table(head=head, rows=rows) if rows else None


def events(run: RunFolder) -> Table | None:
    """List starts, outages and incidents, newest first; None if there are none."""
    rows = [
        [_when(event), "–" if event.step is None else f"{event.step:,}", event.what, event.details]
        for event in run.events[-MOST_ROWS:][::-1]
    ]
    return Table(head=["Time", "Step", "Event", "More"], rows=rows) if rows else None


def _when(event: Event) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.time_s))
    except (OverflowError, ValueError):  # beyond the calendar
        return "–"


def quarantine(run: RunFolder) -> Table | None:
    """List samples that could not be read and were replaced; None if there are none."""
    try:
        text = read_text(run.path / QUARANTINE, limit=MAX_BYTES, below=run.path)
    except OSError:
        return None
    entries = [entry for entry in map(_json, text.splitlines()) if entry]
    if not entries:
        return None
    reasons = Counter(printable(str(entry.get("reason"))) for entry in entries).most_common(5)
    rows = [
        [printable(str(entry.get(name))) for name in ("key", "shard", "reason")]
        for entry in entries[-MOST_ROWS:][::-1]
    ]
    counts = "; ".join(f"{count:,} × {reason}" for reason, count in reasons)
    return Table(
        head=["Sample", "Shard", "Reason"], rows=rows, note=f"{len(entries):,} in all: {counts}"
    )


def account(run: RunFolder) -> Table | None:
    """List what became of the samples of the data set; None for a run that does not tell it."""
    try:
        found = read_data_set(run.path)
    except (OSError, ValueError):
        return None
    left_out = found.get("left_out")
    entries = [one for one in left_out if is_json_object(one)] if is_json_array(left_out) else []
    rows = [
        [
            printable(str(entry.get("fate"))),
            _count(entry.get("count")),
            printable(str(entry.get("reason"))),
            printable(", ".join(map(str, _list(entry.get("examples"))))),
        ]
        for entry in entries[:MOST_ROWS]
    ]
    noted = found.get("noted")
    remarks = noted.items() if is_json_object(noted) else ()
    rows += [["noted", _count(count), printable(str(remark)), ""] for remark, count in remarks]
    if not found:
        return None
    numbers = _count(found.get("found")), _count(found.get("samples"))
    note = "Of {} samples found, {} are used.".format(*numbers)
    return Table(head=["", "Samples", "Reason", "Examples"], rows=rows, note=note)


def _count(value: object) -> str:
    return f"{value:,}" if type(value) is int else "–"


def _list(value: object) -> list[Any]:
    return value if is_json_array(value) else []


def _stated_bytes(entry: object) -> int:
    """Return the size in a manifest's entry; 0 where it is none."""
    size: object = entry.get("bytes") if is_json_object(entry) else None
    return size if type(size) is int and 0 <= size < 2**63 else 0


def _json(text: str) -> dict[str, Any]:
    try:
        found: object = parse_json(text, limit=MAX_BYTES)
    except DocumentError:
        return {}
    return found if is_json_object(found) else {}
