"""Charts of the HTML report as inline SVG, drawn here: no script, no picture file, colours of the page's style."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from .markup import Safe, element, join

WIDTH, HEIGHT = 360, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 14, 12, 38
_POINTS = 400  # of a curve: more than there are pixels to tell them apart
_LARGEST = 1e300  # what is larger cannot be scaled in float64

Point = tuple[float, float]


class Series(NamedTuple):
    """A curve: its name, its points `(x, y)` in order of x, and whether each point is marked.

    A y that is not finite leaves a gap.
    """

    name: str
    points: Sequence[Point]
    marked: bool = False


def finite(value: float) -> bool:
    """Whether a chart can show it."""
    return math.isfinite(value) and abs(value) < _LARGEST


def line_chart(title: str, series: Sequence[Series], percent: bool = False) -> Safe | None:
    """Curves over optimizer steps, from 0 up; None where nothing is finite.

    Args:
        title: What is shown.
        series: One or two curves; the second is dashed, so that nothing depends on the colour alone.
        percent: Whether the values are fractions to be shown in percent.
    """
    scale = 100.0 if percent else 1.0
    drawn = [
        Series(s.name, [(x, y * scale if finite(y) else math.nan) for x, y in s.points], s.marked) for s in series
    ]
    values = [y for s in drawn for _, y in s.points if finite(y)]
    if not values:
        return None
    steps = [x for s in drawn for x, _ in s.points]
    y_ticks = ticks(min(0.0, *values), max(0.0, *values))
    x_ticks = [t for t in ticks(0.0, max(*steps, 1.0)) if t == int(t)]
    low, high, last = y_ticks[0], y_ticks[-1], max(*steps, 1.0)

    def place(point: Point) -> Point:
        x = _LEFT + (WIDTH - _LEFT - _RIGHT) * point[0] / last
        return x, HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * (point[1] - low) / (high - low)

    parts = [_grid([place((0, t))[1] for t in y_ticks], y_ticks, "%" if percent else "")]
    for t in x_ticks:
        if t <= last:
            parts.append(element("text", f"{t:g}", x=_r(place((t, low))[0]), y=HEIGHT - 22, text_anchor="middle"))
    parts.append(element("text", "optimizer step", x=(WIDTH + _LEFT) / 2, y=HEIGHT - 6, text_anchor="middle"))
    for number, s in enumerate(drawn):
        parts.append(_curve([place(p) for p in thinned(s.points)], number, s.marked))
        parts += [_cross(place((x, low))[0]) for x, _ in thinned([p for p in s.points if not finite(p[1])], 40)]
    label = f"{title}. " + " ".join(_told(s, "%" if percent else "") for s in drawn)
    chart = element("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=label, class_="chart")
    return element("figure", element("figcaption", element("b", title), _legend(drawn)), chart)


def _told(series: Series, unit: str) -> str:
    """A curve in words."""
    known = [(x, y) for x, y in series.points if finite(y)]
    if not known:
        return f"{series.name}: no finite value."
    (x0, y0), (x1, y1) = known[0], known[-1]
    gaps = len(series.points) - len(known)
    words = f"{series.name}: {y0:.3g}{unit} at step {x0:g}, {y1:.3g}{unit} at step {x1:g}"
    return words + (f", not finite at {gaps} of {len(series.points)} steps." if gaps else ".")


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers from at most `low` to at least `high`, about `count` steps.

    >>> ticks(0.0, 1.18)
    [0.0, 0.5, 1.0, 1.5]
    """
    span = high - low
    if span <= 0 or not math.isfinite(span):
        low, high, span = low, low + 1.0, 1.0
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(m for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def thinned(points: Sequence[Point], limit: int = _POINTS) -> list[Point]:
    """At most about `limit` of the points: of each stretch the lowest and the highest, so that no peak is lost."""
    if len(points) <= limit:
        return list(points)
    size = math.ceil(2 * len(points) / limit)
    kept: list[Point] = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        known = [p for p in part if finite(p[1])]
        ends = {min(known, key=lambda p: p[1]), max(known, key=lambda p: p[1])} if known else set()
        gap = [p for p in part if not finite(p[1])][:1]
        kept += sorted([*ends, *gap])
    return kept


def _curve(points: Sequence[Point], number: int, marked: bool) -> Safe:
    """Lines between neighbours; a point without neighbours is a dot."""
    runs: list[list[Point]] = [[]]
    for point in points:
        if finite(point[1]):
            runs[-1].append(point)
        elif runs[-1]:
            runs.append([])
    parts = []
    for run in runs:
        if len(run) > 1:
            path = "M" + "L".join(f"{_r(x)} {_r(y)}" for x, y in run)
            parts.append(element("path", d=path, class_=f"line s{number}"))
        if len(run) == 1 or (marked and len(points) <= 40):
            parts += [element("circle", cx=_r(x), cy=_r(y), r="2.6", class_=f"dot s{number}") for x, y in run]
    return join(parts)


def _cross(x: float) -> Safe:
    bottom = HEIGHT - _BOTTOM
    path = f"M{_r(x - 3)} {bottom - 7}l6 6m0 -6l-6 6"
    return element("path", d=path, class_="cross")


def _grid(places: Iterable[float], values: Iterable[float], unit: str, right: float = WIDTH - _RIGHT) -> Safe:
    parts = []
    for y, value in zip(places, values, strict=True):
        parts.append(element("line", x1=_LEFT, x2=_r(right), y1=_r(y), y2=_r(y), class_="grid"))
        parts.append(element("text", f"{value:g}{unit}", x=_LEFT - 6, y=_r(y + 4), text_anchor="end"))
    return join(parts)


def _legend(series: Sequence[Series]) -> Safe | None:
    if len(series) < 2:
        return None
    samples = []
    for number, s in enumerate(series):
        line = element("path", d="M0 5L26 5", class_=f"line s{number}")
        samples.append(element("svg", line, viewBox="0 0 26 10", class_="sample", aria_hidden="true"))
        samples.append(element("span", s.name))
    return element("span", *samples, class_="legend")


def bar(fraction: float) -> Safe:
    """A bar for a table cell, `fraction` of the cell's width long; its number stands beside it."""
    width = _r(100 * min(max(fraction, 0.0), 1.0)) if math.isfinite(fraction) else 0
    shape = element("rect", width=width, height="10", class_="fill")
    return element("svg", shape, viewBox="0 0 100 10", preserveAspectRatio="none", class_="bar", aria_hidden="true")


def reliability_diagram(bins: Sequence[Mapping[str, Any]], label: str) -> Safe:
    """Accuracy by confidence, with the diagonal of a calibrated model, above the number of examples per bin.

    Args:
        bins: As `describe_predictions` makes them.
        label: The diagram in words.
    """
    top, bottom, floor = 12.0, 212.0, 278.0
    width = WIDTH - _LEFT - _RIGHT
    most = max([1, *(b["count"] for b in bins)])
    halves = [0.0, 0.25, 0.5, 0.75, 1.0]
    parts = [_grid([bottom - (bottom - top) * t for t in halves], halves, "")]
    for b in bins:
        if not b["count"]:
            continue
        x, across = _LEFT + width * b["low"], width * (b["high"] - b["low"])
        height, share = (bottom - top) * b["accuracy"], 44.0 * b["count"] / most
        box = {"x": _r(x + 1), "width": _r(across - 2), "class_": "fill"}
        parts.append(element("rect", y=_r(bottom - height), height=_r(height), **box))
        parts.append(element("rect", y=_r(floor - share), height=_r(share), **{**box, "class_": "count"}))
        middle = _LEFT + width * b["confidence"]
        parts.append(element("circle", cx=_r(middle), cy=_r(bottom - height), r="3", class_="mean"))
    parts.append(element("path", d=f"M{_LEFT} {bottom}L{WIDTH - _RIGHT} {top}", class_="diagonal"))
    parts.append(element("line", x1=_LEFT, x2=WIDTH - _RIGHT, y1=floor, y2=floor, class_="grid"))
    parts.append(element("text", f"{most}", x=_LEFT - 6, y=floor - 38, text_anchor="end"))
    for t in halves:
        parts.append(element("text", f"{t:g}", x=_r(_LEFT + width * t), y=floor + 15, text_anchor="middle"))
    parts.append(element("text", "confidence", x=_LEFT + width / 2, y=floor + 31, text_anchor="middle"))
    parts.append(
        element("text", "accuracy", transform=f"translate(12 {(top + bottom) / 2}) rotate(-90)", class_="axis")
    )
    parts.append(element("text", "examples", transform=f"translate(12 {floor - 22}) rotate(-90)", class_="axis"))
    return element("svg", *parts, viewBox=f"0 0 {WIDTH} {floor + 38:g}", role="img", aria_label=label, class_="chart")


def _r(value: float) -> float:
    """A coordinate, to a tenth of a pixel."""
    return round(value, 1)
