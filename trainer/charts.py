"""Line charts as inline SVG, coloured by the page's CSS so that they follow light and dark."""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from trainer.run_folder import LARGEST, Points

WIDTH_IN, HEIGHT_IN = 5.0, 2.8
MOST_POINTS = 600
LOG_SCALE_FROM = 8.0
"""Positive values spread by more than this factor go on a logarithmic axis."""

PRINT_COLOURS = {
    "series-1": "#3157d5",
    "reference": "#7a8394",
    "muted": "#626b7b",
    "grid": "#e8eaef",
}
"""What a picture on white takes instead of the page's variables."""

Axis = Literal["any", "linear", "from_zero"]
Style = Literal["solid", "faint", "dashed", "dotted"]


@dataclass(slots=True, kw_only=True)
class Line:
    """One curve; colour names a CSS variable of the page, such as series-1."""

    points: Points
    colour: str
    style: Style = "solid"
    band: list[float] | None = None
    """Half the height of a band around the curve, point by point."""


@dataclass(slots=True, kw_only=True)
class Mark:
    """A horizontal line across the chart."""

    value: float
    colour: str
    style: Style = "dashed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One point of a trade-off between a distance, which should fall, and a score."""

    name: str
    distance: float
    score: float


def pareto_front(trials: Sequence[Trial]) -> list[Trial]:
    """Those that no other beats in one figure without losing in the other, nearest first."""
    front: list[Trial] = []
    for trial in sorted(trials, key=lambda t: (t.distance, -t.score)):
        if not front or trial.score > front[-1].score:
            front.append(trial)
    return front


def pareto_chart(name: str, trials: Sequence[Trial], distance: str, score: str) -> str:
    """SVG of named points, and a line through the Pareto front; distance, score: axis labels."""
    colours = _Colours()
    return colours.as_variables(_svg(name, _pareto(trials, distance, score, colours)))


def save_pareto_chart(path: Path, trials: Sequence[Trial], distance: str, score: str) -> None:
    """The same as a PNG."""
    _pareto(trials, distance, score, PRINT_COLOURS).savefig(path, format="png", dpi=160)


def line_chart(
    name: str, lines: Sequence[Line], marks: Sequence[Mark] = (), *, axis: Axis = "any"
) -> str:
    """SVG of curves over steps; every id in it starts with name, and it holds no text but numbers.

    Values lie on an axis of any kind, which is logarithmic where positive curves need it, or on
    a linear one.
    """
    colours = _Colours()
    figure = Figure(figsize=(WIDTH_IN, HEIGHT_IN), layout="constrained")
    axes = figure.add_subplot()
    for line in reversed(lines):
        _draw(axes, line, colours)
    for mark in marks:
        axes.axhline(
            mark.value, color=colours[mark.colour], linewidth=1.4, linestyle=mark.style, zorder=1
        )
    values = [y for line in lines if line.style != "faint" for _, y in line.points]
    logarithmic = (
        axis == "any" and bool(values) and 1 / LARGEST < min(values) * LOG_SCALE_FROM < max(values)
    )
    if logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))
    if axis == "from_zero":
        axes.set_ylim(bottom=min(0.0, *values) if values else 0.0)
    last_step = max((line.points[-1][0] for line in lines if line.points), default=0)
    axes.set_xlim(0, 1.02 * max(last_step, 1))
    _dress(axes, colours)
    return colours.as_variables(_svg(name, figure))


def _pareto(
    trials: Sequence[Trial], distance: str, score: str, colours: Mapping[str, str]
) -> Figure:
    figure = Figure(figsize=(2 * WIDTH_IN, 2 * HEIGHT_IN), layout="constrained")
    axes = figure.add_subplot()
    front = pareto_front(trials)
    axes.plot(
        [trial.distance for trial in front],
        [trial.score for trial in front],
        color=colours["series-1"],
        linewidth=2.0,
        zorder=2,
    )
    for trial in trials:
        colour = colours["series-1" if trial in front else "reference"]
        axes.scatter(trial.distance, trial.score, color=colour, s=36, zorder=3)
        axes.annotate(
            trial.name,
            (trial.distance, trial.score),
            xytext=(6, 4),
            textcoords="offset points",
            color=colour,
            fontsize=9,
            parse_math=False,
        )
    for axis, label in ((axes.xaxis, distance), (axes.yaxis, score)):
        axis.set_label_text(label, color=colours["muted"], parse_math=False)
        axis.set_major_locator(MaxNLocator(6))
    _style(axes, colours)
    return figure


def smoothed(points: Points) -> Points:
    """Centred moving average over a thirtieth of the curve, narrower near its ends."""
    reach = len(points) // 60
    sums = np.cumsum([0.0, *(value for _, value in points)])
    result = []
    for i, (step, _) in enumerate(points):
        near = min(reach, i, len(points) - 1 - i)
        result.append((step, float(sums[i + near + 1] - sums[i - near]) / (2 * near + 1)))
    return result


def thinned(points: Points) -> Points:
    """At most MOST_POINTS points: the lowest and the highest of each stretch, in order."""
    if len(points) <= MOST_POINTS:
        return points
    edges = np.linspace(0, len(points), MOST_POINTS // 2 + 1).astype(int)
    kept = []
    for start, end in pairwise(edges):
        stretch = points[start:end]
        extremes = {min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])}
        kept += sorted(extremes)
    return kept


class _Colours(dict[str, str]):
    """Stand-in colours, one a CSS variable: matplotlib draws with them, the page replaces them."""

    def __missing__(self, variable: str) -> str:
        self[variable] = f"#fe01{len(self):02x}"
        return self[variable]

    def as_variables(self, svg: str) -> str:
        for variable, stand_in in self.items():
            svg = svg.replace(stand_in, f"var(--{variable})")
        return svg


def _draw(axes: Axes, line: Line, colours: _Colours) -> None:
    points = thinned(line.points)
    steps, values = [step for step, _ in points], [value for _, value in points]
    faint = line.style == "faint"
    few = len(points) <= 30 and not faint
    axes.plot(
        steps,
        values,
        color=colours[line.colour],
        linestyle="solid" if faint else line.style,
        linewidth=0.8 if faint else 2.0,
        alpha=0.35 if faint else 1.0,
        marker="o" if few else None,
        markersize=4,
        zorder=2 if faint else 3,
    )
    if line.band is not None:
        low = [y - b for (_, y), b in zip(line.points, line.band, strict=True)]
        high = [y + b for (_, y), b in zip(line.points, line.band, strict=True)]
        band_steps = [step for step, _ in line.points]
        axes.fill_between(band_steps, low, high, color=colours[line.colour], alpha=0.2, linewidth=0)


def _dress(axes: Axes, colours: Mapping[str, str]) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: short_count(step)))
    _style(axes, colours)


def _style(axes: Axes, colours: Mapping[str, str]) -> None:
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    axes.tick_params(length=0, labelsize=12, labelcolor=colours["muted"], pad=5)
    axes.grid(axis="y", color=colours["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(colours["grid"])


def short_count(value: float) -> str:
    """1500 → 1.5k, 3_200_000 → 3.2M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def _svg(name: str, figure: Figure) -> str:
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "text.parse_math": False}):
        text = io.StringIO()
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=no_metadata)
    return _inline(text.getvalue(), name)


def _inline(svg: str, name: str) -> str:
    """An SVG document → an element: no XML head, size from the page, ids of its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true">', svg)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    return re.sub(r'(href="|url\()#', rf"\1#{name}-", svg)
