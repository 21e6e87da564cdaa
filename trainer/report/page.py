"""Write a run as one HTML page that needs no network."""

import base64
import io
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from data.secrets import public
from data.shards.codecs import BadSampleError, decode_image
from data.storage.atomic import write_atomic
from data.storage.untrusted import read_file
from trainer.config.choices import Task
from trainer.config.metrics import find_number
from trainer.config.tasks import TASKS
from trainer.pictures.charts import short_count, smoothed
from trainer.pictures.grids import Place, about_picture, places
from trainer.report.charts import (
    colour_name,
    evaluation_charts,
    metric_names,
    short,
    training_charts,
)
from trainer.report.tables import account, checkpoints, comparison, events, quarantine, sweeps
from trainer.runs.history import LARGEST, RunFolder, read_run
from trainer.runs.paths import REPORT

MOST_PICTURES = 24
DATA_URI = "data:image/webp;base64,"
PICTURE_SIDE, THUMBNAIL_SIDE = 1280, 160
TILE_WIDTH = 128
"""Width of one image of a grid on the page, in pixels, about."""
MAX_PICTURE_BYTES = 2**26
"""Largest picture that is read; the page holds a copy of at most PICTURE_SIDE pixels."""
QUIET_S = 900.0
"""A run has stopped if its last line is older than this and than three logging intervals."""


@dataclass(slots=True, kw_only=True)
class Tile:
    """One image of a grid, as the style of an element that shows this part of the picture."""

    caption: str
    style: str


@dataclass(slots=True, kw_only=True)
class Picture:
    """A sample grid as data URIs."""

    label: str
    uri: str
    thumbnail: str
    width: int
    tiles: list[Tile]
    """The images of the grid with their captions; empty if the PNG does not name them."""
    tile_width: int
    """Width of a tile on the page in pixels: that of the image, enlarged by a whole factor."""


@dataclass(slots=True, kw_only=True)
class Fact:
    """A number that the page shows as a card."""

    label: str
    value: str
    unit: str = ""
    note: str = ""


def write_page(run: Path, others: Sequence[Path]) -> Path:
    """Write report.html into the folder `run`; return its path.

    others: folders of runs whose curves are drawn into the same charts.
    Raises: OSError or ValueError that names a folder without a run.
    """
    page = run / REPORT
    runs = [read_run(path) for path in (run, *others)]
    write_atomic(page, render(runs, time.time()).encode(errors="replace"))
    return page


def render(runs: Sequence[RunFolder], now_s: float) -> str:
    """Return the HTML of the page of runs[0], with comparisons to the other runs.

    now_s: Unix time, to tell a running training from a stopped one.
    """
    run, pictures = runs[0], list(_pictures(runs[0]))
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    all_named = all(picture.tiles for picture in pictures)
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
        pictures_title=_pictures_title(run),
        prompts=prompts if isinstance(prompts, list) and not all_named else [],
        events=events(run),
        others=[(other.name, _newest_picture(other)) for other in runs[1:]],
        comparison=comparison(runs) if len(runs) > 1 else None,
        sweeps=list(sweeps(run)),
        checkpoints=checkpoints(run),
        quarantine=quarantine(run),
        account=account(run),
        colour=colour_name,
        written=time.strftime("%Y-%m-%d %H:%M", time.localtime(now_s)),
    )


def _shown(value: object) -> object:
    """Redact and escape each word of the page; Jinja escapes HTML afterwards."""
    if isinstance(value, Markup):
        return Markup(public(str(value)))
    is_text = isinstance(value, str | Path) and not str(value).startswith(DATA_URI)
    return public(str(value)) if is_text else value


# ---- words and numbers


def _status(run: RunFolder, now_s: float) -> tuple[str, str]:
    """Return the state of the run: its name in the style of the page, and a sentence."""
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
        about = find_number(name)
        best = (max if about.higher_is_better else min)(value for _, value in points)
        notes = [f"best {short(best)}"] if best != points[-1][1] else []
        references = [("shuffled", f"{name}_shuffled"), ("floor", f"floor/{name}")]
        for word, key in references:
            if (value := run.last(f"eval/{key}")) is not None:
                notes.append(f"{word} {short(value)}")
        if (untrained := run.untrained(f"eval/{name}")) is not None:
            notes.append(f"untrained {short(untrained)}")
        yield Fact(
            label=about.title,
            value=short(points[-1][1]),
            unit=about.unit,
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
    """Write a duration as one number with a unit."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    hours = seconds / 3600
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"


# ---- pictures


def _pictures_title(run: RunFolder) -> str:
    """Return the title of the pictures of the run's task; without a task, of diffusion."""
    titles = {str(task): entry.pictures for task, entry in TASKS.items()}
    return titles.get(str(run.config.get("task")), TASKS[Task.diffusion].pictures)


def _pictures(run: RunFolder) -> Iterator[Picture]:
    """Yield at most MOST_PICTURES pictures, newest first, with the first and the last one."""
    last = len(run.pictures) - 1
    most = min(len(run.pictures), MOST_PICTURES)
    for i in range(most, 0, -1):
        step, path = run.pictures[round(last * (i - 1) / max(most - 1, 1))]
        if picture := _picture(run, step, path):
            yield picture


def _newest_picture(run: RunFolder) -> Picture | None:
    return _picture(run, *run.pictures[-1]) if run.pictures else None


def _picture(run: RunFolder, step: int, path: Path) -> Picture | None:
    """Read a picture; None if it is damaged, too large, or no file of the run folder."""
    try:
        content = read_file(path, limit=MAX_PICTURE_BYTES, below=run.path)
        whole = decode_image(content)
    except (OSError, BadSampleError):
        return None
    size, found = whole.size, places(whole.size, about_picture(content))
    tile = found[0].box[2] - found[0].box[0] if found else 1
    whole.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    small = whole.copy()
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    return Picture(
        label=f"Step {step:,}",
        uri=_data_uri(whole, quality=90),
        thumbnail=_data_uri(small, quality=75),
        width=whole.width,
        tiles=[_tile(place, size) for place in found],
        tile_width=tile * max(1, round(TILE_WIDTH / tile)),
    )


def _tile(place: Place, size: tuple[int, int]) -> Tile:
    """Return the element that shows one image of a grid of this width and height."""
    width, height = size
    left, top, right, bottom = place.box
    # CSS: 0 % puts the left edges of picture and element together, 100 % the right edges
    x = 100 * left / max(width - (right - left), 1)
    y = 100 * top / max(height - (bottom - top), 1)
    return Tile(
        caption=place.caption,
        style=f"aspect-ratio: {right - left} / {bottom - top}; "
        f"background-position: {x:.4f}% {y:.4f}%; "
        f"background-size: {100 * width / (right - left):.4f}% "
        f"{100 * height / (bottom - top):.4f}%",
    )


def _data_uri(image: Image.Image, quality: int) -> str:
    file = io.BytesIO()
    image.save(file, "WEBP", quality=quality)
    return f"{DATA_URI}{base64.b64encode(file.getvalue()).decode()}"
