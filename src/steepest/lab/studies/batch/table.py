"""The table of a batch-size study: one line for each arm and target."""

from __future__ import annotations

import math
from functools import partial
from statistics import fmean

from steepest.batch_size.curve import Answer, size_text
from steepest.lab.report.table import Cell, Column
from steepest.lab.report.wording import DASH, duration, shortened
from steepest.lab.studies.batch.ratio import reference, sample_ratios
from steepest.lab.studies.batch.results import BatchReport, TargetResult
from steepest.lab.studies.batch.sentences import BEST, KNEE, number


def columns(report: BatchReport) -> tuple[Column[TargetResult], ...]:
    """The columns for which the study has data."""
    base = reference(report)
    versus = (
        ()
        if base is None
        else (Column(f"Data of {shortened(base)}", partial(_ratio, report), "over its own, mean over b"),)
    )
    return (
        Column("Target", _target),
        Column(BEST, _best, f"least data, {report.unit}"),
        Column(KNEE, _knee, f"of the hyperbola, {report.unit}"),
        Column("b at 20% more data", _overhead, report.unit),
        Column("Family", _family, "lowest AICc"),
        *versus,
        Column("Soonest", _time, "on this machine"),
    )


def _target(result: TargetResult) -> Cell:
    arrived = sum(one.reached for one in result.arrivals)
    return Cell(f"{result.target:g}", (f"{arrived} of {len(result.arrivals)} runs arrived",))


def _best(result: TargetResult) -> Cell:
    if result.estimate is None:
        return Cell("refused", (result.refusal,))
    return _answer(result.estimate.b_star)


def _knee(result: TargetResult) -> Cell:
    return Cell(DASH) if result.estimate is None else _answer(result.estimate.knee)


def _overhead(result: TargetResult) -> Cell:
    return Cell(DASH) if result.estimate is None else _answer(result.estimate.overhead)


def _answer(answer: Answer) -> Cell:
    ends = ["open" if end is None else size_text(end) for end in (answer.low, answer.high)]
    interval = (f"[{', '.join(ends)}]",) if answer.kind == "point" else ()
    return Cell(number(answer), (*interval, *((answer.reason,) if answer.reason else ())))


def _family(result: TargetResult) -> Cell:
    if result.estimate is None:
        return Cell(DASH)
    choice = result.estimate.choice
    others = [f"{one.family.key} +{one.aicc - choice.chosen.aicc:.1f}" for one in choice.fits[1:]]
    weight = f"weight {choice.weights[choice.chosen.family.key]:.2f}"
    family = choice.chosen.family
    return Cell(f"{family.key}, {family.name}", (weight, ", ".join(others)) if others else (weight,))


def _ratio(report: BatchReport, result: TargetResult) -> Cell:
    base = next(one for one in report.at(result.target) if one.name == reference(report))
    if base is result:
        return Cell("reference")
    exact = [one for one in sample_ratios(base, result, level=0.9) if not one.bound]
    if not exact:
        return Cell(DASH)
    ends = f"{exact[0].value:.2f} at b = {exact[0].batch_size}, {exact[-1].value:.2f} at {exact[-1].batch_size}"
    return Cell(f"{math.exp(fmean(math.log(one.value) for one in exact)):.2f}", (ends,))


def _time(result: TargetResult) -> Cell:
    if result.time is None:
        return Cell(DASH)
    sign = {"point": "", "at most": "\N{LESS-THAN OR EQUAL TO} ", "at least": "\N{GREATER-THAN OR EQUAL TO} "}
    return Cell(
        f"b = {sign[result.time.kind]}{size_text(result.time.batch_size)}", (f"in {duration(result.time.seconds)}",)
    )
