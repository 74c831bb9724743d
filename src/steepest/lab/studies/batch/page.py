"""The page of a batch-size study: its table, the same numbers for other programs, and all that is said around them."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from statistics import fmean

from steepest.batch_size.curve import Answer, size_text
from steepest.lab.methods import RATES
from steepest.lab.report import wording
from steepest.lab.report.page import Comparison, Content, Settings
from steepest.lab.report.sheet import Cell, Cells, Column, sheet
from steepest.lab.report.wording import DASH, duration, shortened
from steepest.lab.studies.batch import sentences
from steepest.lab.studies.batch.figures import KEYS, figures
from steepest.lab.studies.batch.plan import BatchStudy
from steepest.lab.studies.batch.results import (
    LEVEL,
    ArmResult,
    BatchReport,
    Rate,
    TargetResult,
    read_report,
    reference,
    sample_ratios,
)
from steepest.lab.studies.batch.sentences import BEST, KNEE, interval, look, notices, number
from steepest.lab.studies.records import read_study


def content(study_dir: Path) -> Content:
    """What the page says.

    Raises:
        RecordError: If `study.json` is damaged.
    """
    report = read_report(read_study(study_dir, BatchStudy))
    return Content(
        subject="Critical batch size",
        study=report.study,
        headline=sentences.headline(report),
        facts=sentences.facts(report),
        notices=notices(report, look(report.study.task, report.study.preset)),
        verdicts=[Comparison("", statement) for statement in sentences.statements(report)],
        summary=sentences.summary(report),
        figures=figures(report),
        columns=columns(report),
        results=report.arms,
        methodology=sentences.methodology(report),
        settings=_settings,
        tables=tables(report),
        keys=KEYS,
        hidden=RATES,
        rows=report.results,
    )


def _settings(arm: ArmResult) -> Settings:
    runs = [(f"b = {run.config.batch_size}, seed {run.config.seed}", run) for run in arm.runs]
    title = f"{len(arm.runs)} runs, {len(arm.rates)} learning rates"
    return Settings(title, runs, notes=[_told(one) for one in arm.rates])


def _told(one: Rate) -> str:
    edge = ", at the edge" if one.at_edge else ""
    low, high = (wording.rate(end) for end in (one.tried[0], one.tried[-1])) if one.tried else ("", "")
    tried = f", of {len(one.tried)} from {low} to {high}{edge}" if one.tried else ""
    return f"b = {one.batch_size}: lr {wording.rate(one.lr)}{tried}"


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
        Column(KNEE, partial(_other, "knee"), f"of the hyperbola, {report.unit}"),
        Column("b at 20% more data", partial(_other, "overhead"), report.unit),
        Column("Family", _family, "lowest AICc"),
        *versus,
        Column("Soonest", _time, "on this machine"),
    )


def _target(result: TargetResult) -> Cell:
    arrived = sum(one.reached for one in result.arrivals)
    return Cell(f"{result.target:g}", (f"{arrived} of {len(result.arrivals)} runs arrived",))


def _best(result: TargetResult) -> Cell:
    return Cell("refused", (result.refusal,)) if result.estimate is None else _answer(result.estimate.b_star)


def _other(name: str, result: TargetResult) -> Cell:
    return Cell(DASH) if result.estimate is None else _answer(getattr(result.estimate, name))


def _answer(answer: Answer) -> Cell:
    shown = (interval(answer) if answer.kind == "point" else "", answer.reason)
    return Cell(number(answer), tuple(filter(None, shown)))


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


_ROWS = ("arm", "batch_size", "lr", "seed", "tunes", "status", "steps", "final_loss", "train_s", "run")
_CROSSINGS = ("arm", "batch_size", "seed", "target", "steps", "status", "resolution", "samples")
_ANSWERS = tuple(
    f"{what}{part}" for what in ("b_star", "knee", "overhead") for part in ("_kind", "", "_low", "_high", "_reason")
)
_ESTIMATES = ("arm", "target", "family", "aicc_weight", *_ANSWERS, "level", "overhead_share", "refusal")


def tables(report: BatchReport) -> dict[str, str]:
    """The content of each file by its name.

    `rows.csv` has one row for each run listed, `crossings.csv` for each run that counts and target, `estimates.csv`
    for each arm and target, `learning_rates.csv` for each arm and batch size, `token_ratio.csv` for each arm, target
    and batch size if AdamW takes part.
    """
    head = ("arm", "batch_size", "lr", "lowest_tried", "highest_tried", "at_edge", "median_step_s")
    crossings = [row for one in report.results for row in _crossings(one)]
    found = {
        "rows.csv": sheet(_ROWS, _runs(report)),
        "crossings.csv": sheet(_CROSSINGS, crossings),
        "estimates.csv": sheet(_ESTIMATES, [_estimate(one) for one in report.results]),
        "learning_rates.csv": sheet(head, [row for arm in report.arms for row in _rates(arm)]),
    }
    ratios = _ratios(report)
    if ratios:
        found["token_ratio.csv"] = sheet(("arm", "target", "batch_size", "ratio", "low", "high", "bound"), ratios)
    return found


def _runs(report: BatchReport) -> list[Cells]:
    aside = {one.run.name for one in report.set_aside}
    rows: list[Cells] = []
    for one in report.records.asked:
        run = report.records.found.get(one)
        key = (one.name, one.batch_size, one.lr, one.seed, one.tunes)
        if run is None or run.result is None:
            state = "missing" if run is None else "set aside" if run.name in aside else run.status
            rows.append((*key, state, None, None, None, run and run.name))
        else:
            state, result = "set aside" if run.name in aside else run.status, run.result
            rows.append((*key, state, result.steps, result.final_loss, result.train_s, run.name))
    return rows


def _rates(arm: ArmResult) -> list[Cells]:
    rows: list[Cells] = []
    for one in arm.rates:
        lowest, highest = (one.tried[0], one.tried[-1]) if one.tried else (None, None)
        rows.append((arm.name, one.batch_size, one.lr, lowest, highest, one.at_edge, arm.seconds.get(one.batch_size)))
    return rows


def _crossings(result: TargetResult) -> list[Cells]:
    rows: list[Cells] = []
    for one in result.arrivals:
        found, samples = one.crossing, one.crossing.steps * one.batch_size if one.reached else None
        key = (result.name, one.batch_size, one.seed, result.target)
        rows.append((*key, found.steps, found.status, found.resolution, samples))
    return rows


def _estimate(result: TargetResult) -> Cells:
    found = result.estimate
    if found is None:
        return (result.name, result.target, *[None] * (len(_ESTIMATES) - 3), result.refusal)
    family = found.chosen.family.key
    answers: list[object] = []
    for answer in (found.b_star, found.knee, found.overhead):
        answers += [answer.kind, *map(_rounded, (answer.value, answer.low, answer.high)), answer.reason]
    weight = _rounded(found.choice.weights[family])
    return (result.name, result.target, family, weight, *answers, found.level, found.overhead_share, None)


def _rounded(value: float | None) -> float | None:
    """To six digits, which are the same on every machine: a fit stops where it no longer gains."""
    return None if value is None else float(f"{value:.6g}")


def _ratios(report: BatchReport) -> list[Cells]:
    name = reference(report)
    return [
        (own.name, own.target, one.batch_size, one.value, one.low, one.high, one.bound)
        for base in report.results
        if base.name == name
        for own in report.at(base.target)
        if own is not base
        for one in sample_ratios(base, own, level=LEVEL)
    ]
