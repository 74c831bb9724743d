"""The figures of a race."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from steepest.lab.disk.fields import HUGE
from steepest.lab.report import wording
from steepest.lab.report.figure import Axis, Curve, Figure, Row, Rule, decades, end_labels
from steepest.lab.report.palette import Style, styles
from steepest.lab.report.statistics import t_interval
from steepest.lab.runs.records import EvalRow, Run
from steepest.lab.studies.race.results import MethodResult, Race
from steepest.lab.tasks import entry

KEYS = ("difference", "loss-steps", "loss-tokens", "loss-samples", "loss-time")
DIVERGED, UNFINISHED = " \N{MULTIPLICATION SIGN}", " \N{HORIZONTAL ELLIPSIS}"


def figures(race: Race) -> tuple[Figure, ...]:
    """All figures for which there are data, the one that tells who won first."""
    looks = styles(race.study.methods, baseline=race.study.baseline)
    unit = entry(race.study.task).counted
    drawn = (
        _differences(race, looks),
        _losses(race, looks, "steps", "optimizer steps", lambda row: row.step),
        _losses(race, looks, unit, f"training {unit} seen", lambda row: row.tokens),
        _losses(race, looks, "time", "seconds of training", lambda row: row.train_s),
    )
    return tuple(figure for figure in drawn if figure is not None)


def _differences(race: Race, looks: dict[str, Style]) -> Figure | None:
    """Final loss minus the baseline's with the same seed: the question of the race on one line for each method."""
    base = race.method(race.study.baseline)
    rows: list[Row] = []
    for method in race.methods:
        values = _paired(method, base)
        if race.ranked and values and method is not base:
            mean, y = sum(values) / len(values), -float(len(rows))
            rows.append(Row(method.name, looks[method.name], y, y - 0.3, values, mean, t_interval(values)))
    if not any(row.interval for row in rows):  # one seed each: points that would look like a result
        return None
    ends = [0.0, *(value for row in rows for value in row.values)]
    ends += [end for row in rows if row.interval for end in (row.interval.low, row.interval.high)]
    margin = 0.08 * (max(ends) - min(ends)) or 1.0
    name = wording.shortened(base.name)
    marks = "Small marks: seeds. Large mark and bar: their mean and its 95% confidence interval, for this pair alone."
    ticks = tuple((row.y, wording.shortened(row.name, length=14)) for row in rows)
    return Figure(
        key="difference",
        title=f"Final loss against {name}",
        caption=f"Final evaluation loss minus that of {name} with the same seed; left of the line is better. {marks}",
        x=Axis("difference in final loss", min(ends) - margin, max(ends) + margin),
        y=Axis("", rows[-1].y - 0.75, 0.6, ticks=ticks),
        height=110 + 52 * len(rows),
        rows=tuple(rows),
        rule=Rule("x", 0.0, name),
    )


def _paired(method: MethodResult, base: MethodResult) -> tuple[float, ...]:
    """Differences on the shared seeds; none if a run of either diverged."""
    if method.diverged or base.diverged:
        return ()
    shared = [(loss, base.finals.get(seed)) for seed, loss in method.finals.items()]
    return tuple(own - other for own, other in shared if own is not None and other is not None)


def _losses(
    race: Race, looks: dict[str, Style], key: str, x_title: str, place: Callable[[EvalRow], float]
) -> Figure | None:
    found = [_curve(method, looks[method.name], place) for method in race.methods]
    curves = [curve for curve in found if curve is not None]
    if not curves:
        return None
    right = max(curve.x[-1] for curve in curves) or 1.0
    y = _loss_axis(curves, right, race.target)
    target = None if race.target is None else Rule("y", race.target, f"target {wording.loss(race.target)}")
    return Figure(
        key=f"loss-{key}",
        title=f"Loss by {key}",
        caption=" ".join(_caption(race, curves, key)),
        x=Axis(x_title, 0.0, 1.015 * right),
        y=y,
        height=400,
        curves=tuple(curves),
        rule=target,
        labels=end_labels(curves, y),
    )


def _caption(race: Race, curves: Sequence[Curve], key: str) -> Iterator[str]:
    """Only the first of the three explains what they all share."""
    if key == "time":
        yield "The same runs over the seconds they trained, mean over seeds; evaluation is not counted."
        return
    if key != "steps":
        yield f"The same runs over the {key} they saw."
        return
    yield "Loss on held-out data; the steep start rises out of the frame."
    banded = any(curve.low for curve in curves)
    yield "Lines: mean over seeds. Bands: from the lowest to the highest seed." if banded else "One seed each."
    if race.target is not None:
        by_mean = f"the mean final loss of {wording.plain(race.study.baseline)}"
        yield f"Dotted: the target, {by_mean if race.study.target is None else 'set by the study'}."
    if any(curve.mark == DIVERGED for curve in curves):
        yield f"{DIVERGED.strip()}: a run diverged there."
    if any(curve.mark == UNFINISHED for curve in curves):
        yield f"{UNFINISHED.strip()}: no run has ended yet."


def _shown(runs: Sequence[Run]) -> list[Run]:
    """The runs behind a curve: those that have ended, or, before there are any, those on their way."""
    return [run for run in runs if run.result is not None] or list(runs)


def _curve(method: MethodResult, style: Style, place: Callable[[EvalRow], float]) -> Curve | None:
    """Mean and range over seeds, at the steps where every seed has a finite loss, up to the first that one lacks."""
    runs = [{row.step: row for row in run.evals} for run in _shown(method.runs)]
    runs = [rows for rows in runs if rows]
    points: list[list[EvalRow]] = []
    for step in sorted(set[int]().union(*runs)):
        rows = [run[step] for run in runs if step in run]
        if len(rows) < len(runs) or any(row.loss is None for row in rows):
            break
        points.append(rows)
    if not points:
        return None
    losses = [[row.loss for row in rows if row.loss is not None] for rows in points]
    several = len(runs) > 1
    return Curve(
        name=method.name,
        style=style,
        x=tuple(sum(map(place, rows)) / len(rows) for rows in points),
        y=tuple(sum(values) / len(values) for values in losses),
        low=tuple(map(min, losses)) if several else (),
        high=tuple(map(max, losses)) if several else (),
        mark=DIVERGED if method.diverged else "" if method.finals else UNFINISHED,
    )


def _loss_axis(curves: Sequence[Curve], right: float, target: float | None) -> Axis:
    """From the lowest loss to the highest after the first tenth, but never above where the curves start.

    Logarithmic where that spans a decade.
    """
    lowest = [value for curve in curves for value in curve.low or curve.y]
    floor = min(lowest if target is None else [*lowest, target])
    start = max(curve.y[0] for curve in curves)
    later = [y for curve in curves for x, y in zip(curve.x, curve.high or curve.y, strict=True) if x >= 0.1 * right]
    ceiling = min(max(later, default=start), start)
    if 1 / HUGE < floor < ceiling / 10:
        stretch = ceiling / floor
        low, high = floor * stretch**-0.06, ceiling * stretch**0.04
        return Axis("evaluation loss", low, high, logarithmic=True, ticks=decades(low, high))
    height = (ceiling - floor) or 1.0
    return Axis("evaluation loss", floor - 0.06 * height, ceiling + 0.04 * height)
