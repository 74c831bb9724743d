"""The numbers of a batch-size study as tables for other programs."""

from __future__ import annotations

from steepest.lab.report.sheet import Cells, sheet
from steepest.lab.studies.batch.ratio import reference, sample_ratios
from steepest.lab.studies.batch.results import LEVEL, ArmResult, BatchReport, TargetResult

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
    answers = [
        value
        for answer in (found.b_star, found.knee, found.overhead)
        for value in (answer.kind, answer.value, answer.low, answer.high, answer.reason)
    ]
    weight = found.choice.weights[family]
    return (result.name, result.target, family, weight, *answers, found.level, found.overhead_share, None)


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
