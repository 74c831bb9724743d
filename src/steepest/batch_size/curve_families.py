"""Shapes of K(b), the number of steps to a target at batch size b; all are K_∞ times a function of b and a few numbers.

| key | K(b) / K_∞ | b* = argmin b K(b) | source |
|---|---|---|---|
| H | 1 + B_crit / b | none: b K(b) only grows | McCandlish et al., arXiv:1812.06162 |
| S | 1 / (1 - √(b_min / b)) | 2.25 b_min | X/T + Y/√b + Z = ε solved for T, as in arXiv:2507.01598v5 |
| I | 1 / (1 - b_min / b) | 2 b_min | X/T + Y/b + Z = ε solved for T |
| P | 1 + (b_1 / b)^α | b_1 (α - 1)^(1/α), if α > 1 | a + c b^-α, as in Zhang et al., arXiv:2410.21676 |
| U | (1 - (b_min / b)^p)^-q | b_min (1 + p q)^(1/p) | contains S and I |
| W | L - ln(1 - √(b_min / b)) | b_min (1 + 1/u)², L + ln(1 + u) = u / 2 | e^(-ηλT) X + Y/√b + Z = ε solved for T |

S, I, U and W have a pole: at b <= b_min the noise floor is above the target, and no number of steps is enough. For W,
K_∞ stands for 1 / (ηλ), and K(b) tends to L of it.

Everything is done in x = log b and on log K, and takes batches of parameters. Parameters θ are logarithms, so that they
may take any value; the first one of a family with a pole is log b_min.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special

from steepest.names import unknown_name

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
FAR = 9.0  # how far beyond the measured range, in log b, a scale is searched for


@dataclass(frozen=True)
class Family:
    """One shape.

    Args:
        key: One letter.
        name: In words.
        formula: Of K(b).
        parameters: Names of exp(θ).
        needs: Least number of batch sizes at which the target was reached.
        log_shape: (θ: (*batch, p), x: (n,) or (*batch, n)) to log(K(b) / K_∞): (*batch, n), inf at and below a pole.
        slopes: The same to its derivatives by θ: (*batch, n, p).
        log_best: θ to log b*: (*batch,), -inf where b K(b) only grows.
        ranges: Of each parameter; the first in log b around the measured range.
        pole: Whether K is infinite at and below b_min = exp(θ[0]).
    """

    key: str
    name: str
    formula: str
    parameters: tuple[str, ...]
    needs: int
    log_shape: Callable[[Array, Array], Array]
    slopes: Callable[[Array, Array], Array]
    log_best: Callable[[Array], Array]
    ranges: tuple[tuple[float, float], ...] = ()
    pole: bool = False

    @property
    def size(self) -> int:
        """Number of parameters θ, without the scale K_∞."""
        return len(self.parameters)

    def box(self, x: Array, reached: Mask) -> tuple[Array, Array]:
        """Where θ is searched.

        Args:
            x: (n,), log b.
            reached: (*batch, n), which runs reached the target: b_min is below all of theirs.

        Returns:
            Lower and upper ends, (*batch, p).
        """
        shape = (*reached.shape[:-1], self.size)
        low, high = np.empty(shape), np.empty(shape)
        low[..., 0], high[..., 0] = x.min() - FAR, x.max() + FAR
        if self.pole:
            high[..., 0] = np.where(reached, x, np.inf).min(axis=-1) - 1e-9
        for index, (least, most) in enumerate(self.ranges, start=1):
            low[..., index], high[..., index] = least, most
        return low, high

    def starts(self, x: Array, reached: Mask) -> Array:
        """A grid over the box, finer towards a pole: (many, p)."""
        low, high = self.box(x, reached)
        if self.pole:
            first = high[0] - np.geomspace(1e-3, FAR, 36)
        else:
            first = np.linspace(low[0] + FAR - 4, high[0] - FAR + 4, 24)
        rest = [np.linspace(least, most, 9)[1:-1] for least, most in self.ranges]
        return np.stack([axis.ravel() for axis in np.meshgrid(first, *rest, indexing="ij")], axis=-1)

    def log_reference(self, theta: Array, smallest: float) -> Array:
        """Of b K(b) / K_∞, what data overhead is counted from: (*batch,).

        The least value, also if it is only the limit b -> 0 (H). Where b K(b) tends to zero (P with α <= 1), the value
        at `smallest`, which is a log batch size.
        """
        if self.key == "H":
            return theta[..., 0]
        best = self.log_best(theta)
        at = np.where(np.isfinite(best), best, smallest)
        return at + self.log_shape(theta, at[..., None])[..., 0]

    def log_overhead(self, theta: Array, overhead: float, smallest: float) -> Array:
        """Of the batch size beyond the reference at which b K(b) is 1 + `overhead` times it: (*batch,)."""
        goal = self.log_reference(theta, smallest) + np.log1p(overhead)
        if self.key == "H":
            return theta[..., 0] + np.log(overhead)
        best = self.log_best(theta)
        low = np.where(np.isfinite(best), best, smallest)
        # K(b) falls, but never below its limit: b K(b) > b lim K gives an upper end.
        limit = theta[..., 1] * 0 + np.exp(theta[..., 1]) if self.key == "W" else np.ones_like(low)
        high = np.maximum(goal - np.log(limit), low)
        for _ in range(50):
            middle = (low + high) / 2
            under = middle + self.log_shape(theta, middle[..., None])[..., 0] < goal
            low, high = np.where(under, middle, low), np.where(under, high, middle)
        return (low + high) / 2


def family(name: str) -> Family:
    """The family with this key.

    Raises:
        ValueError: If there is none.

    Examples:
        >>> family("S").formula
        'K_inf / (1 - sqrt(b_min / b))'
    """
    if name not in FAMILIES:
        raise ValueError(unknown_name("family", name, FAMILIES))
    return FAMILIES[name]


def _power_shape(theta: Array, x: Array, alpha: Array) -> Array:
    return np.logaddexp(0.0, alpha * (theta[..., :1] - x))


def _hyperbola_slopes(theta: Array, x: Array) -> Array:
    return special.expit(theta[..., :1] - x)[..., None]


def _free_power_shape(theta: Array, x: Array) -> Array:
    return _power_shape(theta, x, np.exp(theta[..., 1:2]))


def _free_power_slopes(theta: Array, x: Array) -> Array:
    alpha, distance = np.exp(theta[..., 1:2]), theta[..., :1] - x
    by_place = alpha * special.expit(alpha * distance)
    return np.stack([by_place, by_place * distance], axis=-1)


def _free_power_best(theta: Array) -> Array:
    alpha = np.exp(theta[..., 1])
    beyond = np.maximum(alpha - 1, np.finfo(float).tiny)
    return np.where(alpha > 1, theta[..., 0] + np.log(beyond) / alpha, -np.inf)


def _gap(theta: Array, x: Array, p: Array | float) -> tuple[Array, Array]:
    """-log(1 - (b_min / b)^p), inf at and below the pole, and minus its derivative by p x, 0 there."""
    exponent = p * (theta[..., :1] - x)
    inside = exponent < 0
    safe = np.where(inside, exponent, -1.0)
    return np.where(inside, -np.log(-np.expm1(safe)), np.inf), np.where(inside, 1 / np.expm1(-safe), 0.0)


def _pole_shape(p: float, q: float) -> Callable[[Array, Array], Array]:
    return lambda theta, x: q * _gap(theta, x, p)[0]


def _pole_slopes(p: float, q: float) -> Callable[[Array, Array], Array]:
    return lambda theta, x: (q * p * _gap(theta, x, p)[1])[..., None]


def _unified_shape(theta: Array, x: Array) -> Array:
    return np.exp(theta[..., 2:3]) * _gap(theta, x, np.exp(theta[..., 1:2]))[0]


def _unified_slopes(theta: Array, x: Array) -> Array:
    p, q = np.exp(theta[..., 1:2]), np.exp(theta[..., 2:3])
    gap, rise = _gap(theta, x, p)
    return np.stack([q * p * rise, q * p * (theta[..., :1] - x) * rise, q * gap], axis=-1)


def _unified_best(theta: Array) -> Array:
    p, q = np.exp(theta[..., 1]), np.exp(theta[..., 2])
    return theta[..., 0] + np.log1p(p * q) / p


def _decay_shape(theta: Array, x: Array) -> Array:
    return np.log(np.exp(theta[..., 1:2]) + _gap(theta, x, 0.5)[0])


def _decay_slopes(theta: Array, x: Array) -> Array:
    offset = np.exp(theta[..., 1:2])
    gap, rise = _gap(theta, x, 0.5)
    return np.stack([0.5 * rise / (offset + gap), offset / (offset + gap)], axis=-1)


def _decay_best(theta: Array) -> Array:
    argument = -np.exp(-0.5 - np.exp(theta[..., 1])) / 2
    u = -2 * special.lambertw(argument, k=-1).real - 1
    return theta[..., 0] + 2 * np.log1p(1 / u)


_P = (np.log(0.1), np.log(4.0))  # exponents of U
_Q = (np.log(0.1), np.log(10.0))
_ALPHA = (np.log(0.1), np.log(5.0))
_OFFSET = (-4.0, 5.0)  # log L of W; beyond, it is a constant or a pure logarithm

FAMILIES: dict[str, Family] = {
    one.key: one
    for one in (
        Family(
            "H",
            "hyperbola",
            "K_inf (1 + B_crit / b)",
            ("B_crit",),
            3,
            lambda theta, x: _power_shape(theta, x, np.ones(1)),
            _hyperbola_slopes,
            lambda theta: np.full(theta.shape[:-1], -np.inf),
        ),
        Family(
            "S",
            "square-root pole",
            "K_inf / (1 - sqrt(b_min / b))",
            ("b_min",),
            3,
            _pole_shape(0.5, 1.0),
            _pole_slopes(0.5, 1.0),
            lambda theta: theta[..., 0] + np.log(2.25),
            pole=True,
        ),
        Family(
            "I",
            "simple pole",
            "K_inf / (1 - b_min / b)",
            ("b_min",),
            3,
            _pole_shape(1.0, 1.0),
            _pole_slopes(1.0, 1.0),
            lambda theta: theta[..., 0] + np.log(2.0),
            pole=True,
        ),
        Family(
            "P",
            "power law",
            "K_inf (1 + (b_1 / b)^alpha)",
            ("b_1", "alpha"),
            4,
            _free_power_shape,
            _free_power_slopes,
            _free_power_best,
            ranges=(_ALPHA,),
        ),
        Family(
            "U",
            "unified pole",
            "K_inf (1 - (b_min / b)^p)^-q",
            ("b_min", "p", "q"),
            6,
            _unified_shape,
            _unified_slopes,
            _unified_best,
            ranges=(_P, _Q),
            pole=True,
        ),
        Family(
            "W",
            "logarithm of a pole",
            "K_inf (L - ln(1 - sqrt(b_min / b)))",
            ("b_min", "L"),
            5,
            _decay_shape,
            _decay_slopes,
            _decay_best,
            ranges=(_OFFSET,),
            pole=True,
        ),
    )
}
"""Forms that K(b) may have, by their letter."""
