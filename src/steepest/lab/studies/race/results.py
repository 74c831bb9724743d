"""From comparable runs to the numbers of the report: one record for each method, and the verdicts over all pairs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Literal

from steepest.lab.methods.tuned import Tuning
from steepest.lab.report.statistics import (
    Ended,
    Ratio,
    Summary,
    Verdict,
    first_crossing,
    paired_verdicts,
    steps_ratio,
    summarize,
)
from steepest.lab.runs.comparable import Description, SetAside, comparable
from steepest.lab.runs.config import RunConfig
from steepest.lab.runs.records import Run, finals
from steepest.lab.studies.race.plan import RaceStudy
from steepest.lab.studies.records import Asked, Recorded

Refusal = Literal["unequal", "unknown"]


@dataclass(frozen=True)
class MethodResult:
    """All that the report says of one method. Seconds, bytes, milliseconds for one step.

    Args:
        name: As in the study.
        runs: Its comparable runs, by seed.
        finals: Final evaluation loss by seed of the runs that have ended; None for a diverged one.
        final: Over seeds; None if no run has ended or one has diverged.
        accuracy: Final accuracy over seeds; None where the task has none.
        steps: Steps to the target by seed of the runs that have ended; None where it was not reached.
        mean_steps: Over seeds; None unless all of them reached the target.
        ratio: Steps over the baseline's, seed by seed; None for the baseline, and where no seed is shared.
        forward_backward_ms: Median over all steps of all runs.
        optimizer_ms: Likewise.
        step_ms: Both together: the median of each run.
        train_s: Training time over seeds of the runs that have ended.
        memory: Largest peak over those runs.
    """

    name: str
    runs: tuple[Run, ...]
    finals: Mapping[int, float | None]
    final: Summary | None
    accuracy: Summary | None
    steps: Mapping[int, float | None]
    mean_steps: float | None
    ratio: Ratio | None
    forward_backward_ms: float | None
    optimizer_ms: float | None
    step_ms: tuple[float, ...]
    train_s: Summary | None
    memory: int | None

    @property
    def diverged(self) -> tuple[int, ...]:
        """Seeds of its diverged runs."""
        return tuple(seed for seed, loss in self.finals.items() if loss is None)


@dataclass(frozen=True)
class Comparable:
    """The runs of a study that differ in method and seed only.

    Args:
        runs: By method, in the study's order and by seed; a method without runs has none.
        set_aside: All other runs.
        tuning: How each method that has runs was tuned; None where its options were chosen by hand.
    """

    runs: Mapping[str, tuple[Run, ...]]
    set_aside: tuple[SetAside, ...]
    tuning: Mapping[str, Tuning | None]

    @property
    def equally_tuned(self) -> bool:
        """Whether all methods had the same, known number of tried settings, so that they may be ranked."""
        return self.refusal is None

    @property
    def refusal(self) -> Refusal | None:
        """Why the methods may not be ranked: known numbers of tried settings differ, or some are not known."""
        budgets = {None if tuning is None else tuning.trials for tuning in self.tuning.values()}
        if len(self.runs) == 1 or (None not in budgets and len(budgets) <= 1):
            return None
        return "unequal" if len(budgets - {None}) > 1 else "unknown"


@dataclass(frozen=True)
class Race:
    """A race with everything computed that the report shows.

    Args:
        records: What was read.
        chosen: The runs the numbers come from.
        target: Loss to reach: the study's own, else where the baseline's curves end in the mean; None while unknown.
        methods: Results in the study's order.
        ranked: Whether the methods may be ranked; if not, there are no verdicts and no ratios.
        verdicts: One for each pair of methods that have runs.
    """

    records: Recorded[RaceStudy, Asked]
    chosen: Comparable
    target: float | None
    methods: tuple[MethodResult, ...]
    ranked: bool
    verdicts: tuple[Verdict, ...]

    @property
    def study(self) -> RaceStudy:
        """What was asked for."""
        return self.records.study

    @property
    def uncounted(self) -> bool:
        """Whether it was not recorded how far the losses may be off for the examples that they are means over."""
        return any(verdict.n and verdict.sampling is None for verdict in self.verdicts)

    def method(self, name: str) -> MethodResult:
        """The results of one method."""
        return next(method for method in self.methods if method.name == name)


def read_race(records: Recorded[RaceStudy, Asked]) -> Race:
    """Compute all numbers of the report from the stored runs."""
    study, chosen = records.study, choose(records)
    ranked = chosen.equally_tuned
    base = chosen.runs[study.baseline]
    ends = {run.config.seed: _end_of_curve(run) for run in _ended(base)}
    target = study.target if study.target is not None else _mean(ends)
    methods = tuple(
        _method_result(
            name,
            runs,
            steps={run.config.seed: _own_steps(run, study, target) for run in _ended(runs)}
            if target is not None
            else {},
            ratio=_ratio(runs, base, study.target) if ranked and name != study.baseline else None,
        )
        for name, runs in chosen.runs.items()
    )
    have_runs = {name: _compared(runs) for name, runs in chosen.runs.items() if runs}
    verdicts = paired_verdicts(have_runs) if ranked else ()
    return Race(records, chosen, target, methods, ranked, verdicts)


def choose(records: Recorded[RaceStudy, Asked]) -> Comparable:
    """Choose the runs that agree on data, code and sizes, and within a method on its options."""
    kept, aside = comparable(records.by_name, _choices, first=records.study.baseline)
    return Comparable(kept, aside, {name: runs[0].config.tuning for name, runs in kept.items() if runs})


def _choices(config: RunConfig) -> Description:
    """What all runs of a method have in common."""
    options = json.dumps(config.counted_options, sort_keys=True)
    return (("options", options), ("tuning", str(config.tuning)))


def _method_result(
    name: str, runs: tuple[Run, ...], *, steps: Mapping[int, float | None], ratio: Ratio | None
) -> MethodResult:
    ended = finals(runs)
    results = [run.result for run in runs if run.result is not None]
    memory = [result.peak_memory_bytes for result in results]
    reached = _all_known(steps.values())
    return MethodResult(
        name=name,
        runs=runs,
        finals=ended,
        final=summarize(_all_known(ended.values())),
        accuracy=summarize(_all_known(result.final_accuracy for result in results)),
        steps=steps,
        mean_steps=fmean(reached) if reached else None,
        ratio=ratio,
        forward_backward_ms=_milliseconds([row.forward_backward_s for run in runs for row in run.train]),
        optimizer_ms=_milliseconds([row.optimizer_s for run in runs for row in run.train]),
        step_ms=tuple(
            1000 * median(row.forward_backward_s + row.optimizer_s for row in run.train) for run in runs if run.train
        ),
        train_s=summarize([result.train_s for result in results]),
        memory=max(memory, default=None),
    )


def _compared(runs: Iterable[Run]) -> dict[int, Ended]:
    """By seed; runs from before parts of their own for tuning did not record how far their losses may be off."""
    ended = [(run.config.seed, run.result) for run in runs if run.result is not None]
    return {
        seed: Ended(result.final_loss, None if result.tuning_loss is None else result.final_blocks)
        for seed, result in ended
    }


def _ended(runs: Iterable[Run]) -> list[Run]:
    return [run for run in runs if run.result is not None]


def _all_known(values: Iterable[float | None]) -> list[float]:
    """The values if none is None, else nothing: a mean over the others would flatter."""
    listed = list(values)
    known = [value for value in listed if value is not None]
    return known if len(known) == len(listed) else []


def _mean(finals: Mapping[int, float | None]) -> float | None:
    known = _all_known(finals.values())
    return fmean(known) if known else None


def _milliseconds(seconds: Sequence[float]) -> float | None:
    return 1000 * median(seconds) if seconds else None


def _crossing(run: Run, target: float) -> float | None:
    """Steps to the first time the loss is at the target; None for a run that does not get there, or diverges after."""
    if run.status == "diverged":
        return None
    return first_crossing([row.step for row in run.evals], [row.loss for row in run.evals], target)


def _end_of_curve(run: Run) -> float | None:
    """The last loss of the curve, which is measured on fewer examples than the final loss; None if it diverged."""
    return run.evals[-1].loss if run.status == "finished" and run.evals else None


def _own_steps(run: Run, study: RaceStudy, target: float) -> float | None:
    """Steps of one run to the target; for a baseline whose own mean is the target, to the end of its own curve.

    About half of the baseline's runs end above their mean, so that one cannot ask when they come down to it.
    """
    own = study.target is None and run.config.method == study.baseline
    end = _end_of_curve(run) if own else None
    return _crossing(run, target if end is None else end)


def _ratio(runs: Iterable[Run], base: Iterable[Run], target: float | None) -> Ratio | None:
    """Steps over the baseline's to the study's target, or else to where the baseline's curve ended with that seed.

    With the baseline's final loss taken seed by seed, its spread is part of the interval. None if a baseline run does
    not reach the target itself: there is then nothing to divide by.
    """
    others = {run.config.seed: run for run in _ended(base)}
    pairs: list[tuple[float, float | None, int]] = []
    for run in _ended(runs):
        other = others.get(run.config.seed)
        if other is None or other.result is None:
            continue
        goal = target if target is not None else _end_of_curve(other)
        base_steps = None if goal is None else _crossing(other, goal)
        if goal is None or base_steps is None:
            return None
        pairs.append((base_steps, _crossing(run, goal), run.config.steps))
    return steps_ratio(pairs)
