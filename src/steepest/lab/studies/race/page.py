"""The page of a race: its table, and all that is said around it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from steepest.lab.report import wording
from steepest.lab.report.page import Content, Settings
from steepest.lab.report.sheet import DOT, Cell, Column
from steepest.lab.report.wording import DASH, FIXED, NARROW, plain
from steepest.lab.studies.race import sentences
from steepest.lab.studies.race.figures import KEYS, figures
from steepest.lab.studies.race.plan import RaceStudy
from steepest.lab.studies.race.results import MethodResult, Race, read_race
from steepest.lab.studies.race.sentences import notices, tuned
from steepest.lab.studies.records import read_study


def content(study_dir: Path) -> Content:
    """What the page says.

    Raises:
        RecordError: If `study.json` is damaged.
    """
    race = read_race(read_study(study_dir, RaceStudy))

    def settings(method: MethodResult) -> Settings:
        tuning = race.chosen.tuning[method.name]
        recorded = f", recorded in {plain(tuning.source)}" if tuning and tuning.source else ""
        runs = [(f"seed {run.config.seed}", run) for run in method.runs]
        return Settings(f"Chosen from {tuned(tuning)}{recorded}.", runs, folded=False)

    return Content(
        subject="Optimizer race",
        study=race.study,
        headline=sentences.headline(race),
        facts=sentences.facts(race),
        notices=notices(race),
        verdicts=sentences.pairs(race, first=True),
        others=sentences.pairs(race, first=False),
        summary=sentences.summary(race),
        figures=figures(race),
        columns=columns(race),
        results=race.methods,
        methodology=sentences.methodology(race),
        settings=settings,
        tables={},
        keys=KEYS,
    )


def columns(race: Race) -> tuple[Column[MethodResult], ...]:
    """The columns for which the study has data."""
    goal = "target" if race.target is None else f"target {wording.loss(race.target)}"
    base, own = wording.shortened(race.study.baseline), race.study.target is None
    mean = f"where the curves of {base} end in the mean; for {base} its own"
    chosen = [Column("Final loss", _final), Column(f"Steps to {goal}", _steps, mean if own else "set by the study")]
    if race.ranked and len(race.methods) > 1:
        seeds = "to the end of its curve with the same seed" if own else "to the same target"
        chosen.append(Column(f"Steps against {base}", partial(_ratio, race.study.baseline), seeds))
    if any(method.accuracy for method in race.methods):
        chosen.append(Column("Final accuracy", _accuracy))
    return (*chosen, Column("Time per step", _step_time), Column("Training", _training), Column("Peak memory", _memory))


def _final(method: MethodResult) -> Cell:
    if not method.finals:
        return Cell(DASH, ("no run has ended",))
    seeds = DOT.join("diverged" if loss is None else wording.loss(loss) for loss in method.finals.values())
    return Cell(wording.spread(method.final), (f"n{FIXED}={FIXED}{len(method.finals)}: {seeds}",))


def _steps(method: MethodResult) -> Cell:
    if not method.steps:
        return Cell(DASH)
    missed = f">{method.runs[0].config.steps:,}"
    seeds = DOT.join(
        f"{steps:,.0f}" if steps is not None else "diverged" if seed in method.diverged else missed
        for seed, steps in method.steps.items()
    )
    if method.mean_steps is not None:
        return Cell(f"{method.mean_steps:,.0f}", (seeds,))
    reached = sum(steps is not None for steps in method.steps.values())
    return Cell("not reached" if reached == 0 else f"by {reached} of {len(method.steps)} seeds", (seeds,))


def _ratio(base: str, method: MethodResult) -> Cell:
    ratio = method.ratio
    if method.name == base:
        return Cell("baseline")
    if ratio is None:
        return Cell(DASH)
    value = wording.percent(ratio.value)
    if ratio.censored:
        return Cell(f"over {value}", (f"not reached by {ratio.censored} of {ratio.n} seeds",))
    if ratio.interval is None:
        return Cell(value, ("one seed: no interval",))
    return Cell(value, (f"{wording.percent(ratio.interval.low)} to {wording.percent(ratio.interval.high)}",))


def _accuracy(method: MethodResult) -> Cell:
    accuracy = method.accuracy
    if accuracy is None:
        return Cell(DASH)
    spread = () if accuracy.sd is None else (f"\N{PLUS-MINUS SIGN}{FIXED}{100 * accuracy.sd:.1f}",)
    return Cell(f"{100 * accuracy.mean:.1f}%", spread)


def _step_time(method: MethodResult) -> Cell:
    if method.forward_backward_ms is None or method.optimizer_ms is None:
        return Cell(DASH)
    both, optimizer = _ms(method.forward_backward_ms), _ms(method.optimizer_ms)
    parts = (f"forward, backward{FIXED}{both}", f"optimizer{FIXED}{optimizer}")
    low, high = min(method.step_ms), max(method.step_ms)
    seeds = (f"seeds{FIXED}{_ms(low)} to{FIXED}{_ms(high)}",) if len(method.step_ms) > 1 else ()
    return Cell(wording.milliseconds(method.forward_backward_ms + method.optimizer_ms), (*parts, *seeds))


def _training(method: MethodResult) -> Cell:
    return Cell(DASH if method.train_s is None else wording.duration(method.train_s.mean))


def _memory(method: MethodResult) -> Cell:
    return Cell(DASH if method.memory is None else wording.size(method.memory))


def _ms(milliseconds: float) -> str:
    return wording.milliseconds(milliseconds).partition(NARROW)[0]
