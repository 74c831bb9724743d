"""From the runs of a learning-rate sweep to the numbers of its report: one record for each method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from steepest.lab.methods import RATES
from steepest.lab.runs.comparable import Description, SetAside, agreeing, comparable, fixed_options
from steepest.lab.runs.config import RunConfig
from steepest.lab.runs.records import Run, finals
from steepest.lab.studies.records import Asked, Recorded
from steepest.lab.studies.sweep.basin import TOLERANCES, Basin, Best, Point, basin, best, expected_best, grid, unchanged
from steepest.lab.studies.sweep.plan import SweepStudy, rate

WIDE = 0.05  # the tolerance that headline, chart and ranking speak of

Basins = Mapping[float, Basin]  # by tolerance


@dataclass(frozen=True)
class MethodSweep:
    """All that the report says of one method.

    Args:
        name: As in the study.
        runs: Its comparable runs, by learning rate and seed.
        points: One for each learning rate asked for, ascending.
        best: Chosen by the loss on the part for tuning, with the loss to report; None if no point has a mean.
        of_all: Basins around the best loss of all methods; empty while there are none, or if a loss is not above 0.
        own: Basins around its own best loss; likewise.
        by_seed: Width of the basin within `WIDE` of the best of all, each seed taken for itself.
        expected: Expected best loss after 1, 2, ... random settings of those that have ended; empty if what a
            diverged one is worth is not known.
        unchanged: Groups of learning rates that gave exactly the same losses.
    """

    name: str
    runs: tuple[Run, ...]
    points: tuple[Point, ...]
    best: Best | None
    of_all: Basins
    own: Basins
    by_seed: Mapping[int, float]
    expected: tuple[float, ...]
    unchanged: tuple[tuple[float, ...], ...]

    @property
    def ended(self) -> int:
        """Number of runs that have ended."""
        return sum(point.n for point in self.points)

    @property
    def diverged(self) -> int:
        """Number of diverged runs."""
        return sum(point.diverged for point in self.points)

    @property
    def budget(self) -> tuple[int, ...]:
        """How many seeds have ended at each of the learning rates tried."""
        return tuple(sorted(point.n for point in self.points if point.n))

    def finals(self, lr: float) -> dict[int, float | None]:
        """Final loss by seed of the runs at one learning rate that have ended; None for a diverged one."""
        return finals([run for run in self.runs if rate(run) == lr])


@dataclass(frozen=True)
class Sweep:
    """A sweep with everything computed that the report shows.

    Args:
        records: What was read.
        set_aside: Runs made under other conditions; no number comes from them.
        methods: Results in the study's order.
        best: Lowest of the methods' best losses; None if there is none.
        untrained: Mean loss before the first step; None if no run has recorded it.
        measurable: Whether all losses are above 0, so that per cent of them mean something.
    """

    records: Recorded[SweepStudy, Asked]
    set_aside: tuple[SetAside, ...]
    methods: tuple[MethodSweep, ...]
    best: float | None
    untrained: float | None
    measurable: bool

    @property
    def study(self) -> SweepStudy:
        """What was asked for."""
        return self.records.study

    @property
    def alike(self) -> bool:
        """Whether as many learning rates are asked for of each method."""
        return len({len(lrs) for lrs in self.study.lrs.values()}) == 1

    @property
    def ranked(self) -> bool:
        """Whether the methods have been tried alike: the same number of learning rates, with as many seeds."""
        return self.alike and len({method.budget for method in self.methods}) == 1

    @property
    def pending(self) -> bool:
        """Whether they will be ranked only when all runs have ended."""
        return self.alike and not self.ranked and self.records.waiting > 0

    def method(self, name: str) -> MethodSweep:
        """The results of one method."""
        return next(method for method in self.methods if method.name == name)


def read_results(records: Recorded[SweepStudy, Asked]) -> Sweep:
    """Compute all numbers of the report from the stored runs."""
    study = records.study
    runs, aside = comparable_settings(records)
    points = {name: _points(study.lrs[name], own, study.seeds) for name, own in runs.items()}
    tuning = {name: _points(study.lrs[name], own, study.seeds, chosen_by=True) for name, own in runs.items()}
    tops = {name: best(points[name], by=tuning[name]) for name in runs}
    lowest = min((top.loss.mean for top in tops.values() if top is not None), default=None)
    finals = [loss for own in runs.values() for loss in _losses(own)]
    measurable = all(loss > 0 for loss in finals)
    starts = [run.evals[0].loss for own in runs.values() for run in own if run.evals and run.evals[0].step == 0]
    known = [loss for loss in starts if loss is not None]
    untrained = fmean(known) if known else None
    by_seed = {name: _seed_points(study, name, own) for name, own in runs.items()}
    seed_best = {seed: _lowest([by_seed[name][seed] for name in runs]) for seed in study.seeds}
    methods = tuple(
        MethodSweep(
            name=name,
            runs=own,
            points=points[name],
            best=(top := tops[name]),
            of_all=_basins(points[name], lowest if measurable else None),
            own=_basins(points[name], top.loss.mean if top and measurable else None),
            by_seed={
                seed: _basins(by_seed[name][seed], seed_best[seed])[WIDE].width
                for seed in study.seeds
                if measurable and seed_best[seed] is not None and any(point.n for point in by_seed[name][seed])
            },
            expected=_expected(points[name], untrained),
            unchanged=unchanged(_curves(study.lrs[name], own)),
        )
        for name, own in runs.items()
    )
    return Sweep(records, aside, methods, lowest, untrained, measurable)


def comparable_settings(
    records: Recorded[SweepStudy, Asked],
) -> tuple[dict[str, tuple[Run, ...]], tuple[SetAside, ...]]:
    """Choose the runs that agree on data, code and sizes, and within a method on all but its learning rates.

    Its other learning rates may go along with the one that is swept, but not differ between seeds.
    """
    own, aside = comparable(records.by_name, fixed_options, first=records.study.baseline)
    kept: dict[str, tuple[Run, ...]] = {}
    for name, runs in own.items():
        kept[name] = ()
        for lr in records.study.lrs[name]:
            same, others = agreeing([run for run in runs if rate(run) == lr], _other)
            aside += others
            kept[name] += same
    return kept, aside


def _other(config: RunConfig) -> Description:
    return tuple((name, str(config.counted_options.get(name))) for name in RATES[1:])


def _losses(runs: Sequence[Run]) -> list[float]:
    """Final losses of the runs that ended without diverging."""
    losses = [run.result.final_loss for run in runs if run.result is not None]
    return [loss for loss in losses if loss is not None]


def _points(
    lrs: Sequence[float], runs: Sequence[Run], seeds: Sequence[int], *, chosen_by: bool = False
) -> tuple[Point, ...]:
    """Means of the losses to report, or of those to choose by, which older runs do not have."""
    results = [(rate(run), run.result) for run in runs if run.config.seed in seeds and run.result is not None]
    losses = [
        (lr, result.tuning_loss if chosen_by and result.tuning_loss is not None else result.final_loss)
        for lr, result in results
    ]
    return grid({lr: [loss for own, loss in losses if own == lr] for lr in lrs})


def _seed_points(study: SweepStudy, name: str, runs: Sequence[Run]) -> dict[int, tuple[Point, ...]]:
    return {seed: _points(study.lrs[name], runs, [seed]) for seed in study.seeds}


def _lowest(grids: Sequence[Sequence[Point]]) -> float | None:
    return min((point.loss.mean for points in grids for point in points if point.loss is not None), default=None)


def _basins(points: Sequence[Point], reference: float | None) -> dict[float, Basin]:
    if reference is None:
        return {}
    return {tolerance: basin(points, reference=reference, tolerance=tolerance) for tolerance in TOLERANCES}


def _expected(points: Sequence[Point], untrained: float | None) -> tuple[float, ...]:
    """With the untrained model for a setting that diverged or ended above it: one may always keep that instead."""
    if untrained is None:
        return ()
    ended = [point for point in points if point.n]
    return expected_best([min(untrained, point.loss.mean) if point.loss else untrained for point in ended])


def _curves(lrs: Sequence[float], runs: Sequence[Run]) -> dict[float, dict[int, tuple[float, ...]]]:
    """Evaluation losses of the runs that ended without diverging, the untrained model's left out."""
    curves: dict[float, dict[int, tuple[float, ...]]] = {lr: {} for lr in lrs}
    for run in runs:
        losses = [row.loss for row in run.evals if row.step]
        if run.status == "finished" and losses:
            curves[rate(run)][run.config.seed] = tuple(loss for loss in losses if loss is not None)
    return curves
