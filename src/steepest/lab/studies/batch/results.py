"""From the runs of a batch-size study to the numbers of its report: one record for each arm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean, median

from scipy.stats import t as student

from steepest.batch_size.curve import Crossing, Estimate, Point, TimeOptimum, estimate, time_optimal
from steepest.batch_size.curve_fit import ALL_FAMILIES
from steepest.lab.runs.comparable import Description, SetAside, comparable, fixed_options
from steepest.lab.runs.config import RunConfig
from steepest.lab.runs.records import Run
from steepest.lab.studies.batch.plan import BatchAsked, BatchStudy, run_crossing
from steepest.lab.studies.records import Recorded
from steepest.lab.tasks import entry

LEVEL = 0.9  # of all intervals


@dataclass(frozen=True)
class Arrival:
    """When one run came to a target, or how long it went without."""

    batch_size: int
    run: Run
    crossing: Crossing

    @property
    def seed(self) -> int:
        """Of the run."""
        return self.run.config.seed

    @property
    def reached(self) -> bool:
        """Whether the target was reached after the start."""
        return self.crossing.status == "reached"


@dataclass(frozen=True)
class Rate:
    """The learning rate of an arm at one batch size, and those that were tried for it, ascending."""

    batch_size: int
    lr: float
    tried: tuple[float, ...]

    @property
    def at_edge(self) -> bool:
        """Whether the best one is the lowest or the highest that was tried."""
        return bool(self.tried) and self.lr in (self.tried[0], self.tried[-1])


@dataclass(frozen=True, eq=False)
class TargetResult:
    """What an arm's runs say of one target.

    Args:
        name: Of the arm.
        target: Loss.
        arrivals: Of the runs that have ended, by batch size and seed.
        estimate: Critical batch sizes; None if the runs do not suffice for any.
        refusal: Why there is none; empty otherwise.
        time: The batch size that gets there soonest on the machine of the runs; None if that is not known.
    """

    name: str
    target: float
    arrivals: tuple[Arrival, ...]
    estimate: Estimate | None
    refusal: str
    time: TimeOptimum | None

    @property
    def runs(self) -> tuple[Run, ...]:
        """The runs that the numbers are from."""
        return tuple(arrival.run for arrival in self.arrivals)

    @cached_property
    def reached(self) -> tuple[int, ...]:
        """Batch sizes at which all seeds that ended arrived after the start, rising."""
        sizes = sorted({arrival.batch_size for arrival in self.arrivals})
        return tuple(size for size in sizes if all(one.reached for one in self.at(size)))

    def at(self, batch_size: int) -> tuple[Arrival, ...]:
        """Arrivals at one batch size."""
        return tuple(arrival for arrival in self.arrivals if arrival.batch_size == batch_size)


@dataclass(frozen=True, eq=False)
class ArmResult:
    """All that the report says of one arm.

    Args:
        name: As in the study.
        runs: Its comparable runs of the seeds that are reported, by batch size and seed.
        rates: Learning rates, by rising batch size; only those that are found.
        seconds: Median time of a step by batch size.
        targets: In the study's order.
    """

    name: str
    runs: tuple[Run, ...]
    rates: tuple[Rate, ...]
    seconds: dict[int, float]
    targets: tuple[TargetResult, ...]


@dataclass(frozen=True, eq=False)
class BatchReport:
    """A batch-size study with everything computed that the report shows.

    Args:
        records: What was read.
        set_aside: Runs made under other conditions; no number comes from them.
        arms: Results in the study's order.
        targets: Losses, falling.
    """

    records: Recorded[BatchStudy, BatchAsked]
    set_aside: tuple[SetAside, ...]
    arms: tuple[ArmResult, ...]
    targets: tuple[float, ...]
    unit: str = field(default="examples")

    @property
    def study(self) -> BatchStudy:
        """What was asked for."""
        return self.records.study

    @property
    def shown(self) -> float:
        """The target of the figures: the lowest that any arm has an estimate for, else the lowest."""
        known = [one.target for one in self.results if one.estimate is not None]
        return min(known, default=self.targets[-1])

    @property
    def results(self) -> tuple[TargetResult, ...]:
        """By arm and target."""
        return tuple(one for arm in self.arms for one in arm.targets)

    @property
    def leading(self) -> ArmResult:
        """The arm of the headline: the first of a Muon, else the first."""
        methods = {arm.name: arm.method for arm in self.study.arms}
        return next((arm for arm in self.arms if "muon" in methods[arm.name]), self.arms[0])

    def at(self, target: float) -> tuple[TargetResult, ...]:
        """Of each arm at one target."""
        return tuple(one for one in self.results if one.target == target)


def read_report(
    records: Recorded[BatchStudy, BatchAsked],
    *,
    targets: Sequence[float] = (),
    families: Sequence[str] = ALL_FAMILIES,
    level: float = LEVEL,
) -> BatchReport:
    """Compute all numbers of the report from the stored runs.

    Args:
        records: What was read.
        targets: Losses, falling; none: those of the study.
        families: Keys of the shapes of K(b) to choose from.
        level: Of the intervals.

    Raises:
        ValueError: If a target is below all those of the study, before which its runs ended, or as for `estimate`.
    """
    study = records.study
    aims = tuple(targets) or study.targets
    if min(aims) < study.targets[-1]:
        problem = f"The target {min(aims):g} is below {study.targets[-1]:g}, at which the runs of this study ended"
        raise ValueError(f"{problem}. Give higher ones, or measure again with lower ones.")
    kept, aside = comparable(records.by_name, fixed_options, first=study.methods[0], shared=_conditions)
    arms = tuple(_arm(records, name, runs, aims, families, level) for name, runs in kept.items())
    return BatchReport(records, aside, arms, aims, entry(study.task).examples)


def _conditions(config: RunConfig) -> Description:
    return (
        ("task", config.task),
        ("preset", config.preset),
        ("data sha256", config.data.sha256),
        ("code", config.code),
        ("evaluated every", str(config.eval_every)),
        ("schedule", config.schedule),
        ("precision", config.precision),
        ("target", str(config.target)),
        ("watched from", str(config.watch_from)),
    )


def _arm(
    records: Recorded[BatchStudy, BatchAsked],
    name: str,
    runs: Sequence[Run],
    targets: Sequence[float],
    families: Sequence[str],
    level: float,
) -> ArmResult:
    tuning = {run.name for one, run in records.found.items() if one.tunes}
    own = tuple(run for run in runs if run.name not in tuning)
    seconds = _seconds(own)
    ended = [run for run in own if run.result is not None and run.evals]
    results = tuple(_result(name, target, ended, seconds, families, level) for target in targets)
    return ArmResult(name, own, _rates([one for one in records.asked if one.name == name]), seconds, results)


def _rates(asked: Sequence[BatchAsked]) -> tuple[Rate, ...]:
    found = {one.batch_size: one.lr for one in asked if not one.tunes}
    return tuple(
        Rate(size, lr, tuple(sorted({one.lr for one in asked if one.tunes and one.batch_size == size})))
        for size, lr in sorted(found.items())
    )


def _seconds(runs: Sequence[Run]) -> dict[int, float]:
    """Median time of a step by batch size; one in which the clock stood still has none.

    A run whose record has no rows of steps, as in a repository that keeps little, counts with its mean.
    """
    times: dict[int, list[float]] = {}
    for run in runs:
        rows = [row.forward_backward_s + row.optimizer_s for row in run.train]
        if not rows and run.result is not None and run.result.steps:
            rows = [(run.result.forward_backward_s + run.result.optimizer_s) / run.result.steps]
        times.setdefault(run.config.batch_size, []).extend(rows)
    medians = {size: median(rows) for size, rows in sorted(times.items()) if rows}
    return {size: seconds for size, seconds in medians.items() if seconds > 0}


def _result(
    name: str,
    target: float,
    runs: Sequence[Run],
    seconds: dict[int, float],
    families: Sequence[str],
    level: float,
) -> TargetResult:
    """Unfinished runs count nowhere: of those only the quick ones would have arrived."""
    arrivals = tuple(Arrival(run.config.batch_size, run, run_crossing(run, target)) for run in runs)
    points = _points(arrivals)
    if not points:
        early = f"No run is above the target {target:g} at its first evaluation. Take a lower one."
        refusal = early if arrivals else "No run to be counted has ended."
        return TargetResult(name, target, arrivals, None, refusal, None)
    try:
        found = estimate(points, families=families, level=level)
    except ValueError as refusal:
        return TargetResult(name, target, arrivals, None, str(refusal), None)
    try:
        time = time_optimal(found.chosen, seconds)
    except ValueError:  # fewer than two batch sizes in common
        time = None
    return TargetResult(name, target, arrivals, found, "", time)


def _points(arrivals: Sequence[Arrival]) -> tuple[Point, ...]:
    """Runs below the target from the start, or that diverged in the very first step, say nothing of K."""
    return tuple(
        one.crossing.point(one.batch_size, one.seed)
        for one in arrivals
        if one.crossing.status != "at the start" and one.crossing.steps > 0
    )


@dataclass(frozen=True)
class SampleRatio:
    """Samples of the reference over those of an arm, at one batch size.

    Args:
        batch_size: Of both.
        value: Geometric mean over the seeds that both share; a lower bound if `bound`.
        low: End of the interval; None where there is one seed only, or a bound.
        high: Likewise.
        bound: Whether the reference was stopped with some seed, so that the true ratio is larger.
    """

    batch_size: int
    value: float
    low: float | None
    high: float | None
    bound: bool


def reference(report: BatchReport) -> str | None:
    """Name of the first arm of AdamW; None if it does not take part or is alone."""
    names = [arm.name for arm in report.study.arms if arm.method == "adamw"]
    return names[0] if names and len(report.arms) > 1 else None


def sample_ratios(base: TargetResult, own: TargetResult, *, level: float) -> tuple[SampleRatio, ...]:
    """The ratio at every batch size at which the arm arrived with all seeds.

    Seeds are paired: they share weights and order of examples. One spread is taken for all batch sizes, as three seeds
    do not tell it. As batch sizes are the same, this is also the ratio of steps and of tokens.

    Args:
        base: Reference.
        own: Arm.
        level: Of the intervals, by Student's t.
    """
    pairs = {size: _logs(base, own, size) for size in own.reached}
    early = {size for size in pairs if any(one.crossing.status == "at the start" for one in base.at(size))}
    pairs = {
        size: logs for size, logs in pairs.items() if logs and size not in early
    }  # there, K of the base is unknown
    exact = [size for size in pairs if size in base.reached]
    squares = sum((one - fmean(pairs[size])) ** 2 for size in exact for one in pairs[size])
    freedom = sum(len(pairs[size]) - 1 for size in exact)
    reach = float(student.ppf((1 + level) / 2, freedom)) * math.sqrt(squares / freedom) if freedom else None
    found: list[SampleRatio] = []
    for size, logs in pairs.items():
        mean, bound = fmean(logs), size not in exact
        margin = None if reach is None or bound else reach / math.sqrt(len(logs))
        low, high = (None, None) if margin is None else (math.exp(mean - margin), math.exp(mean + margin))
        found.append(SampleRatio(size, math.exp(mean), low, high, bound))
    return tuple(found)


def _logs(base: TargetResult, own: TargetResult, size: int) -> Sequence[float]:
    """Log ratio of steps by seed; a reference below the target from the start says nothing."""
    there = {one.seed: one.crossing for one in base.at(size) if one.crossing.status != "at the start"}
    return [
        math.log(there[one.seed].steps / one.crossing.steps)
        for one in own.at(size)
        if one.seed in there and there[one.seed].steps > 0
    ]
