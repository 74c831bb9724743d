"""From runs at several batch sizes to critical batch sizes, with what is not known said.

It takes numpy and scipy, which `pip install 'steepest[lab]'` brings; hence it is not imported with `steepest`.

Two numbers go by that name, and they are different things:

* b*, the batch size that minimises the samples b K(b) (stochastic gradient evaluations) until the target;
* B_crit, the knee of the hyperbola K(b) = K_min (1 + B_crit / b): below it, doubling b nearly halves the steps; above
  it, doubling b nearly doubles the samples. On a hyperbola b K(b) only grows, so there is no b* in its interior.

`estimate` answers both, and a third: the batch size that costs 20% more samples than the cheapest. b* is given as a
number only if

* the chosen family has such a minimum (the hyperbola has none),
* the measured b K(b), geometric means over seeds, is least inside the grid, and
* the target was reached by all seeds at two or more batch sizes on each side of b*.

Otherwise the answer is a range with ends on the grid.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy import special

from steepest.batch_size.curve_crossing import Crossing, CrossingStatus, first_crossing, first_crossings
from steepest.batch_size.curve_families import FAMILIES, Array, Family, family
from steepest.batch_size.curve_fit import (
    ALL_FAMILIES,
    Choice,
    Fit,
    Point,
    Refits,
    Runs,
    as_runs,
    averaged,
    bootstrap,
    choose,
    fit,
    fit_runs,
    lacking,
    percentiles,
)
from steepest.checks import number, whole

__all__ = [
    "FAMILIES",
    "Answer",
    "Choice",
    "Crossing",
    "CrossingStatus",
    "Estimate",
    "Family",
    "Fit",
    "Kind",
    "Level",
    "Point",
    "Refits",
    "StepTime",
    "TimeOptimum",
    "averaged",
    "bootstrap",
    "choose",
    "estimate",
    "family",
    "first_crossing",
    "first_crossings",
    "fit",
    "lack_of_fit",
    "levels",
    "linear_step_time",
    "percentiles",
    "recommendation",
    "time_optimal",
]


Kind = Literal["point", "at most", "at least", "between", "refused"]
"""What an `Answer` is: a number, a range that is open on one side or on none, or nothing."""

Reach = tuple[float, float]


def size_text(size: float) -> str:
    """A batch size in print: three digits, but whole from 1,000 on."""
    return f"{size:,.0f}" if size >= 1000 else f"{size:.3g}"


@dataclass(frozen=True)
class Answer:
    """A batch size, or what is known of it.

    Args:
        kind: Whether it is a number, a range, or nothing.
        value: The number, if it is one.
        low: Lower end of its interval or range; None if open: below all that was measured.
        high: Upper end; None if open: above all that was measured.
        reason: Why it is no number, or what to know about it; may be empty for a number.
    """

    kind: Kind
    value: float | None
    low: float | None
    high: float | None
    reason: str = ""

    def contains(self, batch_size: float) -> bool:
        """Whether the interval or range has this batch size in it; an open end has everything in it."""
        above = self.low is None or batch_size >= self.low
        return self.kind != "refused" and above and (self.high is None or batch_size <= self.high)

    def __str__(self) -> str:
        """As in a sentence: "= 130 [95, 180]", "<= 64", "between 32 and 128", "not known"."""
        low, high = ("open" if end is None else size_text(end) for end in (self.low, self.high))
        forms = {
            "point": f"= {size_text(self.value or 0)} [{low}, {high}]",
            "at most": f"<= {high}",
            "at least": f">= {low}",
            "between": f"between {low} and {high}",
            "refused": "not known",
        }
        return forms[self.kind]


@dataclass(frozen=True)
class Level:
    """b K(b) at one batch size of the grid.

    Args:
        batch_size: Of the grid.
        samples: Geometric mean of b K over seeds; what the runs used if some were stopped, which it is above.
        measured: Whether all seeds reached the target.
    """

    batch_size: float
    samples: float
    measured: bool


def levels(runs: Runs) -> tuple[Level, ...]:
    """b K(b) as measured, by batch size, increasing."""
    found: list[Level] = []
    for x in np.unique(runs.x):
        here = runs.x == x
        mean = float(np.exp((runs.x + runs.y)[here].mean()))
        found.append(Level(round(math.exp(float(x))), mean, not bool(runs.stopped[here].any())))
    return tuple(found)


def best_answer(fit: Fit, values: Array, level: float) -> Answer:
    """b*, the batch size that minimises b K(b).

    Args:
        fit: Of the chosen family.
        values: (resamples,), b* of its bootstrap, 0 where there is none.
        level: Of the interval.

    Returns:
        A number only under the conditions at the top of this file.
    """
    grid = levels(fit.runs)
    measured = [one for one in grid if one.measured]
    if len(measured) < 3:
        reason = f"all seeds reached the target at {len(measured)} batch sizes only; at least 3 are needed"
        return Answer("refused", None, None, None, reason)
    smallest, largest = measured[0].batch_size, measured[-1].batch_size
    low, high = percentiles(values, level)
    value = fit.best_batch
    least = min(measured, key=lambda one: one.samples)
    if value is None:
        return _without_minimum(fit, least, max(high, least.batch_size), [one.batch_size for one in measured])
    below, above = _sides(grid, least)
    sides = [sum(one.batch_size < value for one in measured), sum(one.batch_size > value for one in measured)]
    inside = smallest < least.batch_size < largest
    if inside and min(sides) >= 2:
        return _number(value, (low, high), (smallest, largest))
    start = max([size for size in below if size < min(low, least.batch_size)], default=None)
    end = min([size for size in above if size > max(high, least.batch_size)], default=None)
    least_there = f"b K(b) is least at {least.batch_size:g}"
    if start is None and end is None:
        return Answer(
            "refused", None, None, None, f"{least_there}, but the {fit.family.name} puts b* at {size_text(value)}"
        )
    if start is None:
        bound = min(one.batch_size for one in measured if one.batch_size >= min(max(high, smallest), largest))
        return Answer("at most", None, None, max(bound, least.batch_size), _edge(least, smallest, "smallest"))
    if end is None:
        bound = max(one.batch_size for one in measured if one.batch_size <= max(min(low, largest), smallest))
        return Answer("at least", None, min(bound, least.batch_size), None, _edge(least, largest, "largest"))
    put = f"the {fit.family.name} puts b* at {size_text(value)} [{size_text(low)}, {size_text(high)}]"
    few = f"with {sides[0]} measured below and {sides[1]} above, where a number takes 2 on each side"
    return Answer(
        "between", None, start, end, f"{least_there}; {put}, {few}" if min(sides) < 2 else f"{least_there}; {put}"
    )


def _without_minimum(fit: Fit, least: Level, reach: float, sizes: list[float]) -> Answer:
    """The family says that small is best; how small is known no better than other families and the runs allow."""
    reason = f"by the {fit.family.name}, b K(b) only grows with b, no interior minimum"
    if least.batch_size != sizes[0]:
        reason += f"; measured, it is least at {least.batch_size:g}"
    end = min([size for size in sizes if size >= reach], default=None)
    if end is None:
        return Answer("refused", None, None, None, f"{reason}; other families put it anywhere")
    return Answer("at most", None, None, end, f"smallest measured: {sizes[0]:g}; {reason}")


def scale_answer(value: float, values: Array, level: float, runs: Runs) -> Answer:
    """A batch size that the curve determines without being extreme there, such as B_crit.

    Args:
        value: Of the fit.
        values: (resamples,), of its bootstrap.
        level: Of the interval.
        runs: Which tell the measured range.

    Returns:
        A number if it is within the measured range.
    """
    sizes = np.exp(runs.reached_sizes)
    smallest, largest = float(sizes[0]), float(sizes[-1])
    low, high = percentiles(values, level)
    if smallest <= value <= largest:
        return _number(value, (low, high), (smallest, largest))
    put = f"the fit puts it at {size_text(value)}"
    if low < smallest and high > largest:
        return Answer("refused", None, None, None, f"{put}, its interval spans all that was measured")
    if value < smallest:
        return Answer("at most", None, None, max(high, smallest), f"{put}, below the smallest measured, {smallest:g}")
    return Answer("at least", None, min(low, largest), None, f"{put}, above the largest measured, {largest:g}")


def _number(value: float, interval: Reach, measured: Reach) -> Answer:
    """A number with its interval; ends beyond the measured range are open."""
    low = interval[0] if interval[0] >= measured[0] else None
    high = interval[1] if interval[1] <= measured[1] else None
    beyond = [name for name, end in (("smallest", low), ("largest", high)) if end is None]
    reason = f"its interval reaches beyond the {' and '.join(beyond)} measured" if beyond else ""
    return Answer("point", value, low, high, reason)


def _sides(grid: tuple[Level, ...], least: Level) -> tuple[list[float], list[float]]:
    """Batch sizes below and above at which b K(b) is known to be higher than its least measured value."""
    higher = [one.batch_size for one in grid if one is not least and one.samples > least.samples]
    return [b for b in higher if b < least.batch_size], [b for b in higher if b > least.batch_size]


def _edge(least: Level, end: float, name: str) -> str:
    toward = "still falls toward it" if least.batch_size == end else f"is least at {least.batch_size:g}"
    return f"{name} measured: {end:g}; b K(b) {toward}"


REJECTED = 4.0  # AICc above the lowest from which on the hyperbola is called rejected
CLOSE = 2.0  # AICc within which two families are both credible
MISFIT = 0.01  # p-value of the lack-of-fit test


@dataclass(frozen=True, eq=False)
class Estimate:
    """Everything that runs to one target say about batch sizes.

    Args:
        b_star: The batch size that minimises b K(b).
        knee: B_crit of the hyperbola, whichever family was chosen.
        overhead: The batch size at which b K(b) is 1 + `overhead_share` times its least value.
        overhead_share: 0.2 is 20%.
        choice: All fits with AICc.
        hyperbola: The fit that the knee is from; None if it could not be fitted.
        batch_sizes: Of the grid.
        seeds: Of the runs.
        level: Of the intervals.
        resamples: Of the bootstrap.
        warnings: Sentences.
    """

    b_star: Answer
    knee: Answer
    overhead: Answer
    overhead_share: float
    choice: Choice
    hyperbola: Fit | None
    batch_sizes: tuple[int, ...]
    seeds: tuple[int, ...]
    level: float
    resamples: int
    warnings: tuple[str, ...]

    @property
    def chosen(self) -> Fit:
        """The fit with the lowest AICc."""
        return self.choice.chosen


def estimate(
    points: Sequence[Point],
    *,
    families: Sequence[str] = ALL_FAMILIES,
    overhead: float = 0.2,
    level: float = 0.9,
    resamples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Fit all families, choose one by AICc, and answer with bootstrap intervals.

    Numbers are those of the chosen family. The interval of b* takes in the other families by their Akaike weights. That
    of the overhead does not, as what it is counted from is the family's; that of the knee is the hyperbola's.

    Args:
        points: Runs at several batch sizes, best with three seeds each, all to the same target.
        families: Keys of those to choose from.
        overhead: Share of additional samples, above 0.
        level: Of the intervals, between 0 and 1.
        resamples: Of the bootstrap.
        seed: Of the bootstrap.

    Returns:
        The answers.

    Raises:
        ValueError: If an option is out of range, a family is unknown, or none can be fitted.
    """
    overhead = number(above=True)("estimate: overhead", overhead)
    level = number(0, 1, above=True)("estimate: level", level)
    resamples = whole(100)("estimate: resamples", resamples)
    choice = choose(points, families)
    chosen, runs = choice.chosen, choice.chosen.runs
    refits = averaged(choice, resamples=resamples, seed=seed)
    best = np.concatenate([one.best_batches() for one in refits])
    beyond = bootstrap(chosen, resamples=resamples, seed=seed).overheads(overhead)
    hyperbola, knee = _knee(points, choice, level, resamples, seed)
    return Estimate(
        b_star=best_answer(chosen, best, level),
        knee=knee,
        overhead=scale_answer(chosen.overhead(overhead), beyond, level, runs),
        overhead_share=overhead,
        choice=choice,
        hyperbola=hyperbola,
        batch_sizes=tuple(sorted({point.batch_size for point in points})),
        seeds=tuple(sorted({point.seed for point in points})),
        level=level,
        resamples=resamples,
        warnings=_warnings(points, choice, hyperbola),
    )


def _knee(
    points: Sequence[Point], choice: Choice, level: float, resamples: int, seed: int
) -> tuple[Fit | None, Answer]:
    """The hyperbola is fitted for it even if other families are asked for or chosen."""
    shape = family("H")
    fitted = next((one for one in choice.fits if one.family is shape), None)
    if fitted is None:
        runs = as_runs(points)
        reason = lacking(runs, shape)
        if reason is not None:
            return None, Answer("refused", None, None, None, f"the hyperbola {reason}")
        fitted = fit_runs(runs, shape)
    values = bootstrap(fitted, resamples=resamples, seed=seed).first_parameters()
    answer = scale_answer(fitted.parameters["B_crit"], values, level, fitted.runs)
    excess = fitted.aicc - choice.chosen.aicc
    if excess > REJECTED:
        reasons = [answer.reason] if answer.reason else []
        answer = replace(answer, reason="; ".join([*reasons, f"the hyperbola is rejected, AICc +{excess:.1f}"]))
    return fitted, answer


def _warnings(points: Sequence[Point], choice: Choice, hyperbola: Fit | None) -> tuple[str, ...]:
    chosen = choice.chosen
    found: list[str] = []
    if hyperbola is not None and hyperbola.aicc - chosen.aicc > REJECTED:
        excess = f"AICc is {hyperbola.aicc - chosen.aicc:.1f} above that of the {chosen.family.name}"
        found.append(f"The hyperbola is rejected: its {excess}. The knee describes a curve that does not fit.")
    near = [one for one in choice.fits[1:] if one.aicc - chosen.aicc < CLOSE and _differs(one, chosen)]
    if near:
        names = ", ".join(one.family.key for one in near)
        found.append(f"{names} may be right as well as {chosen.family.key} (AICc within {CLOSE:g}): with another b*.")
    stopped = sum(point.censored for point in points)
    if stopped:
        found.append(f"{stopped} of {len(points)} runs stopped before the target; they enter the likelihood as such.")
    grid = levels(chosen.runs)
    first = next((index for index, one in enumerate(grid) if one.measured), 0)
    if not all(one.measured for one in grid[first:]):
        found.append("Runs at larger batch sizes than others that arrived were stopped: give every run more steps.")
    if len({point.seed for point in points}) == 1:
        found.append("One seed: what is taken for noise between runs is the distance from the fitted curve.")
    if chosen.at_bound:
        names = ", ".join(chosen.at_bound)
        found.append(f"{names} of {chosen.family.key} ran to the end of its range: the runs do not determine it.")
    p = lack_of_fit(chosen)
    if p is not None and p < MISFIT:
        found.append(
            f"{chosen.family.key} does not describe the runs: it misses them by more than seeds scatter (p={p:.1g})."
        )
    return tuple(found)


def _differs(one: Fit, other: Fit) -> bool:
    """Whether b* of two fits, as far as it is within the measured range, differs by more than a factor √2."""
    sizes = np.exp(one.runs.reached_sizes)
    first, second = (min(max(fitted.best_batch or 0.0, sizes[0]), sizes[-1]) for fitted in (one, other))
    return not 0.5 < (first / second) ** 2 < 2


def lack_of_fit(fit: Fit) -> float | None:
    """p-value of the F-test of a fit against free means at each batch size.

    Args:
        fit: Any.

    Returns:
        Small if the curve misses the means by more than seeds explain; None if runs were stopped, or there are too few
        batch sizes or seeds to test it.
    """
    runs = fit.runs
    if runs.stopped.any():
        return None
    groups = [runs.y[runs.x == x] for x in runs.reached_sizes]
    within = sum(float(((group - group.mean()) ** 2).sum()) for group in groups)
    residual = runs.y - fit.log_scale - fit.family.log_shape(fit.theta, runs.x)
    curve, error = len(groups) - fit.family.size - 1, len(runs.y) - len(groups)
    if curve < 1 or error < 1 or within < 1e-20:
        return None
    ratio = max(float((residual**2).sum()) - within, 0.0) / curve / (within / error)
    return float(special.fdtrc(curve, error, ratio))


def recommendation(estimate: Estimate, *, setting: str = "", unit: str = "") -> str:
    """What to say of the runs in one sentence.

    Args:
        estimate: Of the runs.
        setting: What was held or tuned: "Muon, target loss 0.2, lr tuned at each batch size".
        unit: What a batch size counts: "images", "sequences".

    Returns:
        b*, the batch size at the overhead, the knee, and where they are from; never one of them without its name.
    """
    share = f"{100 * estimate.overhead_share:g}%-overhead batch"
    parts = [
        _clause("SFO-minimising b*", estimate.b_star, unit),
        _clause(share, estimate.overhead, unit),
        _clause("knee B_crit", estimate.knee, unit),
    ]
    seeds = f"{len(estimate.seeds)} seed{'s' if len(estimate.seeds) != 1 else ''}"
    sizes = f"{len(estimate.batch_sizes)} batch sizes {estimate.batch_sizes[0]} to {estimate.batch_sizes[-1]}"
    chosen = estimate.chosen.family
    origin = f"K(b) {chosen.name}, knee hyperbola, {100 * estimate.level:g}% intervals, {seeds}, {sizes}"
    return f"{', '.join(parts)} ({origin}{', ' + setting if setting else ''})."


def _clause(name: str, answer: Answer, unit: str) -> str:
    counted = f" {unit}" if unit and answer.kind != "refused" else ""
    reason = f" ({answer.reason})" if answer.reason else ""
    return f"{name} {answer}{counted}{reason}"


FINENESS = 4001  # places between the smallest and the largest batch size
StepTime = Callable[[Array], Array]
"""Seconds of a step at each of some batch sizes."""


@dataclass(frozen=True)
class TimeOptimum:
    """Where K(b) times the seconds of a step is least.

    Args:
        kind: "at most" and "at least" mean that the least is at an end of what was measured.
        batch_size: The best one, within what was measured.
        seconds: To the target there.
    """

    kind: Literal["point", "at most", "at least"]
    batch_size: float
    seconds: float


def linear_step_time(*, seconds_fixed: float, seconds_per_example: float) -> StepTime:
    """A step takes a fixed time and some for each example.

    Args:
        seconds_fixed: At least 0.
        seconds_per_example: At least 0; of the two one is above 0.

    Returns:
        Batch sizes to seconds.

    Raises:
        ValueError: If they are out of range.
    """
    fixed, each = seconds_fixed, seconds_per_example
    if not (0 <= fixed < math.inf and 0 <= each < math.inf and fixed + each > 0):
        problem = "seconds_fixed and seconds_per_example must be finite, not negative and not both 0"
        raise ValueError(f"{problem}, got {fixed:g} and {each:g}.")
    return lambda sizes: fixed + each * sizes


def time_optimal(curve: Fit, step_time: StepTime | Mapping[int, float]) -> TimeOptimum:
    """Minimise K(b) · seconds(b) over the batch sizes that were measured.

    Args:
        curve: K(b).
        step_time: Seconds of a step as a function, or as measured at some batch sizes, with straight lines between.

    Returns:
        The best batch size; nothing is extrapolated.

    Raises:
        ValueError: If measured times are not positive, or the batch sizes that have a time and those that have a number
            of steps do not overlap.

    Examples:
        >>> from steepest.batch_size.curve_fit import Point, fit
        >>> runs = [Point(b, 0, 100 * (1 + 200 / b)) for b in (16, 64, 256, 1024, 4096)]
        >>> timed = linear_step_time(seconds_fixed=0.5, seconds_per_example=0.001)
        >>> round(time_optimal(fit(runs, "H"), timed).batch_size)  # sqrt(200 · 0.5 / 0.001)
        316
    """
    reached = np.exp(curve.runs.reached_sizes)
    low, high = float(reached[0]), float(reached[-1])
    if isinstance(step_time, Mapping):
        times = step_time
        if len(times) < 2 or not all(size > 0 and 0 < seconds < math.inf for size, seconds in times.items()):
            problem = "Measured step times take two or more batch sizes with finite seconds above 0"
            raise ValueError(f"{problem}, got {dict(times)}.")
        low, high = max(low, float(min(times))), min(high, float(max(times)))
    if not low < high:
        problem = "Batch sizes with a step time and those that reached the target do not overlap"
        raise ValueError(f"{problem}: the latter are {reached[0]:.4g} to {reached[-1]:.4g}. Time steps in that range.")
    sizes = np.geomspace(low, high, FINENESS)
    log_steps = curve.log_scale + curve.family.log_shape(curve.theta, np.log(sizes))
    seconds = np.exp(log_steps) * _seconds(step_time, sizes)
    best = int(np.argmin(seconds))
    kind = "at most" if best == 0 else "at least" if best == len(sizes) - 1 else "point"
    return TimeOptimum(kind, float(sizes[best]), float(seconds[best]))


def _seconds(step_time: StepTime | Mapping[int, float], sizes: Array) -> Array:
    if not isinstance(step_time, Mapping):
        return step_time(sizes)
    measured = sorted(step_time)
    return np.interp(sizes, np.array(measured, dtype=float), np.array([step_time[size] for size in measured]))
