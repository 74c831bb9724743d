"""How many times the samples of one arm another one takes to the same loss at the same batch size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from scipy.stats import t as student

from steepest.lab.studies.batch.results import BatchReport, TargetResult


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
