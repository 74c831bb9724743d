"""The figures of a batch-size study."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean

import numpy as np

from steepest.batch_size.curve import Estimate, bootstrap, percentiles, size_text
from steepest.lab.report import wording
from steepest.lab.report.figure import Axis, Curve, Dots, Figure, Rule, Sort, around
from steepest.lab.report.palette import GUIDE, Style, styles
from steepest.lab.studies.batch.results import (
    ArmResult,
    BatchReport,
    SampleRatio,
    TargetResult,
    reference,
    sample_ratios,
)
from steepest.lab.studies.batch.varied import KEYS as VARIED
from steepest.lab.studies.batch.varied import varied_figures

KEYS = ("steps", "samples", "token_ratio", "learning_rates", *VARIED)
FINENESS = 80  # places of a curve
_HEIGHT = 460
_Marks = dict[Sort, list[tuple[float, float, str]]]


def figures(report: BatchReport) -> tuple[Figure, ...]:
    """All figures for which there are data."""
    looks = styles(report.study.methods, baseline=report.study.baseline)
    shown = report.at(report.shown)
    drawn = (
        _steps(report, shown, looks, power=0),
        _steps(report, shown, looks, power=1),
        _ratios(report, shown, looks),
        _rates(report, looks),
        *varied_figures(report, looks),
    )
    return tuple(figure for figure in drawn if figure is not None)


def batch_axis(report: BatchReport) -> Axis:
    """Batch sizes, with those of the study as ticks."""
    batches = report.study.batches
    margin = max(1.2, (batches[-1] / batches[0]) ** 0.03)
    every = math.ceil(len(batches) / 12)
    ticks = tuple((float(size), f"{size:,}") for size in batches[::every])
    return Axis(
        f"batch size b ({report.unit})", batches[0] / margin, batches[-1] * margin, logarithmic=True, ticks=ticks
    )


def dots(name: str, style: Style, marks: Mapping[Sort, Sequence[tuple[float, float, str]]]) -> Iterator[Dots]:
    """Marks of each sort that has some."""
    for sort, found in marks.items():
        if found:
            x, y, texts = zip(*found, strict=True)
            yield Dots(name, style, sort, x, y, texts)


def _steps(
    report: BatchReport, shown: Sequence[TargetResult], looks: Mapping[str, Style], *, power: int
) -> Figure | None:
    """K(b), or b K(b) where `power` is 1."""
    marks = {one.name: _arrivals(one, power) for one in shown}
    values = [y for own in marks.values() for group in own.values() for _, y, _ in group]
    if not values:
        return None
    y = around(f"samples b K(b) ({report.unit})" if power else "steps K(b)", values)
    curves = [_fitted(one.name, looks[one.name], one.estimate, power, y) for one in shown if one.estimate is not None]
    what = "Samples" if power else "Steps"
    level = 100 * next((one.estimate.level for one in shown if one.estimate is not None), 0.9)
    stopped = any(own["up"] for own in marks.values())
    return Figure(
        key="samples" if power else "steps",
        title=f"{what} to loss {report.shown:g} by batch size",
        caption=(
            f"Large marks: geometric means over seeds. Small marks: single seeds. Lines: the chosen fits, with "
            f"pointwise {level:g}% bands; each ends where runs arrived. "
            + ("b* is where a line is lowest. " if power else "Learning rates are tuned anew at each batch size. ")
            + ("Arrows: runs that were stopped before the target; the true value is above." if stopped else "")
        ).strip(),
        x=batch_axis(report),
        y=y,
        height=_HEIGHT,
        curves=tuple(curves),
        dots=tuple(group for one in shown for group in dots(one.name, looks[one.name], marks[one.name])),
        rule=_best_rule(report) if power else None,
        above="\N{UPWARDS ARROW} stopped before the target: the true value is above" if stopped else "",
        keyed=True,
    )


def _best_rule(report: BatchReport) -> Rule | None:
    """At b* of the leading arm."""
    own = next(one for one in report.leading.targets if one.target == report.shown)
    best = None if own.estimate is None else own.estimate.b_star.value
    return None if best is None else Rule("x", best, f"b* of {wording.shortened(own.name)}: {size_text(best)}")


def _arrivals(result: TargetResult, power: int) -> _Marks:
    marks: _Marks = {"seed": [], "up": [], "mean": []}
    for size in sorted({arrival.batch_size for arrival in result.arrivals}):
        here = result.at(size)
        for one in here:
            steps = one.crossing.steps
            where = f"b = {size}, seed {one.seed}: "
            if one.reached and len(here) > 1:
                marks["seed"].append((size, steps * size**power, f"{where}{steps:,.0f} steps"))
            elif one.crossing.status in ("stopped", "diverged") and steps > 0:
                marks["up"].append((size, steps * size**power, f"{where}{one.crossing.status} at step {steps:,.0f}"))
        if size in result.reached:
            mean = math.exp(fmean(math.log(one.crossing.steps) for one in here))
            marks["mean"].append(
                (size, mean * size**power, f"b = {size}: {mean:,.0f} steps, {mean * size:,.0f} samples")
            )
    return marks


def _fitted(name: str, style: Style, estimate: Estimate, power: int, axis: Axis) -> Curve:
    """The chosen curve between the batch sizes that arrived, inside the axis, with its band."""
    fit = estimate.chosen
    reached = np.exp(fit.runs.reached_sizes)
    sizes = np.geomspace(reached[0], reached[-1], FINENESS)
    refits = bootstrap(fit, resamples=estimate.resamples, seed=0).log_steps(sizes)
    ends = [percentiles(column, estimate.level) for column in refits.T]
    lines = ([math.log(fit.steps(float(size))) for size in sizes], *zip(*ends, strict=True))
    scaled = [np.exp(np.minimum(line, 500.0)) * sizes**power for line in lines]
    y, low, high = (tuple(np.clip(line, axis.low, axis.high).tolist()) for line in scaled)
    return Curve(name, style, tuple(sizes.tolist()), y, low, high, bare=True)


def _ratios(report: BatchReport, shown: Sequence[TargetResult], looks: Mapping[str, Style]) -> Figure | None:
    name = reference(report)
    base = next((one for one in shown if one.name == name), None)
    if base is None:
        return None
    found = {one.name: sample_ratios(base, one, level=_level(one)) for one in shown if one is not base}
    found = {arm: ratios for arm, ratios in found.items() if ratios}
    if not found:
        return None
    ends = [end for ratios in found.values() for one in ratios for end in (one.value, one.low, one.high)]
    short = wording.shortened(base.name)
    return Figure(
        key="token_ratio",
        title=f"Data that {short} takes, over that of the others",
        caption=(
            f"Ratio of samples to loss {report.shown:g} at the same batch size, which is that of tokens and of steps: "
            f"above 1, {short} takes more. Bands: {100 * _level(base):g}% intervals over paired seeds, one spread for "
            f"all batch sizes. Arrows: {short} was stopped, the true ratio is above."
        ),
        x=batch_axis(report),
        y=around(f"samples of {short} / samples", [1.0, *(end for end in ends if end is not None)]),
        height=_HEIGHT - 40,
        curves=tuple(curve for arm, ratios in found.items() for curve in _ratio_lines(arm, looks[arm], ratios)),
        dots=tuple(group for arm, ratios in found.items() for group in dots(arm, looks[arm], _ratio_marks(ratios))),
        rule=Rule("y", 1.0, f"as much as {short}"),
        keyed=True,
    )


def _level(result: TargetResult) -> float:
    return 0.9 if result.estimate is None else result.estimate.level


def _ratio_lines(name: str, style: Style, ratios: Sequence[SampleRatio]) -> Iterator[Curve]:
    exact = [one for one in ratios if not one.bound]
    if len(exact) < 2:
        return
    bands = [(one.low, one.high) for one in exact if one.low is not None and one.high is not None]
    low, high = zip(*bands, strict=True) if bands else ((), ())
    x, y = tuple(float(one.batch_size) for one in exact), tuple(one.value for one in exact)
    yield Curve(name, style, x, y, low, high, bare=True)


def _ratio_marks(ratios: Sequence[SampleRatio]) -> _Marks:
    marks: _Marks = {"mean": [], "up": []}
    for one in ratios:
        reach = "" if one.low is None or one.high is None else f" ({one.low:.3g} to {one.high:.3g})"
        text = f"b = {one.batch_size}: {'at least ' if one.bound else ''}{one.value:.3g}{reach}"
        marks["up" if one.bound else "mean"].append((one.batch_size, one.value, text))
    return marks


def _rates(report: BatchReport, looks: Mapping[str, Style]) -> Figure | None:
    found = [arm for arm in report.arms if arm.rates]
    if not found:
        return None
    rates = [rate for arm in found for rate in arm.rates]
    y = around("best learning rate tried", [rate.lr for rate in rates], margin=1.6)
    edges = any(rate.at_edge for rate in rates)
    first = report.leading if report.leading.rates else found[0]
    return Figure(
        key="learning_rates",
        title="Learning rate by batch size",
        caption=(
            "The best of rates that are powers of two apart, for the lowest target, found on seeds of their own. "
            f"Dotted: in proportion to \N{SQUARE ROOT}b, through the middle of {wording.shortened(first.name)}."
            + (" Arrows: the highest or the lowest rate that was tried; a better one may lie beyond." * edges)
        ),
        x=batch_axis(report),
        y=y,
        height=_HEIGHT - 40,
        curves=(*(_rate_line(arm, looks[arm.name]) for arm in found), _root(first, report, y)),
        dots=tuple(group for arm in found for group in dots(arm.name, looks[arm.name], _rate_marks(arm))),
        above="\N{UPWARDS ARROW}\N{DOWNWARDS ARROW} edge of the rates tried" if edges else "",
        keyed=True,
    )


def _rate_line(arm: ArmResult, style: Style) -> Curve:
    x, y = tuple(float(rate.batch_size) for rate in arm.rates), tuple(rate.lr for rate in arm.rates)
    return Curve(arm.name, style, x, y, (), (), bare=True)


def _rate_marks(arm: ArmResult) -> _Marks:
    marks: _Marks = {"mean": [], "up": [], "down": []}
    for rate in arm.rates:
        sort: Sort = "mean" if not rate.at_edge else "up" if rate.lr == rate.tried[-1] else "down"
        tried = f", tried {wording.rate(rate.tried[0])} to {wording.rate(rate.tried[-1])}" if rate.tried else ""
        marks[sort].append((rate.batch_size, rate.lr, f"b = {rate.batch_size}: lr {wording.rate(rate.lr)}{tried}"))
    return marks


def _root(arm: ArmResult, report: BatchReport, axis: Axis) -> Curve:
    """A line of slope ½ through the mean of the logarithms of rates not at an edge, as far as it is inside the axis."""
    inner = [rate for rate in arm.rates if not rate.at_edge] or arm.rates
    through = fmean(math.log(rate.lr) - 0.5 * math.log(rate.batch_size) for rate in inner)
    batches = report.study.batches
    sizes = np.geomspace(batches[0], batches[-1], FINENESS)
    line = np.exp(through) * np.sqrt(sizes)
    inside = (line >= axis.low) & (line <= axis.high)
    x, y = tuple(sizes[inside].tolist()), tuple(line[inside].tolist())
    return Curve("\N{SQUARE ROOT}b", GUIDE, x, y, (), (), bare=True)
