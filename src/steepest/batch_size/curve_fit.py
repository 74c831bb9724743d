"""Fits of K(b) to runs: one family at a time, the choice among families, and bootstrap intervals of both."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from steepest.batch_size.curve_families import FAMILIES, Array, Family, Mask, family
from steepest.batch_size.curve_likelihood import LEAST_SIGMA, best_of_starts, maximise
from steepest.checks import check_fields, flag, number, whole

ALL_FAMILIES = tuple(FAMILIES)


@dataclass(frozen=True)
class Point:
    """One run.

    Args:
        batch_size: b, in whatever is counted: images, sequences, tokens.
        seed: Of the run; two runs at one batch size have different ones.
        steps: To the target, or the steps done without reaching it.
        censored: Whether it was stopped before it reached the target.
    """

    batch_size: int
    seed: int
    steps: float
    censored: bool = False

    def __post_init__(self) -> None:
        check_fields(self, {"batch_size": whole(1), "seed": whole(0), "steps": number(above=True), "censored": flag})


@dataclass(frozen=True, eq=False)
class Runs:
    """Points as arrays, sorted by batch size and seed.

    Args:
        x: (n,), log batch size.
        y: (n,), log steps.
        stopped: (n,), whether the target was not reached.
    """

    x: Array
    y: Array
    stopped: Mask

    @property
    def reached_sizes(self) -> Array:
        """Batch sizes at which a run reached the target, logarithms, increasing."""
        return np.unique(self.x[~self.stopped])


@dataclass(frozen=True, eq=False)
class Fit:
    """A family with the parameters that make the runs most likely.

    Args:
        family: Which.
        theta: (p,), logarithms of its parameters.
        log_scale: log K_∞.
        sigma: Standard deviation of log K between runs, corrected for the number of fitted parameters.
        loglik: Log-likelihood of log K.
        aicc: Akaike's criterion with its correction for few runs.
        at_bound: Parameters that ran to the end of what was searched: the data do not determine them.
        runs: What was fitted.
    """

    family: Family
    theta: Array
    log_scale: float
    sigma: float
    loglik: float
    aicc: float
    at_bound: tuple[str, ...]
    runs: Runs

    @property
    def parameters(self) -> dict[str, float]:
        """K_inf and those of the family, by name."""
        values = np.exp(self.theta).tolist()
        return {"K_inf": math.exp(self.log_scale), **dict(zip(self.family.parameters, values, strict=True))}

    def steps(self, batch_size: float) -> float:
        """K(b); inf where the family says that the target is out of reach."""
        shape = self.family.log_shape(self.theta, np.log([float(batch_size)]))
        return float(np.exp(self.log_scale + shape[0]))

    @property
    def best_batch(self) -> float | None:
        """Where b K(b) of the family is least, measured there or not; None if it only grows."""
        best = float(self.family.log_best(self.theta))
        return math.exp(best) if math.isfinite(best) else None

    def overhead(self, share: float) -> float:
        """Batch size at which b K(b) is 1 + `share` times its least value.

        For H the least value is the limit b -> 0, hence share · B_crit. For a power law with α <= 1 the limit is 0, and
        the value at the smallest measured batch size takes its place.

        Args:
            share: Above 0; 0.2 is 20% more data.

        Returns:
            A batch size beyond the one with the least value.
        """
        smallest = float(self.runs.reached_sizes[0])
        return float(np.exp(self.family.log_overhead(self.theta, share, smallest)))


@dataclass(frozen=True, eq=False)
class Choice:
    """All families that could be fitted.

    Args:
        fits: By AICc, the best first.
        skipped: Key to the reason why a family was not fitted.
    """

    fits: tuple[Fit, ...]
    skipped: dict[str, str]

    @property
    def chosen(self) -> Fit:
        """The one with the lowest AICc."""
        return self.fits[0]

    @property
    def weights(self) -> dict[str, float]:
        """Akaike's weights by key: they sum to one."""
        relative = [math.exp(-0.5 * (fit.aicc - self.fits[0].aicc)) for fit in self.fits]
        return {fit.family.key: one / sum(relative) for fit, one in zip(self.fits, relative, strict=True)}

    def excess(self, key: str) -> float | None:
        """AICc of a family above the lowest; None if it was not fitted."""
        return next((fit.aicc - self.fits[0].aicc for fit in self.fits if fit.family.key == key), None)

    def __str__(self) -> str:
        """The table: key, AICc above the lowest, weight, b* and parameters."""
        rows = [f"{'':2} {'+AICc':>8} {'weight':>7} {'sigma':>7}  parameters"]
        weights = self.weights
        for fit in self.fits:
            key = fit.family.key
            values = ", ".join(f"{name}={value:.4g}" for name, value in fit.parameters.items())
            rows.append(f"{key:2} {self.excess(key):8.2f} {weights[key]:7.3f} {fit.sigma:7.4f}  {values}")
        return "\n".join([*rows, *(f"{key:2} not fitted: {reason}" for key, reason in self.skipped.items())])


def as_runs(points: Sequence[Point]) -> Runs:
    """Points as arrays.

    Raises:
        ValueError: If two have the same batch size and seed.
    """
    ordered = sorted(points, key=lambda point: (point.batch_size, point.seed))
    for one, other in pairwise(ordered):
        if (one.batch_size, one.seed) == (other.batch_size, other.seed):
            problem = f"Two points have batch size {one.batch_size} and seed {one.seed}"
            raise ValueError(f"{problem}: they would count one run twice. Give repeated runs seeds of their own.")
    x = np.log(np.array([float(point.batch_size) for point in ordered]))
    y = np.log(np.array([float(point.steps) for point in ordered]))
    return Runs(x, y, np.array([point.censored for point in ordered], dtype=bool))


def lacking(runs: Runs, shape: Family) -> str | None:
    """Why a family cannot be fitted to these runs; None if it can."""
    sizes, parameters = len(runs.reached_sizes), shape.size + 2
    if sizes < shape.needs:
        return f"takes the target reached at {shape.needs} batch sizes or more, here at {sizes}"
    if len(runs.x) - parameters < 2 or int((~runs.stopped).sum()) < parameters:
        return f"takes {parameters + 2} runs or more of which {parameters} reached the target, here {len(runs.x)}"
    return None


def fit(points: Sequence[Point], key: str) -> Fit:
    """Fit one family by maximum likelihood, log-normal, with stopped runs as such.

    Args:
        points: The runs.
        key: Of the family: H, S, I, P, U or W.

    Returns:
        The fit.

    Raises:
        ValueError: If the family is unknown, or the runs are too few for it.
    """
    shape, runs = family(key), as_runs(points)
    reason = lacking(runs, shape)
    if reason is not None:
        raise ValueError(f"The {shape.name} ({key}) {reason}. Add batch sizes or seeds, or fit a simpler family.")
    return fit_runs(runs, shape)


def choose(points: Sequence[Point], families: Sequence[str] = ALL_FAMILIES) -> Choice:
    """Fit several families and order them by AICc.

    Args:
        points: The runs.
        families: Keys.

    Returns:
        All fits, and why the others were left out.

    Raises:
        ValueError: If a family is unknown or none can be fitted.
    """
    runs = as_runs(points)
    fits: list[Fit] = []
    skipped: dict[str, str] = {}
    for shape in map(family, dict.fromkeys(families)):
        reason = lacking(runs, shape)
        if reason is None:
            fits.append(fit_runs(runs, shape))
        else:
            skipped[shape.key] = reason
    if not fits:
        reasons = "; ".join(f"{key} {reason}" for key, reason in skipped.items())
        raise ValueError(f"No family can be fitted: {reasons or 'none was asked for'}. Add batch sizes or seeds.")
    return Choice(tuple(sorted(fits, key=lambda one: one.aicc)), skipped)


def fit_runs(runs: Runs, shape: Family) -> Fit:
    """Fit one family to runs that suffice for it."""
    found = best_of_starts(shape, runs.x, runs.y, runs.stopped)
    n, reached, size = len(runs.x), int((~runs.stopped).sum()), shape.size + 2
    loglik = float(found.loglik[0])
    low, high = shape.box(runs.x, ~runs.stopped)
    pressed = (found.theta[0] <= low) | (found.theta[0] >= high)
    # Runs that were stopped say little of the spread: only the others count as observations of it.
    freed = math.sqrt(reached / max(reached - size + 1, 1))
    return Fit(
        family=shape,
        theta=found.theta[0],
        log_scale=float(found.scale[0]),
        sigma=max(float(found.sigma[0]) * freed, LEAST_SIGMA),
        loglik=loglik,
        aicc=2 * size - 2 * loglik + 2 * size * (size + 1) / (n - size - 1),
        at_bound=tuple(name for name, there in zip(shape.parameters, pressed, strict=True) if there),
        runs=runs,
    )


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
