"""Log-normal likelihood of steps to a target, where some runs stopped before they reached it.

log K of a run at batch size b is normal around a + log shape(b; θ), a = log K_∞, with one standard deviation σ for all
runs. A run that was stopped after c steps adds the probability that K > c (Tobit): with z = (log c - mean) / σ that is
Φ(-z), and 1 where the mean is infinite.

Many data sets are fitted at once. σ is profiled out: σ² is the mean squared residual without stopped runs; with them,
γ = 1/σ maximises a concave function (Olsen, 1978) and Newton's method finds it. Over (θ, a) go damped Gauss-Newton
steps: with λ(z) = φ(z) / Φ(-z), a stopped run has score λ(z) / σ and weight λ(λ - z) where one that got there has score
z / σ and weight 1. By the envelope theorem these are the gradients of the profile, too.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy import special

from steepest.batch_size.curve_families import Array, Family, Mask

LEAST_SIGMA = 1e-9  # of log K; data without any noise stop here
ROUNDS = 80
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True)
class Maximum:
    """Where the likelihood of each data set is largest.

    Args:
        theta: (many, p), parameters of the shape.
        scale: (many,), a = log K_∞.
        sigma: (many,), standard deviation of log K, not corrected for the number of parameters.
        loglik: (many,), of log K.
    """

    theta: Array
    scale: Array
    sigma: Array
    loglik: Array


def maximise(shape: Family, x: Array, y: Array, stopped: Mask, starts: Array) -> Maximum:
    """Fit one family to many data sets that share their batch sizes.

    Args:
        shape: The family.
        x: (n,), log b.
        y: (many, n), log of the steps to the target, or of the steps done.
        stopped: (many, n), whether the run was stopped before the target.
        starts: (many, p), where the search begins; brought into the box first.

    Returns:
        For each data set the maximum next to its start.
    """
    low, high = shape.box(x, ~stopped)
    theta = np.clip(starts, low, np.maximum(low, high - 1e-3 * shape.pole))
    scale = _first_scale(shape, x, y, stopped, theta)
    beta = np.concatenate([theta, scale[:, None]], axis=1)
    sigma, loglik = _profile(shape, beta, x, y, stopped)
    damping = np.full(len(y), 1e-3)
    active = np.arange(len(y))
    for _ in range(ROUNDS):
        trial = _step(
            shape,
            beta[active],
            sigma[active],
            damping[active],
            x,
            y[active],
            stopped[active],
            low[active],
            high[active],
        )
        new_sigma, new_loglik = _profile(shape, trial, x, y[active], stopped[active])
        gain = new_loglik - loglik[active]
        better = gain > 0
        won = active[better]
        beta[won], sigma[won], loglik[won] = trial[better], new_sigma[better], new_loglik[better]
        damping[active] *= np.where(better, 0.2, 6.0)
        going = np.where(better, gain > 1e-7, damping[active] < 1e7)
        active = active[going]
        if not len(active):
            break
    return Maximum(beta[:, :-1], beta[:, -1], sigma, loglik)


def best_of_starts(shape: Family, x: Array, y: Array, stopped: Mask, *, tries: int = 12) -> Maximum:
    """Fit one data set from the most promising points of the family's grid.

    Args:
        shape: The family.
        x: (n,), log b.
        y: (n,), log steps.
        stopped: (n,).
        tries: How many starts are followed to their maximum.

    Returns:
        The best of them, with a leading axis of length one.
    """
    starts = shape.starts(x, ~stopped)
    ys, stops = np.broadcast_to(y, (len(starts), len(y))), np.broadcast_to(stopped, (len(starts), len(y)))
    beta = np.concatenate([starts, _first_scale(shape, x, ys, stops, starts)[:, None]], axis=1)
    loglik = _profile(shape, beta, x, ys, stops)[1]
    chosen = np.argsort(-loglik)[:tries]
    found = maximise(shape, x, ys[chosen], stops[chosen], starts[chosen])
    top = [int(np.argmax(found.loglik))]
    return Maximum(found.theta[top], found.scale[top], found.sigma[top], found.loglik[top])


def _first_scale(shape: Family, x: Array, y: Array, stopped: Mask, theta: Array) -> Array:
    """log K_∞ for given θ as if runs that were stopped had no say."""
    rest = np.where(stopped, 0.0, y - np.where(stopped, 0.0, shape.log_shape(theta, x)))
    return rest.sum(axis=1) / (~stopped).sum(axis=1)


def _profile(shape: Family, beta: Array, x: Array, y: Array, stopped: Mask) -> tuple[Array, Array]:
    """σ and the log-likelihood at it, -inf where a run got to a target that the parameters put out of reach."""
    residual = y - beta[:, -1:] - shape.log_shape(beta[:, :-1], x)
    reached = (~stopped).sum(axis=1)
    square = np.where(stopped, 0.0, residual**2).sum(axis=1)
    possible = np.isfinite(square)
    square = np.where(possible, square, 1.0)
    gamma = np.minimum(np.sqrt(reached / np.maximum(square, 1e-300)), 1 / LEAST_SIGMA)
    tails = np.zeros(len(y))
    columns = stopped.any(axis=0)
    if columns.any():
        excess = np.where(stopped[:, columns], residual[:, columns], -np.inf)  # -inf: adds log 1
        gamma = _concave_gamma(gamma, reached, square, excess)
        tails = special.log_ndtr(-excess * gamma[:, None]).sum(axis=1)
    loglik = reached * (np.log(gamma) - HALF_LOG_2PI) - 0.5 * square * gamma**2 + tails
    return 1 / gamma, np.where(possible, loglik, -np.inf)


def _concave_gamma(gamma: Array, reached: Array, square: Array, excess: Array) -> Array:
    """Maximise reached log γ - square γ² / 2 + Σ log Φ(-excess γ) over γ > 0."""
    finite = np.where(np.isfinite(excess), excess, 0.0)
    for _ in range(30):
        z = np.where(np.isfinite(excess), finite * gamma[:, None], -np.inf)
        rate = hazard(z)
        slope = reached / gamma - square * gamma - (finite * rate).sum(axis=1)
        curve = reached / gamma**2 + square + (finite**2 * hazard_slope(z, rate)).sum(axis=1)
        new = np.clip(gamma + slope / curve, gamma / 3, np.minimum(gamma * 3, 1 / LEAST_SIGMA))
        if np.all(np.abs(new - gamma) <= 1e-9 * gamma):
            return new
        gamma = new
    return gamma


def hazard(z: Array) -> Array:
    """λ(z) = φ(z) / Φ(-z) = √(2/π) / erfcx(z / √2), 0 at -inf."""
    return np.where(z > -37, math.sqrt(2 / math.pi) / special.erfcx(np.maximum(z, -37) / math.sqrt(2)), 0.0)


def hazard_slope(z: Array, rate: Array) -> Array:
    """λ(λ - z), from 0 to 1; where z is so large that the difference cancels, it is 1."""
    plain = np.minimum(np.maximum(z, -37), 1e4)
    return np.where(z < 1e4, np.clip(rate * (rate - plain), 0.0, 1.0), 1.0)


def _step(
    shape: Family,
    beta: Array,
    sigma: Array,
    damping: Array,
    x: Array,
    y: Array,
    stopped: Mask,
    low: Array,
    high: Array,
) -> Array:
    """One damped Gauss-Newton step in the box; parameters that press against their bound stay."""
    theta = beta[:, :-1]
    value, slopes = shape.log_shape(theta, x), shape.slopes(theta, x)
    jacobian = np.concatenate([slopes, np.ones((*slopes.shape[:-1], 1))], axis=-1)
    finite = np.isfinite(value)
    residual = y - beta[:, -1:] - np.where(finite, value, 0.0)
    score, weight = residual, finite.astype(float)
    if stopped.any():
        z = residual / sigma[:, None]
        rate = hazard(z)
        score = np.where(stopped, rate * sigma[:, None], residual)
        weight = np.where(stopped, hazard_slope(z, rate), 1.0) * finite
    jacobian = np.where(finite[..., None], jacobian, 0.0)
    gradient = (jacobian * (score * finite)[..., None]).sum(axis=1)
    pressed = np.zeros(beta.shape, dtype=bool)
    pressed[:, :-1] = ((theta <= low) & (gradient[:, :-1] < 0)) | ((theta >= high) & (gradient[:, :-1] > 0))
    jacobian = np.where(pressed[:, None, :], 0.0, jacobian)
    gradient = np.where(pressed, 0.0, gradient)
    normal = np.swapaxes(jacobian * weight[..., None], 1, 2) @ jacobian
    diagonal = np.einsum("rii->ri", normal)
    ridge = damping[:, None] * diagonal + 1e-12 * (1 + diagonal.max(axis=1, keepdims=True))
    normal = normal + ridge[:, :, None] * np.eye(beta.shape[1])
    move = np.linalg.solve(normal, gradient[..., None])[..., 0]
    trial = beta + move
    trial[:, :-1] = np.clip(trial[:, :-1], low, high)
    return trial
