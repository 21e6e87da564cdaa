"""The charts of a report: evaluations and training over the steps, and sweeps."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from trainer.charts import Line, Mark, line_chart, smoothed
from trainer.run_folder import RunFolder

SERIES = 6
"""Colours of curves that the page's style knows: series-1, …"""

FEATURE_NAMES = {
    "inception": "Inception",
    "efficientnet_lite0": "EfficientNet-Lite0",
    "dinov2": "DINOv2",
    "open_clip": "CLIP",
}
OF_FEATURES = {"kid": "KID", "precision": "Precision", "recall": "Recall"}
"""Metrics of any features, beside the Fréchet distance."""
UNITS = {"psnr_db": "dB"}
TITLES = {
    "clip_score": "CLIP score",
    "psnr_db": "PSNR of reconstructions",
    "inception_score": "Inception score",
    "cmmd": "CMMD",
}
HIGHER_IS_BETTER = {"clip_score", "psnr_db", "inception_score"} | {
    f"{metric}_{features}" for metric in ("precision", "recall") for features in FEATURE_NAMES
}
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


def metric_names(run: RunFolder) -> list[str]:
    """Names of the evaluation's metrics, without those that belong to another."""
    names = (key.removeprefix("eval/") for key in run.series if key.startswith("eval/"))
    companions = ("_shuffled", "_stderr", "_std", "num_samples")
    return [name for name in names if "/" not in name and not name.endswith(companions)]


def metric_title(name: str) -> str:
    """What people call a metric; its name where they have no other."""
    if name.startswith("fd_"):
        features = name.removeprefix("fd_")
        kind = "FID" if features == "inception" else "Fréchet distance"
        return f"{kind} ({FEATURE_NAMES.get(features, features)})"
    metric, _, features = name.partition("_")
    if metric in OF_FEATURES:
        return f"{OF_FEATURES[metric]} ({FEATURE_NAMES.get(features, features)})"
    return TITLES.get(name, name)


def short(value: float | None) -> str:
    """Three digits; a dash for None."""
    return "–" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def colour_name(number: int) -> str:
    """The CSS variable of curve `number`."""
    return f"series-{number % SERIES + 1}"


def _names(runs: Sequence[RunFolder]) -> list[Key]:
    """A legend of runs, where there is more than one."""
    keys = [Key(label=run.name, colour=colour_name(i)) for i, run in enumerate(runs)]
    return keys if len(runs) > 1 else []


def evaluation_charts(runs: Sequence[RunFolder]) -> Iterator[Chart]:
    """Each metric over the steps, between the untrained model and real images."""
    run = runs[0]
    for number, name in enumerate(
        dict.fromkeys(name for run in runs for name in metric_names(run))
    ):
        lines, marks, legend = [], [], _names(runs)
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
        svg = line_chart(
            f"eval{number}", lines, marks, axis="from_zero" if name.startswith("fd_") else "linear"
        )
        yield Chart(
            title=metric_title(name), unit=UNITS.get(name, ""), svg=Markup(svg), legend=legend
        )


def training_charts(runs: Sequence[RunFolder]) -> Iterator[Chart]:
    """The loss and its parts of the first run, then what all runs log."""
    run = runs[0]
    curves = [smoothed(other.points("train/loss")) for other in runs]
    if any(curves):
        raw = Line(points=run.points("train/loss"), colour=colour_name(0), style="faint")
        lines = [Line(points=points, colour=colour_name(i)) for i, points in enumerate(curves)]
        legend = _names(runs) or [
            Key(label="smoothed", colour=colour_name(0)),
            Key(label="logged", colour=colour_name(0), style="faint"),
        ]
        svg = line_chart("loss", [raw, *lines])
        yield Chart(title="Loss", svg=Markup(svg), legend=legend)
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
        svg = line_chart("timesteps", lines)
        yield Chart(title="Loss by timestep", svg=Markup(svg), legend=legend)
    parts = [key for key in run.series if key.startswith("train/") and key.count("/") == 1]
    titles = {key: (key.removeprefix("train/"), "") for key in parts if key != "train/loss"}
    for number, (key, (title, unit)) in enumerate((titles | TRAINING_CHARTS).items()):
        curves = [other.points(key) for other in runs]
        if any(curves):
            lines = [Line(points=points, colour=colour_name(i)) for i, points in enumerate(curves)]
            svg = line_chart(
                f"train{number}", lines, axis="from_zero" if key in FROM_ZERO else "any"
            )
            yield Chart(title=title, unit=unit, svg=Markup(svg), legend=_names(runs))
