"""Steps K(b) that a bound asks for at batch size b, in two forms, and the b that makes b K(b) smallest.

A bound of the form X/T + Y/b^p + Z <= ε, solved for T with c = ε - Z > 0, is

    K(b) = K_∞ (1 - (b_min / b)^p)^-q,    K_∞ = X / c,    b_min = (Y / c)^(1/p),    q = 1.

b K(b) falls until b* = b_min (1 + p q)^(1/p) and rises after it: with s = (b_min / b)^p, its logarithm is
-ln(s) / p - q ln(1 - s) + constant, whose derivative -1 / (p s) + q / (1 - s) has the one zero s = 1 / (1 + p q), and
rises with s. b K(b) has one minimum but is not convex: for p = 1/2, q = 1 it is concave beyond 9 b_min.

A bound that decays geometrically, X exp(-r T) + Y/√b + Z <= ε, gives a logarithm instead; see `LogCurve`.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class PowerCurve:
    """K(b) = K_∞ (1 - (b_min / b)^p)^-q.

    (p, q) = (1/2, 1): the 1/√b bound, b* = 9/4 b_min, K(b*) = 3 K_∞. (1, 1): the 1/b bound, 2 b_min, 2 K_∞. (1/2, 2):
    steps of the best length without momentum, whose gain is in proportion to (1 - √(b_min / b))²: 4 b_min, 4 K_∞.

    Args:
        limit: K_∞, steps with infinitely large batches.
        least: b_min, in samples; at and below it no number of steps is enough. 0 without noise.
        p: Exponent of b_min / b, above 0.
        q: Exponent of the bracket, above 0.
    """

    limit: float
    least: float
    p: float = 0.5
    q: float = 1.0

    @property
    def best(self) -> float:
        """b*, in samples: where b K(b) is smallest."""
        return self.least * (1 + self.p * self.q) ** (1 / self.p)

    @property
    def steps_at_best(self) -> float:
        """K(b*) = K_∞ ((1 + p q) / (p q))^q; K_∞ without noise."""
        return self.limit * (1 + 1 / (self.p * self.q)) ** self.q if self.least else self.limit

    def steps(self, batch: float) -> float:
        """K(b).

        Args:
            batch: b, in samples, above 0.

        Returns:
            Steps, not rounded; infinite at and below b_min.
        """
        if batch <= self.least:
            return math.inf
        return self.limit * (1 - (self.least / batch) ** self.p) ** -self.q


@dataclass(frozen=True)
class LogCurve:
    """K(b) = ln(X / (c - Y/√b)) / r = (ln(X / c) - ln(1 - √(b_min / b))) / r.

    With s = √(b_min / b) and v = 1 / (1 - s), b K(b) is smallest where 2 ln(X / c) + 2 ln v = v - 1; there is one such
    v above 2. In terms of Lambert's W: v = -2 W_-1(-c exp(-1/2) / (2 X)).

    Args:
        rate: r, the share of the start that a step removes.
        ratio: X / c, above 1: else the start is good enough and no step is needed.
        least: b_min = (Y / c)², in samples.
    """

    rate: float
    ratio: float
    least: float

    @property
    def best(self) -> float:
        """b*, in samples: where b K(b) is smallest."""
        constant = 1 + 2 * math.log(self.ratio)
        v = 4.0
        for _ in range(60):  # Newton on v - 2 ln v = constant, convex: from the second iterate on it falls to the root
            v -= (v - 2 * math.log(v) - constant) / (1 - 2 / v)
        return self.least * (v / (v - 1)) ** 2

    @property
    def steps_at_best(self) -> float:
        """K(b*)."""
        return self.steps(self.best) if self.least else math.log(self.ratio) / self.rate

    def steps(self, batch: float) -> float:
        """K(b).

        Args:
            batch: b, in samples, above 0.

        Returns:
            Steps, not rounded; infinite at and below b_min.
        """
        if batch <= self.least:
            return math.inf
        return (math.log(self.ratio) - math.log1p(-math.sqrt(self.least / batch))) / self.rate
