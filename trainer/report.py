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
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image, UnidentifiedImageError

from trainer.charts import Line, Mark, line_chart, short_count, smoothed
from trainer.run_folder import LARGEST, RunFolder, read_run

MOST_PICTURES = 24
PICTURE_SIDE, THUMBNAIL_SIDE = 1280, 160
QUIET_S = 900.0
"""A run whose log is older than this, and than three intervals of its own, is not running."""

SERIES = 6
"""Colours of curves that the page's style knows: series-1, …"""

FEATURE_NAMES = {"inception": "Inception", "efficientnet_lite0": "EfficientNet-Lite0"}
UNITS = {"psnr_db": "dB"}
TITLES = {"clip_score": "CLIP score", "psnr_db": "PSNR of reconstructions"}
HIGHER_IS_BETTER = {"clip_score", "psnr_db"}
TRAINING_CHARTS = {
    "optim/lr": ("Learning rate", ""),
    "optim/grad_norm": ("Gradient norm", ""),
    "throughput/images_per_s": ("Throughput", "images/s"),
    "time/data_wait_pct": ("Data wait", "% of the time"),
}
FROM_ZERO = {"optim/lr", "throughput/images_per_s", "time/data_wait_pct"}


@dataclass(slots=True, kw_only=True)
class Key:
    """One entry of a chart's legend; colour is a CSS variable."""

    label: str
    colour: str
    style: str = "solid"


@dataclass(slots=True, kw_only=True)
class Chart:
    """A drawing with its words."""

    title: str
    svg: Markup
    unit: str = ""
    legend: list[Key] = field(default_factory=list)


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
        evaluation=list(_evaluation_charts(runs)),
        training=list(_training_charts(runs)),
        pictures=pictures,
        lost_pictures=min(len(run.pictures), MOST_PICTURES) - len(pictures),
        reconstructs=run.config.get("task") == "autoencoder",
        prompts=prompts if isinstance(prompts, list) else [],
        others=[(other.name, _newest_picture(other)) for other in runs[1:]],
        comparison=_comparison(runs) if len(runs) > 1 else None,
        colour=_colour,
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
    for name in _metrics(run):
        points = run.trained(f"eval/{name}")
        if not points:
            continue
        best = (max if name in HIGHER_IS_BETTER else min)(value for _, value in points)
        notes = [f"best {_short(best)}"] if best != points[-1][1] else []
        references = [("shuffled", f"{name}_shuffled"), ("floor", f"floor/{name}")]
        for word, key in references:
            if (value := run.last(f"eval/{key}")) is not None:
                notes.append(f"{word} {_short(value)}")
        if (untrained := run.untrained(f"eval/{name}")) is not None:
            notes.append(f"untrained {_short(untrained)}")
        yield Fact(
            label=_title(name),
            value=_short(points[-1][1]),
            unit=UNITS.get(name, ""),
            note=" · ".join(notes),
        )
    if loss := smoothed(run.points("train/loss")):
        yield Fact(label="Loss", value=_short(loss[-1][1]), note="smoothed")
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
        yield Fact(label="Throughput", value=_short(rate), unit="images/s", note=" · ".join(notes))
    if spent_s := _training_time_s(run):
        memory = run.last("memory/max_allocated_gib")
        note = f"{_short(memory)} GiB of memory" if memory is not None else ""
        value, unit = _duration(spent_s).split()
        yield Fact(label="Training time", value=value, unit=unit, note=note)


def _comparison(runs: Sequence[RunFolder]) -> tuple[list[str], list[list[str]]]:
    """A table's head, and a row for each run."""
    metrics = list(dict.fromkeys(name for run in runs for name in _metrics(run)))
    head = ["Run", "Steps", "Loss", *map(_title, metrics), "Images/s"]
    rows = []
    for run in runs:
        loss = smoothed(run.points("train/loss"))
        values = [loss[-1][1] if loss else None, *(run.last(f"eval/{name}") for name in metrics)]
        rate = run.last("throughput/images_per_s")
        rows.append([run.name, f"{run.last_step:,}", *map(_short, [*values, rate])])
    return head, rows


def _metrics(run: RunFolder) -> list[str]:
    """Names of the evaluation's metrics, without those that belong to another."""
    names = (key.removeprefix("eval/") for key in run.series if key.startswith("eval/"))
    companions = ("_shuffled", "_stderr", "num_samples")
    return [name for name in names if "/" not in name and not name.endswith(companions)]


def _title(name: str) -> str:
    if name.startswith("fd_"):
        features = name.removeprefix("fd_")
        kind = "FID" if features == "inception" else "Fréchet distance"
        return f"{kind} ({FEATURE_NAMES.get(features, features)})"
    return TITLES.get(name, name)


def _training_time_s(run: RunFolder) -> float:
    previous, total_s = 0, 0.0
    for step, step_s in run.points("time/step_s"):
        total_s += step_s * (step - previous)
        previous = step
    return total_s


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _duration(seconds: float) -> str:
    """One number and one unit."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    hours = seconds / 3600
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"


# ---- charts


def _colour(number: int) -> str:
    return f"series-{number % SERIES + 1}"


def _names(runs: Sequence[RunFolder]) -> list[Key]:
    """A legend of runs, where there is more than one."""
    keys = [Key(label=run.name, colour=_colour(i)) for i, run in enumerate(runs)]
    return keys if len(runs) > 1 else []


def _evaluation_charts(runs: Sequence[RunFolder]) -> Iterator[Chart]:
    """Each metric over the steps, between the untrained model and real images."""
    run = runs[0]
    for number, name in enumerate(dict.fromkeys(name for run in runs for name in _metrics(run))):
        lines, marks, legend = [], [], _names(runs)
        for i, other in enumerate(runs):
            points, error = other.trained(f"eval/{name}"), dict(other.points(f"eval/{name}_stderr"))
            band = [error.get(step, 0.0) for step, _ in points] if error else None
            lines.append(Line(points=points, colour=_colour(i), band=band))
        if shuffled := run.trained(f"eval/{name}_shuffled"):
            lines.append(Line(points=shuffled, colour="reference", style="dashed"))
            legend = legend or [Key(label="its own prompt, ± standard error", colour=_colour(0))]
            legend.append(Key(label="prompts of others", colour="reference", style="dashed"))
        for label, colour, value in (
            ("floor: real validation images", "floor", run.last(f"eval/floor/{name}")),
            ("untrained model", "untrained", run.untrained(f"eval/{name}")),
        ):
            if value is not None:
                marks.append(Mark(value=value, colour=colour, style="dotted"))
                legend.append(Key(label=f"{label}, {_short(value)}", colour=colour, style="dotted"))
        svg = line_chart(
            f"eval{number}", lines, marks, axis="from_zero" if name.startswith("fd_") else "linear"
        )
        yield Chart(title=_title(name), unit=UNITS.get(name, ""), svg=Markup(svg), legend=legend)


def _training_charts(runs: Sequence[RunFolder]) -> Iterator[Chart]:
    """The loss and its parts of the first run, then what all runs log."""
    run = runs[0]
    curves = [smoothed(other.points("train/loss")) for other in runs]
    if any(curves):
        raw = Line(points=run.points("train/loss"), colour=_colour(0), style="faint")
        lines = [Line(points=points, colour=_colour(i)) for i, points in enumerate(curves)]
        legend = _names(runs) or [
            Key(label="smoothed", colour=_colour(0)),
            Key(label="logged", colour=_colour(0), style="faint"),
        ]
        svg = line_chart("loss", [raw, *lines])
        yield Chart(title="Loss", svg=Markup(svg), legend=legend)
    by_timestep = [key for key in run.series if key.startswith("train/loss_by_timestep/")]
    if by_timestep:
        labels = [f"part {i + 1}" for i in range(len(by_timestep))]
        labels[0], labels[-1] = "least noise", "most noise"
        by_timestep.sort(key=lambda key: (len(key), key))
        colours = [_colour(i) for i in range(len(by_timestep))]
        lines = [
            Line(points=smoothed(run.points(key)), colour=colour)
            for key, colour in zip(by_timestep, colours, strict=True)
        ]
        legend = [Key(label=text, colour=c) for text, c in zip(labels, colours, strict=True)]
        svg = line_chart("timesteps", lines)
        yield Chart(title="Loss by timestep", svg=Markup(svg), legend=legend)
    parts = [key for key in run.series if key.startswith("train/") and key.count("/") == 1]
    titles = {key: (key.removeprefix("train/"), "") for key in parts if key != "train/loss"}
    for number, (key, (title, unit)) in enumerate((titles | TRAINING_CHARTS).items()):
        curves = [other.points(key) for other in runs]
        if any(curves):
            lines = [Line(points=points, colour=_colour(i)) for i, points in enumerate(curves)]
            svg = line_chart(
                f"train{number}", lines, axis="from_zero" if key in FROM_ZERO else "any"
            )
            yield Chart(title=title, unit=unit, svg=Markup(svg), legend=_names(runs))


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
