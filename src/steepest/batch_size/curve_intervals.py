"""Bootstrap of a fit over runs: what other seeds would have given.

Each resample keeps the batch sizes and gives every run a new log K: the curve plus a residual drawn from those of
all runs. Three seeds are too few to resample within a batch size; runs share one spread, so residuals are pooled. Two
corrections make intervals as wide as they should be: residuals are scaled to the spread that is corrected for the
fitted parameters, and each resample is scaled by √(f / χ²_f), f degrees of freedom, because that spread is itself an
estimate; deviations then have Student's tails instead of the normal ones.

Which family is right is uncertain, too: `averaged` divides the resamples among families by Akaike's weights.

A run of a batch size at which runs were stopped is stopped again if its new K is beyond the steps that it was given;
what it was given is read off those that were stopped. Where no run was stopped, nothing is known to stop one.
"""

import math
from dataclasses import dataclass

import numpy as np

from steepest.batch_size.curve_families import Array, Family, Mask
from steepest.batch_size.curve_fit import Choice, Fit, Runs
from steepest.batch_size.curve_likelihood import maximise

ATTEMPTS = 20
FEWEST_RESIDUALS = 6
LEAST_WEIGHT = 0.02


@dataclass(frozen=True, eq=False)
class Refits:
    """One family fitted to resampled runs.

    Args:
        family: Which.
        theta: (resamples, p).
        smallest: Log of the smallest batch size that reached the target.
        log_scale: (resamples,), log K_∞.
    """

    family: Family
    theta: Array
    smallest: float
    log_scale: Array

    def log_steps(self, sizes: Array) -> Array:
        """Log K(b) of each resample at these batch sizes, (n,): (resamples, n), inf at and below a pole."""
        return self.log_scale[:, None] + self.family.log_shape(self.theta, np.log(sizes))

    def best_batches(self) -> Array:
        """b* of each resample, 0 where b K(b) only grows."""
        return np.exp(self.family.log_best(self.theta))

    def first_parameters(self) -> Array:
        """B_crit of H, b_min of S, I, U and W, b_1 of P."""
        return np.exp(self.theta[:, 0])

    def overheads(self, share: float) -> Array:
        """Batch sizes at which b K(b) is 1 + `share` times its least value."""
        return np.exp(self.family.log_overhead(self.theta, share, self.smallest))


def bootstrap(fit: Fit, *, resamples: int = 1000, seed: int = 0) -> Refits:
    """Fit the family again to resampled runs.

    Args:
        fit: To the runs as they are.
        resamples: How many.
        seed: Of the resampling.

    Returns:
        The refits.

    Raises:
        ValueError: If most resamples reach the target at too few batch sizes.
    """
    rng = np.random.default_rng(seed)
    y, stopped = _enough(fit, resamples, rng)
    starts = np.broadcast_to(fit.theta, (resamples, fit.family.size))
    found = maximise(fit.family, fit.runs.x, y, stopped, starts)
    return Refits(fit.family, found.theta, float(fit.runs.reached_sizes[0]), found.scale)


def averaged(choice: Choice, *, resamples: int = 1000, seed: int = 0) -> tuple[Refits, ...]:
    """Bootstrap each family from its own fit, with as many resamples as its Akaike weight gives it.

    An interval of the chosen family alone would be too narrow: choosing is part of the estimate.

    Args:
        choice: All fits; those with less than 2% of the weight are left out.
        resamples: In all.
        seed: Of the resampling.

    Returns:
        By family, those with the lowest AICc first.

    Raises:
        ValueError: If most resamples reach the target at too few batch sizes.
    """
    weights = choice.weights
    credible = [one for one in choice.fits if weights[one.family.key] >= LEAST_WEIGHT]
    shares = np.cumsum([weights[one.family.key] for one in credible])
    ends = [0, *np.rint(resamples * shares / shares[-1]).astype(int).tolist()]
    return tuple(
        bootstrap(one, resamples=end - start, seed=seed)
        for one, start, end in zip(credible, ends, ends[1:], strict=False)
        if end > start
    )


def percentiles(values: Array, level: float) -> tuple[float, float]:
    """Ends of the central interval; infinities may be among the values."""
    low = float(np.quantile(values, (1 - level) / 2, method="lower"))
    return low, float(np.quantile(values, (1 + level) / 2, method="higher"))


def _enough(fit: Fit, resamples: int, rng: np.random.Generator) -> tuple[Array, Mask]:
    """Resamples in which the target is reached at as many batch sizes as the family needs."""
    kept: list[tuple[Array, Mask]] = []
    have = 0
    for _ in range(ATTEMPTS):
        y, stopped = _resample(fit, resamples, rng)
        sizes, column = np.unique(fit.runs.x, return_inverse=True)
        reached = np.zeros((resamples, len(sizes)), dtype=bool)
        for index in range(len(sizes)):
            reached[:, index] = (~stopped[:, column == index]).any(axis=1)
        good = reached.sum(axis=1) >= fit.family.needs
        kept.append((y[good], stopped[good]))
        have += int(good.sum())
        if have >= resamples:
            ys, stops = zip(*kept, strict=True)
            return np.concatenate(ys)[:resamples], np.concatenate(stops)[:resamples]
    problem = f"Too few resampled runs reach the target at the {fit.family.needs} batch sizes that"
    raise ValueError(f"{problem} {fit.family.key} takes. Give runs more steps, or take a higher target.")


def _resample(fit: Fit, resamples: int, rng: np.random.Generator) -> tuple[Array, Mask]:
    runs = fit.runs
    mean = fit.log_scale + fit.family.log_shape(fit.theta, runs.x)
    freedom = max(int((~runs.stopped).sum()) - fit.family.size - 1, 1)
    limits = step_limits(runs)
    pool = (runs.y - mean)[np.isinf(limits)]
    shape = (resamples, len(runs.x))
    if len(pool) < FEWEST_RESIDUALS:
        drawn = rng.standard_normal(shape)
    else:
        centred = pool - pool.mean()
        spread = math.sqrt(float((centred**2).mean())) or 1.0
        drawn = rng.choice(centred / spread, shape)
    spread = fit.sigma * np.sqrt(freedom / rng.chisquare(freedom, (resamples, 1)))
    y = mean + spread * drawn
    stopped = y > limits
    return np.where(stopped, limits, y), stopped


def step_limits(runs: Runs) -> Array:
    """Log of the steps that each run was given: (n,), inf at batch sizes where none was stopped."""
    limits = np.where(runs.stopped, runs.y, np.inf)
    for size in np.unique(runs.x[runs.stopped]):
        here = runs.x == size
        most = float(runs.y[here & runs.stopped].max())
        limits[here & ~runs.stopped] = np.maximum(most, runs.y[here & ~runs.stopped])
    return limits
