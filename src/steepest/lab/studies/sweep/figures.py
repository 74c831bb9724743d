"""The figures of a learning-rate sweep."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import quantiles

from steepest.lab.report import wording
from steepest.lab.report.figure import (
    Axis,
    Bar,
    Curve,
    Dots,
    Figure,
    Label,
    Rule,
    Sort,
    Zone,
    decades,
    end_labels,
    evenly,
    named,
    pieces,
)
from steepest.lab.report.palette import Style, styles
from steepest.lab.studies.sweep.basin import TOLERANCES, Basin
from steepest.lab.studies.sweep.results import WIDE, MethodSweep, Sweep
from steepest.lab.studies.sweep.sentences import width

KEYS = ("lr_sweep", "basins", "expected_best")
MARKS: Mapping[Sort, str] = {
    "diverged": "\N{MULTIPLICATION SIGN} diverged",
    "above": "\N{BLACK UP-POINTING TRIANGLE} above the frame",
}
_FRAME, _LANE, _AROUND = 380, 14, 90  # pixels: the frame, a lane above it, axis titles and margins
_LEAST = 1.4  # the frame reaches up to this multiple of the best loss at least
_DECADE = 4.0  # the axis of losses is logarithmic if its ends differ by more than this factor

_Looks = Mapping[str, Style]


@dataclass(frozen=True)
class _Frame:
    """The part of the losses that is drawn to scale, and above it a lane for each method that leaves it."""

    floor: float
    ceiling: float
    logarithmic: bool
    lanes: tuple[str, ...]

    def scale(self, loss: float) -> float:
        return math.log(loss) if self.logarithmic else loss

    def place(self, pixels: float) -> float:
        """What is drawn so far above the ceiling, or below if negative."""
        top, bottom = self.scale(self.ceiling), self.scale(self.floor)
        place = top + (top - bottom) * pixels / _FRAME
        return math.exp(place) if self.logarithmic else place

    def lane(self, name: str) -> float:
        return self.place(_LANE * (len(self.lanes) - self.lanes.index(name) - 0.5))

    def axis(self) -> Axis:
        low, high = self.place(-1.06 * _FRAME), self.place(_LANE * len(self.lanes) or 0.03 * _FRAME)
        ticks = decades(self.floor, self.ceiling) if self.logarithmic else evenly(low, self.ceiling)
        return Axis("final evaluation loss", low, high, logarithmic=self.logarithmic, ticks=ticks)


def figures(sweep: Sweep) -> tuple[Figure, ...]:
    """All figures for which there are data."""
    looks = styles(sweep.study.methods, baseline=sweep.study.baseline)
    drawn = (_losses(sweep, looks), _widths(sweep, looks), _expected(sweep, looks))
    return tuple(figure for figure in drawn if figure is not None)


def _losses(sweep: Sweep, looks: _Looks) -> Figure | None:
    if sweep.best is None:
        return None
    frame = _frame(sweep, sweep.best)
    dots = [group for method in sweep.methods for group in _dots(method, looks[method.name], frame)]
    marks = [text for sort, text in MARKS.items() if any(group.sort == sort for group in dots)]
    x = _rates(sweep)
    zone = Zone(sweep.best, sweep.best * (1 + WIDE), "within 5% of the best") if sweep.measurable else None
    return Figure(
        key="lr_sweep",
        title="Final loss by learning rate",
        caption=" ".join(_caption(sweep, marks)),
        x=x,
        y=frame.axis(),
        height=_FRAME + _LANE * len(frame.lanes) + _AROUND,
        curves=tuple(curve for method in sweep.methods for curve in _lines(method, looks[method.name], frame, x)),
        dots=tuple(dots),
        zone=zone,
        rule=Rule("y", frame.ceiling, "") if frame.lanes else None,
        above="   ".join(marks),
        keyed=True,
    )


def _caption(sweep: Sweep, marks: Sequence[str]) -> Iterator[str]:
    yield "Lines: mean over seeds. Small marks: single seeds."
    if sweep.measurable:
        yield "Shaded: within 5% of the best of all methods."
    if marks:
        yield "Above it, a lane for each method marks the learning rates that do not fit in."
    if len(sweep.methods) > 1:
        yield (
            "Each method counts its learning rate in units of its own norm: widths in decades compare between "
            "methods, positions do not."
        )


def _frame(sweep: Sweep, lowest: float) -> _Frame:
    """Up to where three fifths of the means lie, but at least to `_LEAST` times the best: the basin stays visible."""
    points = [point for method in sweep.methods for point in method.points]
    means = [point.loss.mean for point in points if point.loss is not None]
    losses = [loss for method in sweep.methods for loss in _seeds(method)]
    floor, ceiling = min(losses), max(losses)
    if sweep.measurable and len(means) > 1:
        ceiling = min(ceiling, max(_LEAST * lowest, quantiles(means, n=5, method="inclusive")[2]))
    if ceiling <= floor:  # one point, or all alike
        ceiling = floor + (abs(floor) or 1.0) / 10
    leaves = tuple(
        method.name for method in sweep.methods if method.diverged or max(_seeds(method), default=floor) > ceiling
    )
    return _Frame(floor, ceiling, floor > 0 and ceiling > _DECADE * floor, leaves)


def _seeds(method: MethodSweep) -> list[float]:
    finals = [loss for point in method.points for loss in method.finals(point.lr).values()]
    return [loss for loss in finals if loss is not None]


def _rates(sweep: Sweep) -> Axis:
    lrs = [lr for lrs in sweep.study.lrs.values() for lr in lrs]
    margin = 10 ** (0.15 + 0.02 * math.log10(max(lrs) / min(lrs)))
    low, high = min(lrs) / margin, max(lrs) * margin
    return Axis("learning rate", low, high, logarithmic=True, ticks=decades(low, high))


def _lines(method: MethodSweep, style: Style, frame: _Frame, rates: Axis) -> Iterator[Curve]:
    """The line through the means, cut where it leaves the frame and where a point has no mean."""
    heights = Axis("", -math.inf, frame.ceiling, logarithmic=frame.logarithmic)
    for known, points in groupby(method.points, key=lambda point: point.loss is not None):
        means = [(point.lr, point.loss.mean) for point in points if point.loss is not None]
        for piece in pieces(means, rates, heights) if known else ():
            if len(piece) > 1:
                x, y = zip(*piece, strict=True)
                yield Curve(method.name, style, x, y, (), (), bare=True)


def _dots(method: MethodSweep, style: Style, frame: _Frame) -> Iterator[Dots]:
    marks: dict[Sort, list[tuple[float, float, str]]] = {"seed": [], "mean": [], "above": [], "diverged": []}
    for point in method.points:
        finals = method.finals(point.lr)
        rate = f"lr {wording.rate(point.lr)}"
        for seed, loss in finals.items():
            if loss is not None and loss <= frame.ceiling and len(finals) > 1:
                marks["seed"].append((point.lr, loss, f"{rate}, seed {seed}: {wording.loss(loss)}"))
        if point.loss is not None and point.loss.mean <= frame.ceiling:
            marks["mean"].append((point.lr, point.loss.mean, f"{rate}: {wording.spread(point.loss)}"))
        if point.diverged or any(loss is not None and loss > frame.ceiling for loss in finals.values()):
            each = ["diverged" if loss is None else wording.loss(loss) for loss in finals.values()]
            sort: Sort = "diverged" if point.diverged else "above"
            marks[sort].append((point.lr, frame.lane(method.name), f"{rate}: {', '.join(each)}"))
    for sort, found in marks.items():
        if found:
            x, y, texts = zip(*found, strict=True)
            yield Dots(method.name, style, sort, x, y, texts)


def _widths(sweep: Sweep, looks: _Looks) -> Figure | None:
    shown = [method for method in sweep.methods if method.of_all]
    longest = max((basin.width for method in shown for basin in _bars_of(method)), default=0.0)
    if not longest:
        return None
    bars: list[Bar] = []
    labels: list[Label] = []
    for i, method in enumerate(shown):
        style = looks[method.name]
        bars += _nested(method, style, -i + 0.1)
        if own := method.own.get(WIDE):
            text = f"within 5% of its own best: {width(own)}"
            bars.append(Bar(style, -i - 0.27, 0.14, own.width, 0.45, text))
        labels.append(Label(method.of_all[WIDE].width, -i + 0.1, width(method.of_all[WIDE]), style))
    open_ended = any(basin.open_ended for method in shown for basin in _bars_of(method))
    return Figure(
        key="basins",
        title="Width of the basin",
        caption=(
            "Decades of learning rate that end within 1% (full colour), 2% and 5% (palest) of the best of all methods. "
            "Thin bar: within 5% of the best loss of the method itself."
            + (" \N{GREATER-THAN OR EQUAL TO}: the basin goes on beyond what was tried." if open_ended else "")
        ),
        x=Axis("decades of learning rate", 0.0, 1.02 * longest),
        y=named([wording.shortened(method.name, length=18) for method in shown]),
        height=_AROUND + 44 * len(shown),
        bars=tuple(bars),
        labels=tuple(labels),
    )


def _bars_of(method: MethodSweep) -> tuple[Basin, ...]:
    own = method.own.get(WIDE)  # none if it diverged everywhere
    return (*method.of_all.values(), *([] if own is None else [own]))


def _nested(method: MethodSweep, style: Style, y: float) -> Iterator[Bar]:
    for tolerance, opacity in zip(reversed(TOLERANCES), (0.35, 0.5, 1.0), strict=True):
        found = method.of_all[tolerance]
        text = f"within {100 * tolerance:g}% of the best of all: {width(found)}"
        yield Bar(style, y, 0.46, found.width, opacity, text)


def _expected(sweep: Sweep, looks: _Looks) -> Figure | None:
    shown = [method for method in sweep.methods if len(method.expected) > 1]
    if not shown:
        return None
    curves = [
        Curve(method.name, looks[method.name], tuple(map(float, _trials(method))), method.expected, (), ())
        for method in shown
    ]
    most = max(len(method.expected) for method in shown)
    low, high = (pick(loss for method in shown for loss in method.expected) for pick in (min, max))
    frame = _Frame(low, max(high, low + (abs(low) or 1.0) / 100), low > 0 and high > _DECADE * low, ())
    y = frame.axis()
    return Figure(
        key="expected_best",
        title="Expected best after some trials",
        caption=(
            "The lowest mean final loss that so many learning rates, drawn at random from the grid of the "
            "method, are expected to find. One that diverges, or ends above the untrained model, "
            "counts as the untrained model."
        ),
        x=Axis("learning rates tried", 0.85, most + 0.05, ticks=_whole(most)),
        y=Axis("expected best final loss", y.low, y.high, logarithmic=y.logarithmic, ticks=y.ticks),
        height=400,
        curves=tuple(curves),
        labels=end_labels(curves, y),
    )


def _trials(method: MethodSweep) -> range:
    return range(1, len(method.expected) + 1)


def _whole(most: int) -> tuple[tuple[float, str], ...]:
    every = math.ceil(most / 12)
    return tuple((float(k), str(k)) for k in range(1, most + 1, every))
