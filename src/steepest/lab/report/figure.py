"""A figure as plain data; `vega` draws it and decides nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from scipy.optimize import isotonic_regression

from steepest.lab.report import wording
from steepest.lab.report.palette import Style
from steepest.lab.report.statistics import Interval


@dataclass(frozen=True)
class Axis:
    """An axis from `low` to `high`; `ticks` are (place, text) where they are not left to the drawing library."""

    title: str
    low: float
    high: float
    logarithmic: bool = False
    ticks: tuple[tuple[float, str], ...] | None = None

    def place(self, value: float) -> float:
        """Where a value is drawn, in some unit of length."""
        return math.log(value) if self.logarithmic else value

    def value(self, place: float) -> float:
        """What is drawn there."""
        return math.exp(place) if self.logarithmic else place

    def clamp(self, value: float) -> float:
        """The nearest value on the axis."""
        return min(max(value, self.low), self.high)


@dataclass(frozen=True)
class Curve:
    """A line through (x, y), with a band from `low` to `high` around it where these are not empty.

    `mark` follows its name where it ends early or may still change. A bare line has no markers and is not hovered.
    """

    name: str
    style: Style
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    mark: str = ""
    bare: bool = False


@dataclass(frozen=True)
class Row:
    """A mean at height `y`, with an interval if there is one, and the `values` behind it at `y_values`."""

    name: str
    style: Style
    y: float
    y_values: float
    values: tuple[float, ...]
    mean: float
    interval: Interval | None


Sort = Literal["seed", "mean", "above", "up", "down", "diverged"]


@dataclass(frozen=True)
class Dots:
    """Single marks of one method at (x, y), with the text that shows on hovering; all but `seed` and `mean`
    have fixed shapes, the others that of the method."""

    name: str
    style: Style
    sort: Sort
    x: tuple[float, ...]
    y: tuple[float, ...]
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Bar:
    """A horizontal bar at height `y` that is `length` long, with the text that shows on hovering."""

    style: Style
    y: float
    thickness: float
    length: float
    opacity: float
    text: str
    start: float = 0.0
    name: str = ""


@dataclass(frozen=True)
class Zone:
    """A shaded strip of heights from `low` to `high`."""

    low: float
    high: float
    text: str


@dataclass(frozen=True)
class Rule:
    """A straight line across the figure at `value` of the given axis."""

    axis: Literal["x", "y"]
    value: float
    text: str


@dataclass(frozen=True)
class Label:
    """Text that starts at (x, y), in the colour of a method."""

    x: float
    y: float
    text: str
    style: Style
    bold: bool = True


@dataclass(frozen=True)
class Figure:
    """One figure.

    Args:
        key: Names its file.
        title: Of the figure.
        caption: What is drawn, and how.
        x: Horizontal axis.
        y: Vertical axis.
        height: In pixels.
        curves: Lines.
        rows: Means with intervals.
        dots: Single marks.
        bars: Horizontal bars.
        zone: A shaded strip.
        rule: A straight line across.
        labels: Names beside curves.
        above: Small text over the frame.
        keyed: Whether names stand in a key and not beside the curves.
    """

    key: str
    title: str
    caption: str
    x: Axis
    y: Axis
    height: int
    curves: tuple[Curve, ...] = ()
    rows: tuple[Row, ...] = ()
    dots: tuple[Dots, ...] = ()
    bars: tuple[Bar, ...] = ()
    zone: Zone | None = None
    rule: Rule | None = None
    labels: tuple[Label, ...] = ()
    above: str = ""
    keyed: bool = False


def decades(low: float, high: float) -> tuple[tuple[float, str], ...]:
    """Ticks at 1, 2 and 5 times the powers of ten; where those are many, at powers alone, evenly left out."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = math.ceil((last - first) / 8)
    places = [float(f"{digit}e{power}") for power in range(first, last + 1, every) for digit in (1, 2, 5)]
    shown = [place for place in places if low <= place <= high]
    if len(shown) > 8:
        shown = [place for place in shown if f"{place:e}".startswith("1.")]
    return tuple((place, f"{place:g}") for place in shown)


def evenly(low: float, high: float, *, most: int = 6) -> tuple[tuple[float, str], ...]:
    """Ticks at multiples of 1, 2 or 5 times a power of ten, as many as `most` allows."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(digit * power for digit in (1, 2, 5, 10) if digit * power >= rough)
    places = [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return tuple((place, f"{place:.6g}") for place in places)


def around(title: str, values: Iterable[float], *, margin: float = 1.25) -> Axis:
    """A logarithmic axis around values above 0."""
    known = sorted(values)
    low, high = known[0] / margin, known[-1] * margin
    ticks = decades(low, high)
    return Axis(title, low, high, logarithmic=True, ticks=ticks if len(ticks) > 2 else evenly(low, high))


def named(names: Sequence[str]) -> Axis:
    """Rows one below the other, the first at height 0."""
    return Axis("", 0.4 - len(names), 0.6, ticks=tuple((0.0 - row, name) for row, name in enumerate(names)))


def whisker(style: Style, low: float, high: float, y: float) -> Curve:
    """An interval at height `y`."""
    return Curve("", replace(style, dash="solid"), (low, high), (y, y), (), (), bare=True)


def cut(points: Sequence[Sequence[float]], x: Axis, y: Axis) -> list[tuple[float, ...]]:
    """Points of x and one or more heights, and one more wherever a height crosses an end of the y axis."""
    fine = [tuple(point) for point in points[:1]]
    for left, right in pairwise(points):
        shares: set[float] = set()
        for a, b in zip(left[1:], right[1:], strict=True):
            for end in (y.low, y.high):
                if (a - end) * (b - end) < 0:
                    shares.add((y.place(end) - y.place(a)) / (y.place(b) - y.place(a)))
        for share in sorted(shares):
            ends = [(x, left[0], right[0]), *((y, a, b) for a, b in zip(left[1:], right[1:], strict=True))]
            fine.append(tuple(on.value(on.place(a) + share * (on.place(b) - on.place(a))) for on, a, b in ends))
        fine.append(tuple(right))
    return fine


def pieces(points: Sequence[Sequence[float]], x: Axis, y: Axis) -> Iterator[list[tuple[float, float]]]:
    """The parts of the line through points that are inside of the y axis."""
    slack = 1e-9 * (abs(y.high) if math.isinf(y.low) else y.high - y.low)
    piece: list[tuple[float, float]] = []
    for at, height, *_ in cut(points, x, y):
        if y.low - slack <= height <= y.high + slack:
            piece.append((at, y.clamp(height)))
        elif piece:
            yield piece
            piece = []
    if piece:
        yield piece


def end_labels(curves: Sequence[Curve], axis: Axis) -> tuple[Label, ...]:
    """The name of each curve at its end, moved as little as possible where two would touch.

    Least squares under the constraint of a gap between neighbours: isotonic regression once the gaps are taken out.
    No label leaves the axis, as long as there is room for all of them; its bounds then only clip the solution.
    """
    ordered = sorted(curves, key=lambda curve: curve.y[-1])
    line = 0.055 * (axis.place(axis.high) - axis.place(axis.low))  # height of one line of text
    gaps = [i * line for i in range(len(ordered))]
    ends = [axis.place(min(curve.y[-1], axis.high)) - gap for curve, gap in zip(ordered, gaps, strict=True)]
    bottom = axis.place(axis.low) + line / 2
    top = max(bottom, axis.place(axis.high) - line / 2 - gaps[-1])
    places = [min(max(float(place), bottom), top) for place in isotonic_regression(ends).x]
    return tuple(
        Label(curve.x[-1], axis.value(place + gap), wording.shortened(curve.name) + curve.mark, curve.style)
        for curve, place, gap in zip(ordered, places, gaps, strict=True)
    )
