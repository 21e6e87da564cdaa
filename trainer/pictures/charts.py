"""Charts as inline SVG, with colours from the page's CSS for light and dark mode, or as PNG."""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from data.storage.atomic import atomic_path
from trainer.runs.history import LARGEST, Points
from trainer.runs.sweeps import TradeOff, pareto_front

_matplotlib: Any = mpl  # its types are incomplete, so figures and axes are of type Any

WIDTH_IN, HEIGHT_IN = 5.0, 2.8
MOST_POINTS = 600
"""Largest number of points that are drawn of one curve."""
LOG_SCALE_FROM = 8.0
"""Ratio of the largest to the smallest value above which the axis is logarithmic."""

PRINT_COLOURS = {
    "series-1": "#3157d5",
    "reference": "#7a8394",
    "muted": "#626b7b",
    "grid": "#e8eaef",
}
"""Colours of a PNG on white, by the names of the page's CSS variables."""

Axis = Literal["any", "linear", "from_zero"]
Style = Literal["solid", "faint", "dashed", "dotted"]


@dataclass(slots=True, kw_only=True)
class Line:
    """One curve of a chart."""

    points: Points
    colour: str
    """Name of a CSS variable of the page, such as series-1."""
    style: Style = "solid"
    band: list[float] | None = None
    """Half the height of a band around the curve, for each point."""


@dataclass(slots=True, kw_only=True)
class Mark:
    """A horizontal line across a chart; colour as of Line."""

    value: float
    colour: str
    style: Style = "dashed"


def pareto_chart(name: str, trade_offs: Sequence[TradeOff], distance: str, score: str) -> str:
    """Draw points with standard errors as SVG, and name the Pareto front.

    distance, score: axis labels.
    """
    colours = _Colours()
    return colours.as_variables(_svg(name, _pareto(trade_offs, distance, score, colours)))


def save_pareto_chart(
    path: Path, trade_offs: Sequence[TradeOff], distance: str, score: str
) -> None:
    """Draw points with standard errors as a PNG, and name the Pareto front.

    distance, score: axis labels.
    """
    with atomic_path(path) as part:
        _pareto(trade_offs, distance, score, PRINT_COLOURS).savefig(part, format="png", dpi=160)


@dataclass(slots=True, kw_only=True)
class Moment:
    """A vertical line at a step; colour as of Line."""

    step: int
    colour: str
    style: Style = "dotted"


def line_chart(
    name: str,
    lines: Sequence[Line],
    marks: Sequence[Mark] = (),
    moments: Sequence[Moment] = (),
    *,
    axis: Axis = "any",
) -> str:
    """Draw curves over steps as an SVG element, whose ids start with `name`.

    axis: `any` is logarithmic if the ratio of the values exceeds LOG_SCALE_FROM.
    """
    colours = _Colours()
    figure = _new_figure(1)
    axes = figure.add_subplot()
    for line in reversed(lines):
        _draw(axes, line, colours)
    for mark in marks:
        axes.axhline(
            mark.value, color=colours[mark.colour], linewidth=1.4, linestyle=mark.style, zorder=1
        )
    for moment in moments:
        axes.axvline(
            moment.step,
            color=colours[moment.colour],
            linewidth=1.2,
            linestyle=moment.style,
            zorder=1,
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
    _style_with_steps(axes, colours)
    return colours.as_variables(_svg(name, figure))


def _new_figure(scale: float) -> Any:
    return Figure(figsize=(scale * WIDTH_IN, scale * HEIGHT_IN), layout="constrained")


def _pareto(
    trade_offs: Sequence[TradeOff], distance: str, score: str, colours: Mapping[str, str]
) -> Any:
    figure = _new_figure(2)
    axes = figure.add_subplot()
    front = pareto_front(trade_offs)
    axes.plot(
        [trade_off.distance for trade_off in front],
        [trade_off.score for trade_off in front],
        color=colours["series-1"],
        linewidth=2.0,
        zorder=2,
    )
    for trade_off in trade_offs:
        best = trade_off in front
        colour = colours["series-1" if best else "reference"]
        axes.errorbar(
            trade_off.distance,
            trade_off.score,
            xerr=trade_off.distance_error or None,
            yerr=trade_off.score_error or None,
            color=colour,
            marker="o" if best else "x",
            markersize=6,
            elinewidth=1.2,
            capsize=3,
            zorder=4 if best else 3,  # a point of the front may have an equal
        )
        if not best:
            continue
        axes.annotate(
            trade_off.name,
            (trade_off.distance, trade_off.score),
            xytext=(6, -4),  # below the line, which rises to the right
            textcoords="offset points",
            verticalalignment="top",
            color=colour,
            fontsize=9,
            parse_math=False,
        )
    for axis, label in ((axes.xaxis, distance), (axes.yaxis, score)):
        axis.set_label_text(label, color=colours["muted"], fontsize=12, parse_math=False)
        axis.set_major_locator(MaxNLocator(6))
    _style(axes, colours)
    return figure


def smoothed(points: Points) -> Points:
    """Average over a centred window of a thirtieth of the curve, narrower near its ends."""
    reach = len(points) // 60
    sums = np.cumsum([0.0, *(value for _, value in points)])
    result: Points = []
    for i, (step, _) in enumerate(points):
        near = min(reach, i, len(points) - 1 - i)
        result.append((step, float(sums[i + near + 1] - sums[i - near]) / (2 * near + 1)))
    return result


def thinned(points: Points) -> Points:
    """Keep at most MOST_POINTS points: the lowest and the highest of each section of the curve."""
    if len(points) <= MOST_POINTS:
        return points
    edges = np.linspace(0, len(points), MOST_POINTS // 2 + 1).astype(int)
    kept: Points = []
    for start, end in pairwise(edges):
        section = points[start:end]
        extremes = {min(section, key=lambda p: p[1]), max(section, key=lambda p: p[1])}
        kept += sorted(extremes)
    return kept


class _Colours(dict[str, str]):
    """A placeholder colour for each CSS variable: matplotlib draws it, the page replaces it."""

    def __missing__(self, variable: str) -> str:
        self[variable] = f"#fe01{len(self):02x}"
        return self[variable]

    def as_variables(self, svg: str) -> str:
        for variable, stand_in in self.items():
            svg = svg.replace(stand_in, f"var(--{variable})")
        return svg


def _draw(axes: Any, line: Line, colours: _Colours) -> None:
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


def _style_with_steps(axes: Any, colours: Mapping[str, str]) -> None:
    axes.set_xlabel("step", color=colours["muted"], fontsize=12)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(_step_label))
    _style(axes, colours)


def _style(axes: Any, colours: Mapping[str, str]) -> None:
    axes.yaxis.set_major_formatter(FuncFormatter(_value_label))
    axes.tick_params(length=0, labelsize=12, labelcolor=colours["muted"], pad=5)
    axes.grid(axis="y", color=colours["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(colours["grid"])


def _step_label(step: float, _: int | None) -> str:
    return short_count(step)


def _value_label(value: float, _: int | None) -> str:
    return f"{value:.4g}"


def short_count(value: float) -> str:
    """Write a number in short: 1500 → 1.5k, 3_200_000 → 3.2M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def _svg(name: str, figure: Any) -> str:
    settings = {"svg.fonttype": "none", "svg.hashsalt": name, "text.parse_math": False}
    with _matplotlib.rc_context(settings):
        text = io.StringIO()
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=no_metadata)
    return _inline(text.getvalue(), name)


def _inline(svg: str, name: str) -> str:
    """Turn an SVG document into an element without XML head and size; prefix its ids."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true">', svg)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    return re.sub(r'(href="|url\()#', rf"\1#{name}-", svg)
