"""Statistics of a race: numbers in, numbers out; no files, no text.

Runs with the same seed share initial weights and data order, so methods are compared seed by seed: what is tested is
the mean of the paired differences. The unit of replication is the seed; evaluations along one run are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean, stdev
from typing import Literal

from scipy import special, stats

ALPHA = 0.05
POWER = 0.8
MOST_SEEDS = 1000  # beyond this, "needs more seeds" means "makes no difference that matters"


@dataclass(frozen=True)
class Summary:
    """Mean and sample standard deviation of `n` values; `sd` is None for one value."""

    mean: float
    sd: float | None
    n: int


@dataclass(frozen=True)
class Interval:
    """A two-sided confidence interval."""

    low: float
    high: float


@dataclass(frozen=True)
class Ratio:
    """Steps of a method over steps of the baseline: the geometric mean over seeds.

    Args:
        value: The ratio; a lower bound when `censored` is not 0.
        interval: 95% confidence interval; None for one seed or when `censored` is not 0.
        n: Number of pairs.
        censored: Number of pairs in which the method did not get there.
    """

    value: float
    interval: Interval | None
    n: int
    censored: int


Outcome = Literal["better", "worse", "undecided"]


@dataclass(frozen=True)
class Verdict:
    """What the final losses say of `first` against `second`; lower is better.

    Args:
        outcome: Of `first`.
        difference: Mean over the shared seeds of (loss of first - loss of second); None without a shared seed.
        interval: 95% confidence interval of the difference, for this pair alone; None below two seeds.
        p: Two-sided p-value, Holm-corrected over all pairs; None when nothing could be tested.
        n: Number of shared seeds.
        more_seeds: Seeds to add for 80% power at the observed effect. None when decided, not testable, or when
            even a total of `MOST_SEEDS` would not do.
        diverged: Which of the two have diverged runs; a mean over their other seeds would flatter them, so such a
            pair is not tested.
    """

    first: str
    second: str
    outcome: Outcome
    difference: float | None
    interval: Interval | None
    p: float | None
    n: int
    more_seeds: int | None
    diverged: tuple[str, ...]


def summarize(values: Sequence[float]) -> Summary | None:
    """Mean, sample standard deviation and number of the values; None if there are none."""
    if not values:
        return None
    return Summary(fmean(values), stdev(values) if len(values) > 1 else None, len(values))


def t_interval(values: Sequence[float], *, confidence: float = 1 - ALPHA) -> Interval | None:
    """Student's confidence interval of the mean; None below two values."""
    summary = summarize(values)
    if summary is None or summary.sd is None:
        return None
    quantile = float(special.stdtrit(summary.n - 1, (1 + confidence) / 2))
    half = quantile * summary.sd / math.sqrt(summary.n)
    return Interval(summary.mean - half, summary.mean + half)


def first_crossing(steps: Sequence[int], losses: Sequence[float | None], target: float) -> float | None:
    """Where a curve first comes down to `target`, on straight lines between evaluations.

    Args:
        steps: Increasing steps of the evaluations.
        losses: Loss at each; None where it was not finite, which counts as above any target.
        target: Loss to reach.

    Returns:
        Steps, not rounded; None if the target is never reached.
    """
    before: tuple[int, float] | None = None
    for step, loss in zip(steps, losses, strict=True):
        if loss is not None and loss <= target:
            if before is None:
                return float(step)
            return before[0] + (step - before[0]) * (before[1] - target) / (before[1] - loss)
        before = None if loss is None else (step, loss)
    return None


def steps_ratio(pairs: Sequence[tuple[float, float | None, int]]) -> Ratio | None:
    """Geometric mean of the paired ratios of steps, with a Student interval on their logarithms.

    Args:
        pairs: For each seed: steps of the baseline, steps of the method (None: not reached), and the steps the
            method was given. A pair in which the method did not get there enters with the steps it was given, and
            turns the mean into a lower bound.

    Returns:
        The ratio; None without pairs.
    """
    if not pairs:
        return None
    logs = [math.log((given if own is None else max(own, 1.0)) / max(base, 1.0)) for base, own, given in pairs]
    censored = sum(own is None for _, own, _ in pairs)
    around = None if censored else t_interval(logs)
    interval = None if around is None else Interval(math.exp(around.low), math.exp(around.high))
    return Ratio(math.exp(fmean(logs)), interval, len(logs), censored)


def paired_p(differences: Sequence[float]) -> float | None:
    """Two-sided p-value of the paired t-test; None below two seeds.

    Differences that are all the same have no spread to test against: p is then 1 if they are 0, else 0.
    """
    summary = summarize(differences)
    if summary is None or summary.sd is None:
        return None
    if summary.sd == 0:
        return 1.0 if summary.mean == 0 else 0.0
    t = abs(summary.mean) / (summary.sd / math.sqrt(summary.n))
    return float(2 * special.stdtr(summary.n - 1, -t))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: rejecting where the result is at most alpha keeps the family-wise error at alpha.

    Source: Holm, 1979, A simple sequentially rejective multiple test procedure.
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted = [1.0] * len(p_values)
    running = 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = running
    return adjusted


def seeds_needed(effect: float, *, alpha: float = ALPHA, power: float = POWER) -> int | None:
    """Smallest number of seeds at which a two-sided paired t-test finds `effect` with the given power.

    Args:
        effect: Mean of the paired differences over their standard deviation, either sign.
        alpha: Level of the test.
        power: Probability of finding it.

    Returns:
        At least 2; None if more than `MOST_SEEDS`.
    """

    def enough(n: int) -> bool:
        critical = float(special.stdtrit(n - 1, 1 - alpha / 2))
        return float(stats.nct.sf(critical, n - 1, abs(effect) * math.sqrt(n))) >= power

    low, high = 1, MOST_SEEDS
    if not enough(high):
        return None
    while high - low > 1:  # power grows with n
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def paired_verdicts(finals: Mapping[str, Mapping[int, float | None]], *, alpha: float = ALPHA) -> tuple[Verdict, ...]:
    """Compare all pairs of methods on their final losses, seed by seed.

    Paired t-tests, Holm-corrected over all pairs. A pair that cannot be tested counts in the correction as p = 1, so
    that a missing run never makes another verdict easier. The seeds still needed are computed at level alpha / pairs,
    which is enough whatever the other pairs turn out to be.

    Args:
        finals: Final loss by method and seed; None for a diverged run.
        alpha: Family-wise error.

    Returns:
        One verdict for each pair, in the order of `finals`; the later method is `first`, as a baseline that comes
        first is what the others are compared with.
    """
    pairs = [(second, first) for first, second in combinations(finals, 2)]
    samples = [_differences(finals[first], finals[second]) for first, second in pairs]
    raw = [None if sample is None else paired_p(sample) for sample in samples]
    adjusted = holm([1.0 if p is None else p for p in raw])
    verdicts: list[Verdict] = []
    for (first, second), sample, p, corrected in zip(pairs, samples, raw, adjusted, strict=True):
        summary = summarize(sample or [])
        outcome: Outcome = "undecided"
        if summary is not None and p is not None and corrected <= alpha:
            outcome = "better" if summary.mean < 0 else "worse"
        more = None
        if summary is not None and summary.sd and outcome == "undecided":
            total = seeds_needed(summary.mean / summary.sd, alpha=alpha / len(pairs))
            more = None if total is None else total - summary.n
        verdicts.append(
            Verdict(
                first,
                second,
                outcome,
                difference=None if summary is None else summary.mean,
                interval=t_interval(sample or []),
                p=None if p is None else corrected,
                n=0 if summary is None else summary.n,
                more_seeds=more,
                diverged=tuple(name for name in (first, second) if None in finals[name].values()),
            )
        )
    return tuple(verdicts)


def _differences(first: Mapping[int, float | None], second: Mapping[int, float | None]) -> list[float] | None:
    """First minus second on the shared seeds; None if a run of either diverged."""
    if None in first.values() or None in second.values():
        return None
    shared = [(first[seed], second[seed]) for seed in first if seed in second]
    return [one - other for one, other in shared if one is not None and other is not None]
