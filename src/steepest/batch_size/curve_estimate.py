"""From runs at several batch sizes to critical batch sizes, with what is not known said.

Two numbers go by that name, and they are different things:

* b*, the batch size that minimises the samples b K(b) (stochastic gradient evaluations) until the target;
* B_crit, the knee of the hyperbola K(b) = K_min (1 + B_crit / b): below it, doubling b nearly halves the steps; above
  it, doubling b nearly doubles the samples. On a hyperbola b K(b) only grows, so there is no b* in its interior.

`estimate` answers both, and a third: the batch size that costs 20% more samples than the cheapest.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import special

from steepest.batch_size.curve_answers import Answer, best_answer, levels, scale_answer
from steepest.batch_size.curve_families import family
from steepest.batch_size.curve_fit import ALL_FAMILIES, Choice, Fit, Point, as_runs, choose, fit_runs, lacking
from steepest.batch_size.curve_intervals import averaged, bootstrap
from steepest.checks import number, whole

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
