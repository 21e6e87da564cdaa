"""A run folder → one HTML page that needs no network: python -m trainer.report RUN_FOLDER [OTHER…].

The first folder is the page's run; the others are drawn into its charts for comparison.
"""

import argparse
import base64
import io
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image, UnidentifiedImageError

from trainer.charts import short_count, smoothed
from trainer.report_charts import (
    HIGHER_IS_BETTER,
    UNITS,
    colour_name,
    evaluation_charts,
    metric_names,
    metric_title,
    short,
    training_charts,
)
from trainer.report_tables import checkpoints, comparison, quarantine, sweeps
from trainer.run_folder import LARGEST, RunFolder, read_run

MOST_PICTURES = 24
PICTURE_SIDE, THUMBNAIL_SIDE = 1280, 160
QUIET_S = 900.0
"""A run whose log is older than this, and than three intervals of its own, is not running."""


@dataclass(slots=True, kw_only=True)
class Picture:
    """A sample grid as data URIs."""

    label: str
    uri: str
    thumbnail: str
    width: int


@dataclass(slots=True, kw_only=True)
class Fact:
    """A number worth a card."""

    label: str
    value: str
    unit: str = ""
    note: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Write RUN_FOLDER/report.html; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m trainer.report", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN_FOLDER", help="the run; gets report.html")
    parser.add_argument(
        "others", type=Path, nargs="*", metavar="OTHER", help="runs to compare it with"
    )
    arguments = parser.parse_args(argv)
    try:
        runs = [read_run(path) for path in (arguments.run, *arguments.others)]
        page = arguments.run / "report.html"
        unfinished = page.with_name(f".report.{os.getpid()}.tmp")
        unfinished.write_text(render(runs, time.time()), encoding="utf-8", errors="replace")
        unfinished.replace(page)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(page)
    return 0


def render(runs: Sequence[RunFolder], now_s: float) -> str:
    """The page of runs[0], compared with the rest; now_s is Unix time."""
    run, pictures = runs[0], list(_pictures(runs[0]))
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    max_steps, prompts = run.number("train", "max_steps"), run.section("eval").get("prompts")
    return environment.get_template("report.html.jinja").render(
        run=run,
        status=_status(run, now_s),
        max_steps=max_steps,
        facts=list(_facts(run)),
        evaluation=list(evaluation_charts(runs)),
        training=list(training_charts(runs)),
        pictures=pictures,
        lost_pictures=min(len(run.pictures), MOST_PICTURES) - len(pictures),
        reconstructs=run.config.get("task") == "autoencoder",
        prompts=prompts if isinstance(prompts, list) else [],
        others=[(other.name, _newest_picture(other)) for other in runs[1:]],
        comparison=comparison(runs) if len(runs) > 1 else None,
        sweeps=list(sweeps(run)),
        checkpoints=checkpoints(run),
        quarantine=quarantine(run),
        colour=colour_name,
        written=time.strftime("%Y-%m-%d %H:%M", time.localtime(now_s)),
    )


# ---- words and numbers


def _status(run: RunFolder, now_s: float) -> tuple[str, str]:
    """A word for the style, and a sentence."""
    max_steps = run.number("train", "max_steps")
    step, loss = max(run.series.get("train/loss", {}).items(), default=(0, 0.0))
    if not abs(loss) < LARGEST:
        return "bad", f"Diverged: the loss of step {step:,} is {loss:.3g}"
    if max_steps is not None and run.last_step >= max_steps:
        return "good", "Finished"
    step_s = run.last("time/step_s") or 0.0
    interval_s = step_s * (run.number("train", "log_every") or 1)
    if now_s - run.written_s > max(QUIET_S, 3 * interval_s):
        return "idle", f"Not finished; silent for {_duration(now_s - run.written_s)}"
    left = f", about {_duration(step_s * (max_steps - run.last_step))} left" if max_steps else ""
    return "busy", f"Running{left}"


def _facts(run: RunFolder) -> Iterator[Fact]:
    for name in metric_names(run):
        points = run.trained(f"eval/{name}")
        if not points:
            continue
        best = (max if name in HIGHER_IS_BETTER else min)(value for _, value in points)
        notes = [f"best {short(best)}"] if best != points[-1][1] else []
        references = [("shuffled", f"{name}_shuffled"), ("floor", f"floor/{name}")]
        for word, key in references:
            if (value := run.last(f"eval/{key}")) is not None:
                notes.append(f"{word} {short(value)}")
        if (untrained := run.untrained(f"eval/{name}")) is not None:
            notes.append(f"untrained {short(untrained)}")
        yield Fact(
            label=metric_title(name),
            value=short(points[-1][1]),
            unit=UNITS.get(name, ""),
            note=" · ".join(notes),
        )
    if loss := smoothed(run.points("train/loss")):
        yield Fact(label="Loss", value=short(loss[-1][1]), note="smoothed")
    if batch := run.number("train", "global_batch_size"):
        yield Fact(
            label="Images seen",
            value=short_count(run.last_step * batch),
            note=f"{run.last_step:,} steps of {batch:,.0f}",
        )
    if (rate := run.last("throughput/images_per_s")) is not None:
        wait, mfu = run.last("time/data_wait_pct"), run.last("throughput/mfu_pct")
        notes = [f"data wait {wait:.1f} %"] if wait is not None else []
        notes += [f"MFU {mfu:.1f} %"] if mfu is not None else []
        yield Fact(label="Throughput", value=short(rate), unit="images/s", note=" · ".join(notes))
    if spent_s := _training_time_s(run):
        memory = run.last("memory/max_allocated_gib")
        note = f"{short(memory)} GiB of memory" if memory is not None else ""
        value, unit = _duration(spent_s).split()
        yield Fact(label="Training time", value=value, unit=unit, note=note)


def _training_time_s(run: RunFolder) -> float:
    previous, total_s = 0, 0.0
    for step, step_s in run.points("time/step_s"):
        total_s += step_s * (step - previous)
        previous = step
    return total_s


def _duration(seconds: float) -> str:
    """One number and one unit."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    hours = seconds / 3600
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"


# ---- pictures


def _pictures(run: RunFolder) -> Iterator[Picture]:
    """Newest first; of many, a selection over the whole run with its first and last."""
    last = len(run.pictures) - 1
    most = min(len(run.pictures), MOST_PICTURES)
    for i in range(most, 0, -1):
        step, path = run.pictures[round(last * (i - 1) / max(most - 1, 1))]
        if picture := _picture(step, path):
            yield picture


def _newest_picture(run: RunFolder) -> Picture | None:
    return _picture(*run.pictures[-1]) if run.pictures else None


def _picture(step: int, path: Path) -> Picture | None:
    """None where the file is no picture, or one that is still being written."""
    try:
        with Image.open(path) as image:
            whole = image.convert("RGB")
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError):
        return None
    whole.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    small = whole.copy()
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    return Picture(
        label=f"Step {step:,}",
        uri=_data_uri(whole, quality=90),
        thumbnail=_data_uri(small, quality=75),
        width=whole.width,
    )


def _data_uri(image: Image.Image, quality: int) -> str:
    file = io.BytesIO()
    image.save(file, "WEBP", quality=quality)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


if __name__ == "__main__":
    raise SystemExit(main())
