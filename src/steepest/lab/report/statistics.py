"""Statistics of a race: numbers in, numbers out; no files, no text.

Runs with the same seed share initial weights and data order, so methods are compared seed by seed: what is tested is
the mean of the paired differences. It has two sources of error: the seeds, and the examples that losses are means over,
the same ones for all runs, so that no number of seeds averages that out. With d_sk the difference of seed s on block k
of the examples, S seeds and K blocks,

    variance of the mean = var_s(mean_k d) / S + var_k(mean_s d) / K,

which counts what seeds and blocks do together twice, and so errs on the safe side. Degrees of freedom are those of the
source that has fewer, in practice S - 1: Satterthwaite's (1946) weigh them by variances that few seeds tell badly, and
decided 12% and 8% of races without a difference, of two and three seeds, at a level of 5%. Evaluations along one run
are not independent and count once.
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
        sampling: Standard error of the difference for the evaluated examples alone, which is part of `p` and
            `interval`; None where it is not known, and then it is part of neither.
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
    sampling: float | None
    diverged: tuple[str, ...]


def summarize(values: Sequence[float]) -> Summary | None:
    """Mean, sample standard deviation and number of the values; None if there are none."""
    if not values:
        return None
    return Summary(fmean(values), stdev(values) if len(values) > 1 else None, len(values))


@dataclass(frozen=True)
class Precision:
    """How far a mean over seeds may be off.

    Args:
        error: Standard error.
        freedom: Degrees of freedom, of the source that has fewer.
    """

    error: float
    freedom: int


def precision(values: Sequence[float], blocks: Sequence[float] = ()) -> Precision | None:
    """How far the mean of values of single seeds may be off; None below two of them.

    Args:
        values: One of each seed.
        blocks: The same mean on each block of the evaluated examples alone; empty if it is exact for each seed.
    """
    if len(values) < 2:
        return None
    sources = [own for own in (values, blocks) if len(own) > 1]
    error = math.sqrt(sum(stdev(own) ** 2 / len(own) for own in sources))
    return Precision(error, min(map(len, sources)) - 1)


def t_interval(
    values: Sequence[float], blocks: Sequence[float] = (), *, confidence: float = 1 - ALPHA
) -> Interval | None:
    """Student's confidence interval of the mean; None below two values.

    Args:
        values: One of each seed.
        blocks: As for `precision`.
        confidence: Of the interval.
    """
    around = precision(values, blocks)
    if around is None:
        return None
    half = float(special.stdtrit(around.freedom, (1 + confidence) / 2)) * around.error
    return Interval(fmean(values) - half, fmean(values) + half)


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


def paired_p(differences: Sequence[float], blocks: Sequence[float] = ()) -> float | None:
    """Two-sided p-value of the paired t-test; None below two seeds.

    Differences that are all the same have no spread to test against: p is then 1 if they are 0, else 0.

    Args:
        differences: One of each seed.
        blocks: As for `precision`.
    """
    around = precision(differences, blocks)
    if around is None:
        return None
    mean = fmean(differences)
    if around.error == 0:
        return 1.0 if mean == 0 else 0.0
    return float(2 * special.stdtr(around.freedom, -abs(mean) / around.error))


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


def seeds_needed(
    effect: float, *, sampling: float = 0.0, blocks: int = 0, alpha: float = ALPHA, power: float = POWER
) -> int | None:
    """Smallest number of seeds at which a two-sided paired t-test finds `effect` with the given power.

    Args:
        effect: Mean of the paired differences over their standard deviation, either sign.
        sampling: Standard error for the evaluated examples, over the same deviation; more seeds leave it as it is.
        blocks: Of examples, from which `sampling` is known.
        alpha: Level of the test.
        power: Probability of finding it.

    Returns:
        At least 2; None if more than `MOST_SEEDS`.
    """

    def enough(n: int) -> bool:
        freedom = min(n, blocks or n) - 1
        critical = float(special.stdtrit(freedom, 1 - alpha / 2))
        return float(stats.nct.sf(critical, freedom, abs(effect) / math.sqrt(1 / n + sampling**2))) >= power

    low, high = 1, MOST_SEEDS
    if not enough(high):
        return None
    while high - low > 1:  # power grows with n
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


@dataclass(frozen=True)
class Ended:
    """A run that has ended, as a comparison sees it.

    Args:
        loss: Final loss; None if it diverged.
        blocks: The same on each block of the evaluated examples; empty where it is exact, None where it is unknown.
    """

    loss: float | None
    blocks: tuple[float, ...] | None = ()


def paired_verdicts(finals: Mapping[str, Mapping[int, Ended]], *, alpha: float = ALPHA) -> tuple[Verdict, ...]:
    """Compare all pairs of methods on their final losses, seed by seed.

    Paired t-tests, Holm-corrected over all pairs. A pair that cannot be tested counts in the correction as p = 1, so
    that a missing run never makes another verdict easier. The seeds still needed are computed at level alpha / pairs,
    which is enough whatever the other pairs turn out to be.

    Args:
        finals: By method and seed.
        alpha: Family-wise error.

    Returns:
        One verdict for each pair, in the order of `finals`; the later method is `first`, as a baseline that comes
        first is what the others are compared with.
    """
    pairs = [(second, first) for first, second in combinations(finals, 2)]
    samples = [_differences(finals[first], finals[second]) for first, second in pairs]
    raw = [paired_p(sample.seeds, sample.blocks) for sample in samples]
    adjusted = holm([1.0 if p is None else p for p in raw])
    verdicts: list[Verdict] = []
    for (first, second), sample, p, corrected in zip(pairs, samples, raw, adjusted, strict=True):
        summary = summarize(sample.seeds)
        outcome: Outcome = "undecided"
        if summary is not None and p is not None and corrected <= alpha:
            outcome = "better" if summary.mean < 0 else "worse"
        more = None
        if summary is not None and summary.sd and outcome == "undecided":
            of_one = (sample.sampling or 0.0) / summary.sd
            effect, blocks = summary.mean / summary.sd, len(sample.blocks)
            total = seeds_needed(effect, sampling=of_one, blocks=blocks, alpha=alpha / len(pairs))
            more = None if total is None else max(1, total - summary.n)
        verdicts.append(
            Verdict(
                first,
                second,
                outcome,
                difference=None if summary is None else summary.mean,
                interval=t_interval(sample.seeds, sample.blocks),
                p=None if p is None else corrected,
                n=0 if summary is None else summary.n,
                more_seeds=more,
                sampling=sample.sampling,
                diverged=tuple(name for name in (first, second) if _diverged(finals[name])),
            )
        )
    return tuple(verdicts)


@dataclass(frozen=True)
class _Differences:
    """Of two methods: of each shared seed, and of each block in the mean over these seeds."""

    seeds: list[float]
    blocks: list[float]
    sampling: float | None


def _differences(first: Mapping[int, Ended], second: Mapping[int, Ended]) -> _Differences:
    """First minus second; nothing if a run of either diverged."""
    if _diverged(first) or _diverged(second):
        return _Differences([], [], None)
    shared = [(first[seed], second[seed]) for seed in first if seed in second]
    seeds = [one.loss - other.loss for one, other in shared if one.loss is not None and other.loss is not None]
    recorded = [(one.blocks, other.blocks) for one, other in shared]
    if any(own is None or len(own) != len(recorded[0][0] or ()) for pair in recorded for own in pair):
        return _Differences(seeds, [], None)
    of_seeds = [[a - b for a, b in zip(one or (), other or (), strict=True)] for one, other in recorded]
    blocks = [fmean(own) for own in zip(*of_seeds, strict=True)]
    return _Differences(seeds, blocks, stdev(blocks) / math.sqrt(len(blocks)) if len(blocks) > 1 else 0.0)


def _diverged(finals: Mapping[int, Ended]) -> bool:
    return any(run.loss is None for run in finals.values())
