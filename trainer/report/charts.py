"""The charts of a report: evaluations and training over the steps, and sweeps."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from trainer.config.metrics import find_number
from trainer.pictures.charts import Line, Mark, Moment, line_chart, smoothed
from trainer.runs.history import RunFolder

MOST_MOMENTS = 50
"""Largest number of vertical lines in a chart: the newest."""
SERIES = 6
"""Number of colours for curves in the style of the page: series-1, …"""

TRAINING_CHARTS = {
    "optim/lr": ("Learning rate", ""),
    "optim/grad_norm": ("Gradient norm", ""),
    "throughput/images_per_s": ("Throughput", "images/s"),
    "time/data_wait_pct": ("Data wait", "% of the time"),
}
FROM_ZERO = {"optim/lr", "throughput/images_per_s", "time/data_wait_pct"}


@dataclass(slots=True, kw_only=True)
class Key:
    """One entry of a legend."""

    label: str
    colour: str
    """Name of a CSS variable of the page."""
    style: str = "solid"


@dataclass(slots=True, kw_only=True)
class Chart:
    """A drawing with its title, unit and legend."""

    title: str
    svg: Markup
    unit: str = ""
    legend: list[Key] = field(default_factory=list[Key])


def metric_names(run: RunFolder) -> list[str]:
    """Return the names of a run's metrics, without standard errors and other secondary numbers."""
    names = (key.removeprefix("eval/") for key in run.series if key.startswith("eval/"))
    companions = ("_shuffled", "_stderr", "_std", "num_samples")
    return [name for name in names if "/" not in name and not name.endswith(companions)]


def short(value: float | None) -> str:
    """Write a number with three digits; None is a dash."""
    return "–" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def colour_name(number: int) -> str:
    """Return the CSS variable of curve `number`."""
    return f"series-{number % SERIES + 1}"


def _moments(run: RunFolder) -> tuple[list[Moment], list[Key]]:
    """Return the steps at which a run went on from a checkpoint, or went back, and their legend."""
    moments: list[Moment] = []
    legend: dict[str, Key] = {}
    for event in run.events[-MOST_MOMENTS:]:
        if event.step is None or not (event.resumes or event.back_to is not None):
            continue
        colour, label = ("muted", "resumed") if event.resumes else ("bad", "went back")
        moments.append(Moment(step=event.step, colour=colour, style="dotted"))
        legend[label] = Key(label=label, colour=colour, style="dotted")
    return moments, list(legend.values())


def _names(runs: Sequence[RunFolder]) -> list[Key]:
    """Return a legend with the names of the runs; empty for one run."""
    keys = [Key(label=run.name, colour=colour_name(i)) for i, run in enumerate(runs)]
    return keys if len(runs) > 1 else []


def evaluation_charts(runs: Sequence[RunFolder]) -> Iterator[Chart]:
    """Draw each metric over the steps, with marks for the untrained model and for real images.

    runs: the first is the run of the page; the others are for comparison.
    """
    run = runs[0]
    moments, keys = _moments(run)
    names = dict.fromkeys(name for run in runs for name in metric_names(run))
    for number, name in enumerate(names):
        lines: list[Line] = []
        marks: list[Mark] = []
        legend = _names(runs)
        for i, other in enumerate(runs):
            points, error = other.trained(f"eval/{name}"), dict(other.points(f"eval/{name}_stderr"))
            band = [error.get(step, 0.0) for step, _ in points] if error else None
            lines.append(Line(points=points, colour=colour_name(i), band=band))
        if shuffled := run.trained(f"eval/{name}_shuffled"):
            lines.append(Line(points=shuffled, colour="reference", style="dashed"))
            legend = legend or [
                Key(label="its own prompt, ± standard error", colour=colour_name(0))
            ]
            legend.append(Key(label="prompts of others", colour="reference", style="dashed"))
        for label, colour, value in (
            ("floor: real validation images", "floor", run.last(f"eval/floor/{name}")),
            ("untrained model", "untrained", run.untrained(f"eval/{name}")),
        ):
            if value is not None:
                marks.append(Mark(value=value, colour=colour, style="dotted"))
                legend.append(Key(label=f"{label}, {short(value)}", colour=colour, style="dotted"))
        about = find_number(name)
        axis = "from_zero" if about.from_zero else "linear"
        svg = line_chart(f"eval{number}", lines, marks, moments, axis=axis)
        yield Chart(title=about.title, unit=about.unit, svg=Markup(svg), legend=legend + keys)


def training_charts(runs: Sequence[RunFolder]) -> Iterator[Chart]:
    """Draw the losses, and the numbers of TRAINING_CHARTS.

    runs: the first is the run of the page; the others are for comparison.
    """
    run = runs[0]
    moments, keys = _moments(run)
    curves = [smoothed(other.points("train/loss")) for other in runs]
    if any(curves):
        raw = Line(points=run.points("train/loss"), colour=colour_name(0), style="faint")
        lines = [Line(points=points, colour=colour_name(i)) for i, points in enumerate(curves)]
        legend = _names(runs) or [
            Key(label="smoothed", colour=colour_name(0)),
            Key(label="logged", colour=colour_name(0), style="faint"),
        ]
        svg = line_chart("loss", [raw, *lines], moments=moments)
        yield Chart(title="Loss", svg=Markup(svg), legend=legend + keys)
    by_timestep = [key for key in run.series if key.startswith("train/loss_by_timestep/")]
    if by_timestep:
        labels = [f"part {i + 1}" for i in range(len(by_timestep))]
        labels[0], labels[-1] = "least noise", "most noise"
        by_timestep.sort(key=lambda key: (len(key), key))
        colours = [colour_name(i) for i in range(len(by_timestep))]
        lines = [
            Line(points=smoothed(run.points(key)), colour=colour)
            for key, colour in zip(by_timestep, colours, strict=True)
        ]
        legend = [Key(label=text, colour=c) for text, c in zip(labels, colours, strict=True)]
        svg = line_chart("timesteps", lines, moments=moments)
        yield Chart(title="Loss by timestep", svg=Markup(svg), legend=legend + keys)
    parts = [key for key in run.series if key.startswith("train/") and key.count("/") == 1]
    titles = {key: (key.removeprefix("train/"), "") for key in parts if key != "train/loss"}
    for number, (key, (title, unit)) in enumerate((titles | TRAINING_CHARTS).items()):
        curves = [other.points(key) for other in runs]
        if any(curves):
            lines = [Line(points=points, colour=colour_name(i)) for i, points in enumerate(curves)]
            axis = "from_zero" if key in FROM_ZERO else "any"
            svg = line_chart(f"train{number}", lines, moments=moments, axis=axis)
            yield Chart(title=title, unit=unit, svg=Markup(svg), legend=_names(runs) + keys)
