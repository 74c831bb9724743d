"""Figures of critical batch sizes against the value of an option in which arms differ."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from steepest.batch_size.curve import Answer, levels
from steepest.lab.report.figure import Axis, Curve, Dots, Figure, Sort, decades
from steepest.lab.report.palette import Style
from steepest.lab.report.wording import plain, shortened
from steepest.lab.studies.batch.results import BatchReport, TargetResult

MOST = 4  # options that get figures
KEYS = tuple(f"{what}_by_option_{number}" for number in range(1, MOST + 1) for what in ("best_batch", "samples"))
_Marks = dict[Sort, list[tuple[float, float, str]]]


@dataclass(frozen=True, eq=False)
class Varied:
    """An option of a method, and the results of the arms that have it at different values, rising."""

    method: str
    option: str
    values: tuple[tuple[float, TargetResult], ...]


def varied(report: BatchReport) -> tuple[Varied, ...]:
    """Options that two or more arms of a method have at different numbers, and nothing else changed."""
    groups: dict[tuple[str, str], dict[float, TargetResult]] = {}
    shown = {one.name: one for one in report.at(report.shown)}
    for arm in report.study.arms:
        if len(arm.changes) == 1 and (value := _number(str(arm.changes[0][1]))) is not None:
            groups.setdefault((arm.method, arm.changes[0][0]), {})[value] = shown[arm.name]
    found = [Varied(*key, tuple(sorted(own.items(), key=lambda pair: pair[0]))) for key, own in groups.items()]
    return tuple(one for one in found if len(one.values) > 1)[:MOST]


def varied_figures(report: BatchReport, looks: Mapping[str, Style]) -> Iterator[Figure]:
    """For each such option b*, and the least samples that were measured."""
    for number, one in enumerate(varied(report), start=1):
        named = f"{plain(one.option)} of {shortened(one.method)}"
        aim = f"at loss {report.shown:g}"
        yield from _figure(
            one,
            [group for value, result in one.values for group in _best(value, result, looks[result.name])],
            key=f"best_batch_by_option_{number}",
            title=f"SFO-minimising b* by {named}",
            caption=(
                f"b* {aim}, the batch size with the least b K(b), with its interval. Arrows: b* is at least or at "
                "most there. Arms of which nothing is known have no mark."
            ),
            axis=f"b* ({report.unit})",
        )
        yield from _figure(
            one,
            [group for value, result in one.values for group in _least(value, result, looks[result.name])],
            key=f"samples_by_option_{number}",
            title=f"Least samples by {named}",
            caption=f"The least b K(b) {aim} of the batch sizes that were measured, a geometric mean over seeds.",
            axis=f"least b K(b) ({report.unit})",
        )


def _figure(
    one: Varied, drawn: Sequence[Dots | Curve], *, key: str, title: str, caption: str, axis: str
) -> Iterator[Figure]:
    heights = [y for mark in drawn for y in mark.y]
    if not heights:
        return
    low, high = min(heights) / 1.3, max(heights) * 1.3
    yield Figure(
        key=key,
        title=title,
        caption=caption,
        x=_axis(plain(one.option), [value for value, _ in one.values]),
        y=Axis(axis, low, high, logarithmic=True, ticks=decades(low, high)),
        height=340,
        curves=tuple(mark for mark in drawn if isinstance(mark, Curve)),
        dots=tuple(mark for mark in drawn if isinstance(mark, Dots)),
        keyed=True,
    )


def _axis(title: str, values: Sequence[float]) -> Axis:
    ticks = tuple((value, f"{value:g}") for value in values)
    if values[0] > 0 and values[-1] >= 5 * values[0]:
        margin = (values[-1] / values[0]) ** 0.08
        return Axis(title, values[0] / margin, values[-1] * margin, logarithmic=True, ticks=ticks)
    margin = 0.08 * (values[-1] - values[0])
    return Axis(title, values[0] - margin, values[-1] + margin, ticks=ticks)


def _best(value: float, result: TargetResult, style: Style) -> Iterator[Dots | Curve]:
    if result.estimate is None:
        return
    answer = result.estimate.b_star
    text = f"b* {answer}"
    if answer.low is not None and answer.high is not None:
        yield Curve(result.name, style, (value, value), (answer.low, answer.high), (), (), bare=True)
    marks: dict[Sort, float | None] = {"mean": answer.value, **_ends(answer)}
    for sort, height in marks.items():
        if height is not None:
            yield Dots(result.name, style, sort, (value,), (height,), (text,))


def _ends(answer: Answer) -> dict[Sort, float | None]:
    """Where b* is at least or at most."""
    return {
        "up": answer.low if answer.kind == "at least" else None,
        "down": answer.high if answer.kind == "at most" else None,
    }


def _least(value: float, result: TargetResult, style: Style) -> Iterator[Dots]:
    if result.estimate is None:
        return
    measured = [one for one in levels(result.estimate.chosen.runs) if one.measured]
    if measured:
        best = min(measured, key=lambda one: one.samples)
        text = f"{best.samples:,.0f} at b = {best.batch_size:g}"
        yield Dots(result.name, style, "mean", (value,), (best.samples,), (text,))


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
