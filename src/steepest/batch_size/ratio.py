"""Ratios of two means, and functions of means, with intervals, from measurements that depend on those before.

The ratio of means is what to look at: a mean of ratios is biased, and undefined where a denominator may be negative.
Measurements are cut into blocks long enough to be nearly independent (Carlstein's rule), and

* `ratio_of_means` uses Fieller's set, which knows that a denominator may be zero: the interval then has no upper end;
* `batch_for` does likewise where a curve crosses a share of its last value: it holds what Student's test permits.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import torch
from torch import Tensor

Status = Literal[
    "bounded", "unbounded", "rising", "unknown", "no signal", "at most", "at least", "not aligned", "one size"
]
FEWEST_BLOCKS = 3  # with two, Student's quantile alone is 6.3 at 90%
PREFERRED_BLOCKS = 8
REMEDIES: dict[Status, str] = {
    "bounded": "",
    "unbounded": "signal not told from noise: only a lower end; average more or larger batches",
    "rising": "noise still rising with micro-batches, or fewer than four: only a lower end; split further",
    "unknown": f"fewer than {FEWEST_BLOCKS} measurements: no interval yet",
    "no signal": "no gradient was seen",
    "at most": "reached at the smallest batch looked at: split further to see below",
    "at least": "still rising at the largest batch looked at: only a lower end",
    "not aligned": "not told from zero: average more or larger batches",
    "one size": "takes at least three micro-batches per step",
}


@dataclass(frozen=True)
class Ratio:
    """A ratio of means.

    Args:
        value: Ratio of the means; infinite where the denominator's mean is not positive.
        low: Lower end of the interval, at least 0.
        high: Upper end; infinite where the denominator may be zero.
        status: "bounded"; "unbounded": the denominator may be zero; "unknown": too few measurements for an interval,
            which is then everything; "no signal": all measurements are zero, and the value is not a number; "rising":
            the numerator is too small, see `Duals.half`. The others are of `batch_for`.
    """

    value: float
    low: float
    high: float
    status: Status

    @property
    def remedy(self) -> str:
        """What the status means, in words; empty if all is well."""
        return REMEDIES[self.status]

    def squared(self) -> "Ratio":
        """The same for the square."""
        return Ratio(self.value**2, self.low**2, self.high**2, self.status)


def ratio_of_means(numerator: Tensor, denominator: Tensor, *, level: float = 0.9, block: int | None = None) -> Ratio:
    """mean(numerator) / mean(denominator), known not to be negative, with Fieller's interval.

    The interval holds all ρ for which mean(numerator - ρ denominator) is within Student's quantile of zero, with the
    standard error of means of blocks.

    Args:
        numerator: (n,), in the order in which it was measured.
        denominator: (n,), measured with it.
        level: Probability that the interval holds the ratio, in (0, 1).
        block: Measurements per block; None: as long as the autocorrelation of numerator - ρ denominator asks for.

    Returns:
        The ratio.

    Raises:
        ValueError: If shapes differ, there is nothing, or an option is out of range.

    Source:
        Fieller, 1954, J. R. Stat. Soc. B 16.
    """
    _check(numerator, denominator, level, block)
    both = torch.stack([numerator, denominator], dim=1).double()
    if not bool(both.any()):
        return Ratio(math.nan, 0.0, math.inf, "no signal")
    top, bottom = both.mean(0).tolist()
    value = top / bottom if bottom > 0 else math.inf
    if block is None:
        residual = both[:, 0] - both[:, 1] * (value if math.isfinite(value) else 0.0)
        block = max(block_length(residual), block_length(both[:, 1]))
    blocks = _blocks(both, block)
    if len(blocks) < FEWEST_BLOCKS:
        return Ratio(value, 0.0, math.inf, "unknown")
    quantile = student_quantile((1 + level) / 2, len(blocks) - 1) ** 2 / len(blocks)
    covariance = torch.cov(blocks.mean(1).T)
    low, high = _fieller((top, bottom), (covariance * quantile).tolist())
    return Ratio(value, low, high, "bounded" if math.isfinite(high) else "unbounded")


def _fieller(means: tuple[float, float], spread: list[list[float]]) -> tuple[float, float]:
    """Positive ρ with (a - ρ d)² <= s_aa - 2 ρ s_ad + ρ² s_dd; the spread has the quantile in it."""
    (a, d), ((s_aa, s_ad), (_, s_dd)) = means, spread
    square, cross, constant = d * d - s_dd, a * d - s_ad, a * a - s_aa
    inside = cross * cross - square * constant
    if square > 0 and d > 0:
        root = math.sqrt(max(inside, 0.0))  # the ratio of the means is always a member, so only rounding is negative
        return max(0.0, (cross - root) / square), max(0.0, (cross + root) / square)
    if square > 0:  # surely a negative denominator: no positive ratio fits the model of a signal
        return 0.0, math.inf
    if inside <= 0 or constant <= 0 or square == 0:
        return 0.0, math.inf
    root = math.sqrt(inside)  # all outside of the two roots, of which one is negative as constant > 0 > square
    return max((cross - root) / square, (cross + root) / square), math.inf


def block_length(series: Tensor) -> int:
    """Length of blocks whose means are nearly independent: (2 |φ| / (1 - φ²))^(2/3) n^(1/3).

    φ is the correlation of neighbours, with its bias in short series taken off; the rule is the best one for
    autoregressions of order one. There are at least 8 blocks, unless there are fewer measurements.

    Args:
        series: (n,).

    Returns:
        At least 1.

    Source:
        Carlstein, 1986, Ann. Stat. 14.
    """
    count = len(series)
    centred = series.double() - series.double().mean()
    power = float(centred.square().sum())
    if count < PREFERRED_BLOCKS or power == 0:
        return 1
    seen = float((centred[1:] * centred[:-1]).sum()) / power
    correlation = min(max((count * seen + 1) / (count - 4), -0.97), 0.97)
    best = (2 * abs(correlation) / (1 - correlation**2)) ** (2 / 3) * count ** (1 / 3)
    return max(1, min(math.ceil(best), count // PREFERRED_BLOCKS))


def batch_for(curves: Tensor, batches: Sequence[float], *, kappa: float = 0.9, level: float = 0.9) -> Ratio:
    """b_κ with A(b_κ) = κ A(b_max), by interpolation of mean curves over log b.

    The interval reaches from the first to the last b at which the mean of A(b) - κ A(b_max) is within Student's
    quantile of zero, with the standard error of means of blocks, each interpolated between two batch sizes.

    Args:
        curves: (n, k): A at k batch sizes, measured n times, in order.
        batches: The k batch sizes, rising; the last is b_max.
        kappa: κ in (0, 1).
        level: Of the interval, in (0, 1).

    Returns:
        b_κ in units of `batches`. "at most": A(b_1) is at least κ A(b_max) already; "at least": it lies beyond the
        last batch but one, where b_max is what decides, so that there is no upper end; "not aligned": A(b_max) itself
        may be zero; "one size": there is no curve.

    Raises:
        ValueError: If shapes do not fit, or κ or the level is out of range.
    """
    if curves.ndim != 2 or not len(curves) or curves.size(1) != len(batches):
        raise ValueError(f"batch_for takes curves (n, {len(batches)}) with n >= 1, got shape {tuple(curves.shape)}.")
    if not 0 < kappa < 1 or not 0 < level < 1:
        raise ValueError(f"batch_for takes kappa and level in (0, 1), got {kappa=} and {level=}.")
    if not bool(curves.any()):
        return Ratio(math.nan, 0.0, math.inf, "no signal")
    if len(batches) == 1:
        return Ratio(math.nan, 0.0, math.inf, "one size")
    curves = curves.double().cpu()
    value = _crossing(curves.mean(0), batches, kappa)
    excess = curves - kappa * curves[:, -1:]
    blocks = _blocks(
        torch.cat([excess, curves[:, -1:]], dim=1), max(block_length(own) for own in (*curves.T, *excess.T))
    )
    if len(blocks) < FEWEST_BLOCKS:
        return Ratio(value, 0.0, math.inf, "unknown")
    quantile = student_quantile((1 + level) / 2, len(blocks) - 1) ** 2 / len(blocks)
    means, spread = blocks.mean(1).mean(0), torch.cov(blocks.mean(1).T) * quantile
    if not value > 0 or means[-1] <= spread[-1, -1].sqrt():
        return Ratio(value, 0.0, math.inf, "not aligned")
    found = [value, *_permitted(means[:-1].tolist(), spread[:-1, :-1].tolist(), batches)]
    low, high = min(found), max(found)
    if value == batches[0]:
        return Ratio(value, 0.0, high, "at most")
    low = 0.0 if low == batches[0] else low
    if value > batches[-2]:
        return Ratio(value, low, math.inf, "at least")
    return Ratio(value, low, high, "bounded")


def _permitted(means: Sequence[float], spread: Sequence[Sequence[float]], batches: Sequence[float]) -> list[float]:
    """Ends of stretches of b where the interpolated mean is not told from zero; the spread has the quantile in it."""
    found: list[float] = []
    for place in range(len(batches) - 1):
        (first, second), s = means[place : place + 2], [row[place : place + 2] for row in spread[place : place + 2]]
        slope = second - first
        # (first + t slope)² minus its spread, a polynomial of the share t of the way
        constant = first**2 - s[0][0]
        linear = 2 * (first * slope - (s[0][1] - s[0][0]))
        square = slope**2 - (s[0][0] - 2 * s[0][1] + s[1][1])
        shares = [end for end, inside in ((0.0, constant), (1.0, constant + linear + square)) if inside <= 0]
        shares += [root for root in _roots(constant, linear, square) if 0 < root < 1]
        step = math.log(batches[place + 1] / batches[place])
        found += [batches[place + int(t)] if t in (0, 1) else batches[place] * math.exp(t * step) for t in shares]
    return found


def _roots(constant: float, linear: float, square: float) -> list[float]:
    """Real ones of a polynomial, by the formulas that do not cancel."""
    inside = linear**2 - 4 * square * constant
    if inside < 0:
        return []
    half = -(linear + math.copysign(math.sqrt(inside), linear)) / 2
    return [top / bottom for top, bottom in ((half, square), (constant, half)) if bottom != 0]


def _crossing(curve: Tensor, batches: Sequence[float], kappa: float) -> float:
    """Where a curve passes κ times its last value for the last time; not a number if that is not positive."""
    excess = (curve - kappa * curve[-1]).tolist()
    if not curve[-1] > 0:
        return math.nan
    below = [place for place, value in enumerate(excess) if value < 0]
    if not below:
        return float(batches[0])
    left, right = excess[below[-1] : below[-1] + 2]
    return batches[below[-1]] * (batches[below[-1] + 1] / batches[below[-1]]) ** (-left / (right - left))


def student_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t distribution with whole degrees of freedom.

    Args:
        probability: In (0.5, 1).
        freedom: At least 1.

    Returns:
        t with P(T <= t) = probability.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> [round(student_quantile(0.95, freedom), 3) for freedom in (1, 7, 99)]
        [6.314, 1.895, 1.66]
    """
    if not 0.5 < probability < 1 or freedom < 1:
        raise ValueError(
            f"student_quantile takes 0.5 < probability < 1 and freedom >= 1, got {probability}, {freedom}."
        )
    if freedom > 1000:
        return NormalDist().inv_cdf(probability)
    low, high = 0.0, math.pi / 2
    for _ in range(60):  # in the angle θ = atan(t / √ν), where the distribution is a finite sum
        middle = (low + high) / 2
        if (1 + _inside(middle, freedom)) / 2 < probability:
            low = middle
        else:
            high = middle
    return math.sqrt(freedom) * math.tan((low + high) / 2)


def _inside(angle: float, freedom: int) -> float:
    """P(|T| <= √ν tan θ): Abramowitz and Stegun 26.7.3 and 26.7.4."""
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for power in range(1 + odd, freedom, 2):
        total += term
        term *= math.cos(angle) ** 2 * power / (power + 1)
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total


def _blocks(values: Tensor, length: int) -> Tensor:
    """(blocks, length, k); what does not fill a block is left out at the beginning."""
    whole = len(values) // length
    return values[len(values) - whole * length :].view(whole, length, values.size(1))


def _check(numerator: Tensor, denominator: Tensor, level: float, block: int | None) -> None:
    if numerator.ndim != 1 or numerator.shape != denominator.shape or not len(numerator):
        raise ValueError(
            f"ratio_of_means takes two series (n,) of the same length n >= 1, got shapes {tuple(numerator.shape)} and "
            f"{tuple(denominator.shape)}."
        )
    if not 0 < level < 1 or (block is not None and block < 1):
        raise ValueError(
            f"ratio_of_means takes a level in (0, 1) and a block of at least 1, got {level=} and {block=}."
        )
