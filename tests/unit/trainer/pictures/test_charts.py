"""Charts as SVG: what is drawn, scales, thinning and smoothing."""

import random
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.pages import Page
from trainer.pictures.charts import (
    MOST_POINTS,
    Line,
    Mark,
    Moment,
    line_chart,
    pareto_chart,
    smoothed,
    thinned,
)
from trainer.runs.sweeps import TradeOff


def curve(svg: str, colour: str) -> list[tuple[float, float]]:
    """Points of the longest path of straight strokes in a colour; y grows downwards."""
    paths = [
        values["d"]
        for tag, values in Page(svg).tags
        if tag == "path" and f"stroke: var(--{colour})" in values.get("style", "")
    ]
    straight = max((path for path in paths if "C" not in path), key=len)
    numbers = [float(n) for n in straight.replace("M", "").replace("L", "").split()]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def test_a_chart_draws_what_it_is_given() -> None:
    points = [(step, 100.0 - step) for step in (0, 10, 60)]
    marks = [Mark(value=150, colour="untrained"), Mark(value=20, colour="floor")]
    svg = line_chart("c", [Line(points=points, colour="series-1")], marks, axis="from_zero")
    drawn = curve(svg, "series-1")
    (x0, y0), (x1, y1), (x2, y2) = drawn
    assert (x2 - x1) / (x1 - x0) == pytest.approx(5, rel=1e-3)
    assert (y2 - y1) / (y1 - y0) == pytest.approx(5, rel=1e-3)
    pixels_per_unit = (y2 - y0) / 60
    for colour, value in (("untrained", 150), ("floor", 20)):
        heights = {y for _, y in curve(svg, colour)}
        assert len(heights) == 1
        assert heights.pop() == pytest.approx(y0 + (100 - value) * pixels_per_unit, rel=1e-3)
    assert "#" not in svg.replace('"#c-', "").replace("url(#c-", ""), "a colour is left"


def test_values_over_orders_of_magnitude_go_on_a_logarithmic_axis() -> None:
    points = [(step, 10.0**-step) for step in range(4)]
    lines = [Line(points=points, colour="a")]
    for svg, even in (
        (line_chart("c", lines), True),
        (line_chart("c", lines, axis="linear"), False),
    ):
        drawn = curve(svg, "a")
        gaps = [b[1] - a[1] for a, b in pairwise(drawn)]
        assert (gaps == pytest.approx([gaps[0]] * 3, rel=1e-3)) is even


@settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 5000), seed=st.integers(0, 9999))
def test_thinning_keeps_order_and_extremes(n: int, seed: int) -> None:
    values = [random.Random(seed + i).random() for i in range(n)]
    points = list(enumerate(values))
    kept = thinned(points)
    assert len(kept) <= MOST_POINTS
    assert kept == sorted(set(kept) & set(points))
    assert {min(values), max(values)} <= {value for _, value in kept}


@settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 500), slope=st.floats(-10, 10), start=st.floats(-10, 10))
def test_smoothing_has_no_lag_and_less_noise(n: int, slope: float, start: float) -> None:
    line = [(50 * i, start + slope * i) for i in range(n)]
    for (step, value), (smooth_step, smooth) in zip(line, smoothed(line), strict=True):
        assert step == smooth_step
        assert smooth == pytest.approx(value, abs=1e-6)
    noisy = [(i, float(i % 2)) for i in range(600)]
    middle = [value for _, value in smoothed(noisy)[50:-50]]
    assert max(middle) - min(middle) < 0.1


def test_a_step_that_is_marked_is_a_vertical_line() -> None:
    line = Line(points=[(0, 1.0), (100, 2.0)], colour="series-1")
    svg = line_chart("c", [line], moments=[Moment(step=25, colour="bad")])
    (left, _), (right, _) = curve(svg, "series-1")
    xs = {x for x, _ in curve(svg, "bad")}
    assert len(xs) == 1
    assert xs.pop() == pytest.approx(left + (right - left) / 4, rel=1e-3)


def test_a_pareto_chart_names_the_front_alone_and_has_axes_and_errors() -> None:
    points = [
        TradeOff(name="good", distance=10, score=0.3, score_error=0.02),
        TradeOff(name="bad", distance=20, score=0.2, distance_error=3),
    ]
    svg = pareto_chart("p", points, "Distance [1], lower is better", "Score, higher is better")
    words = Page(svg).text
    for word in ("good", "Distance [1], lower is better", "Score, higher is better"):
        assert word in words
    assert "bad" not in words
    without = pareto_chart(
        "p", [replace(one, distance_error=0, score_error=0) for one in points], "", ""
    )
    assert svg.count("<path") > without.count("<path")
