"""Moving averages whose weights sum to one, for lists of tensors.

A buffer holds the plain average m_t = β m_{t-1} + (1-β) g_t from m_0 = 0; its weights sum to 1 - β^t, and dividing by
that sum is done where the average is read, so that a buffer can be exchanged with other implementations.

Without gradients an average shrinks by β a step and never reaches zero: rounding keeps it at the smallest numbers there
are, and a direction does not depend on scale. So, from time to time, what is nothing but rounding is set to zero.

Several averages of the same gradients, each with its β, are followed as one: the sum of w_i m_i / (1 - β_i^t), whose
weights w_i sum to one and may change with t.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from steepest.checks import Check, check_fields, number, refusal, shown, whole

SMALLEST = torch.finfo(torch.float32).tiny  # of the normal numbers
# A few passes over the averages in one step of so many cost nothing; a prime number meets every rhythm of gradients.
FORGET_EVERY = 61


def average_(buffers: Sequence[Tensor], values: Sequence[Tensor], beta: float, *, accept: Tensor | None = None) -> None:
    """Move each buffer toward its value: buffer <- β buffer + (1-β) value.

    Args:
        buffers: Averages, written to.
        values: One per buffer, same shape, dtype and device.
        beta: Weight of the old average, in [0, 1).
        accept: A 0-d boolean on the device; where it is False, every buffer keeps its bits. None means True.
    """
    if accept is not None:  # averaging a buffer with itself changes nothing: b + (1-β)(b - b) = b
        values = [torch.where(accept, value, buffer) for value, buffer in zip(values, buffers, strict=True)]
    torch._foreach_lerp_(list(buffers), list(values), 1 - beta)


def forget_(buffers: Sequence[Tensor], values: Sequence[Tensor], beta: float, *, accept: Tensor | None = None) -> None:
    """Set to zero what an average holds of gradients that ended so long ago that only rounding is left.

    That is an entry whose new value is exactly 0 and whose next decrease, (1-β) of it, is below the smallest normal
    number of float32, 1.2e-38: in wider types too, so that all end at the same time, 84 / (1-β) steps after a gradient
    of size one. An entry with a value counts, however small.

    Args:
        buffers: Averages that already hold the values, written to.
        values: One per buffer, what was averaged last.
        beta: Weight of the old average, in [0, 1).
        accept: A 0-d boolean on the device; where it is False, every buffer keeps its bits. None means True.
    """
    bound = SMALLEST / (1 - beta)
    for buffer, value in zip(buffers, values, strict=True):
        over = (buffer.abs() <= bound).logical_and_(value == 0)
        buffer.masked_fill_(over if accept is None else over.logical_and_(accept), 0.0)


def debias(beta: float, steps: Tensor) -> Tensor:
    """Sum of the weights of an average after `steps` steps, 1 - β^steps, without cancellation for β near 1.

    Args:
        beta: In [0, 1).
        steps: Any shape, number of values averaged so far.

    Returns:
        The shape and dtype of `steps`; 0 at 0 steps, for the caller to keep from dividing by.

    Examples:
        >>> debias(0.9, torch.tensor([1.0, 2.0], dtype=torch.float64))
        tensor([0.1000, 0.1900], dtype=torch.float64)
    """
    return -torch.expm1(steps * math.log(beta)) if beta > 0 else (steps > 0).to(steps.dtype)


def look_ahead(buffers: Sequence[Tensor], gradients: Sequence[Tensor], beta: float) -> list[Tensor]:
    """Nesterov's combination (1-β) g + β m: the average as it will be if the next gradient equals this one.

    Its weights sum to 1 - β^(t+1), one step further than the buffer's; the direction is that of the heavy-ball form.

    Args:
        buffers: Averages m that already hold the gradients g.
        gradients: One per buffer.
        beta: In [0, 1).

    Returns:
        New tensors.
    """
    return list(torch._foreach_lerp(list(gradients), list(buffers), beta))


MOST = 16  # averages: each has keys of its own in checkpoints, and takes as much memory as the weights
NEAR = 1e-6  # to one, of what weights that are typed in sum to
EXACT = 1e-12  # likewise, of weights that are taken as they are, so that a text of them builds the same


def _each(check: Check, expected: str, name: str, value: object) -> tuple[Any, ...]:
    """The members of a tuple or list, by a check of each."""
    if not isinstance(value, tuple | list):
        raise TypeError(refusal(name, expected, value))
    try:
        return tuple(check(name, one) for one in cast(Sequence[object], value))
    except (ValueError, TypeError) as error:
        raise type(error)(refusal(name, expected, value)) from error


def _betas(name: str, value: object) -> tuple[float, ...]:
    expected = f"1 to {MOST} numbers in [0, 1), one for each average"
    betas = _each(number(high=1.0), expected, name, value)
    if not 1 <= len(betas) <= MOST:
        raise ValueError(refusal(name, expected, value))
    return betas


def _weights(name: str, value: object) -> tuple[float, ...]:
    given = _each(number(), "numbers of at least 0 that sum to 1, one for each average", name, value)
    total = math.fsum(given)
    if not abs(total - 1) <= NEAR:
        raise ValueError(refusal(name, "weights that sum to 1", value, f"They sum to {total:.8g}."))
    return given if abs(total - 1) <= EXACT else tuple(one / total for one in given)


def _optional_weights(name: str, value: object) -> tuple[float, ...] | None:
    return None if value is None else _weights(name, value)


def _steps(name: str, value: object) -> tuple[int, int]:
    expected = "two whole numbers of at least 0, the first not above the second"
    steps = _each(whole(0), expected, name, value)
    if len(steps) != 2 or steps[0] > steps[1]:
        raise ValueError(refusal(name, expected, value))
    return steps[0], steps[1]


@dataclass(frozen=True)
class Averages:
    """Several moving averages of the gradients, followed as one: Σ w_i m_i / (1 - β_i^t), with weights that may change.

    m_i is the plain average with β_i, t the number of gradients that were averaged so far, so that each term is a mean
    and the weights w_i say how much each counts. Nesterov's form looks one gradient ahead in each:
    Σ w_i (β_i m_i + (1-β_i) g) / (1 - β_i^(t+1)). Each average takes as much memory as the first.

    With `later`, the weights go linearly from `weights` at t = between[0] to `later` at t = between[1]; if both are the
    same, they switch there. A parameter's first gradient has t = 1. All averages go on from the first gradient,
    whatever they weigh.

    Args:
        betas: Weight of the old average, in [0, 1), of each; at most 16. The first is the group's "momentum", which
            schedulers may write.
        weights: Of the averages, at least 0; what sums to one within 1e-6 is divided by its sum.
        later: Likewise, of later steps; None: the weights stay.
        between: Numbers of gradients, from which on and by which the weights go over; needed with `later`.

    Raises:
        ValueError: If a number is out of range, weights do not sum to one, or there are not as many as betas.
        TypeError: If an option is of the wrong type.

    Examples:
        >>> Averages.two(start=1000)
        Averages(betas=(0.85, 0.98), weights=(1.0, 0.0), later=(0.4385, 0.5615), between=(1000, 1000))
        >>> round(Averages.maxwell(count=3, shortest=4.0, longest=64.0, age=30.0).mean_age(), 6)
        30.0
    """

    betas: tuple[float, ...] = (0.85, 0.98)
    weights: tuple[float, ...] = (0.4385, 0.5615)
    later: tuple[float, ...] | None = None
    between: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        check_fields(
            self,
            {
                "betas": _betas,
                "weights": _weights,
                "later": _optional_weights,
                "between": _steps,
            },
        )
        for field, own in (("weights", self.weights), ("later", self.later)):
            if own is not None and len(own) != len(self.betas):
                raise ValueError(
                    f"Averages: {field} must be {len(self.betas)} numbers, one for each of betas={shown(self.betas)}, "
                    f"got {shown(own)}."
                )
        if self.later is None and self.between != (0, 0):
            raise ValueError(
                f"Averages: between={self.between} says when weights change, but later is None; give the later "
                "weights, or leave it out."
            )
        if self.later is not None and self.between == (0, 0):
            raise ValueError(
                f"Averages: later={shown(self.later)} would count from the first gradient on, as between=(0, 0) says. "
                "Give between, such as (1000, 2000), or these weights as weights."
            )

    @classmethod
    def two(cls, fast: float = 0.85, slow: float = 0.98, share: float = 0.5615, start: int = 0) -> "Averages":
        """Two time scales; the defaults are those of records of modded-nanogpt's third track, which start at step 1000.

        Args:
            fast: β of the first.
            slow: β of the second.
            share: Weight of the slow one, in [0, 1].
            start: Before so many gradients only the fast one is followed.

        Raises:
            ValueError: If a number is out of range.
            TypeError: If one is no number.
        """
        share = number(0.0, 1.0, up_to=True)("Averages.two: share", share)
        start = whole(0)("Averages.two: start", start)
        weights = (1.0 - share, share)
        if start <= 1:  # the first gradient is number 1
            return cls((fast, slow), weights)
        return cls((fast, slow), (1.0, 0.0), weights, (start, start))

    @classmethod
    def maxwell(
        cls,
        count: int = 6,
        shortest: float = 3.0,
        longest: float = 64.0,
        *,
        age: float,
        later_age: float | None = None,
        between: tuple[int, int] = (0, 0),
    ) -> "Averages":
        """A family of time scales with a chosen mean age, such as the generalised Maxwell model has relaxation times.

        The time constants τ_i are spaced evenly in their logarithm, and β_i = 1 - 1/τ_i, so that the mean age of the
        gradients in average i, the newest of age 0, is β_i / (1 - β_i) = τ_i - 1. The weights are in proportion to
        exp(-λ τ_i), with the one λ by which the mean age of all, Σ w_i (τ_i - 1), is what was asked for. This is our
        definition of a family that others call K-Maxwell.

        Args:
            count: How many, at least 2.
            shortest: Least τ, in steps, at least 1.
            longest: Largest τ.
            age: Mean age of the gradients, in steps, between shortest - 1 and longest - 1.
            later_age: Likewise, of later steps; None: it stays.
            between: As in `Averages`.

        Raises:
            ValueError: If a number is out of range, such as an age that no weights have.
            TypeError: If an option is of the wrong type.
        """
        who = "Averages.maxwell"
        count = whole(2)(f"{who}: count", count)
        if count > MOST:
            raise ValueError(refusal(f"{who}: count", f"at most {MOST}", count))
        shortest = number(1.0)(f"{who}: shortest", shortest)
        longest = number(shortest, above=True)(f"{who}: longest", longest)
        times = [shortest * (longest / shortest) ** (place / (count - 1)) for place in range(count)]
        weights = _of_age(f"{who}: age", times, age)
        later = None if later_age is None else _of_age(f"{who}: later_age", times, later_age)
        return cls(tuple(1 - 1 / time for time in times), weights, later, between)

    def __len__(self) -> int:
        """How many averages."""
        return len(self.betas)

    def betas_from(self, first: float) -> tuple[float, ...]:
        """All betas, the first of which stands elsewhere.

        Args:
            first: A group's "momentum".
        """
        return first, *self.betas[1:]

    def weights_at(self, counts: Tensor) -> list[Tensor]:
        """Weights of the averages after so many gradients.

        Args:
            counts: Any shape, real floating point.

        Returns:
            One tensor like `counts` for each average.
        """
        if self.later is None:
            return [torch.full_like(counts, weight) for weight in self.weights]
        first, last = self.between
        part = ((counts - first) / (last - first)).clamp(0, 1) if first < last else (counts >= last).to(counts.dtype)
        return [(1 - part) * old + part * new for old, new in zip(self.weights, self.later, strict=True)]

    def mean_age(self, *, later: bool = False) -> float:
        """Mean age of gradients in the followed average after many steps, in steps; the newest has age 0.

        Args:
            later: Whether with the weights of later steps.
        """
        weights = self.later if later and self.later is not None else self.weights
        return math.fsum(weight * beta / (1 - beta) for beta, weight in zip(self.betas, weights, strict=True))


def _of_age(name: str, times: Sequence[float], age: object) -> tuple[float, ...]:
    """Weights in proportion to exp(-λ τ), with which the mean of τ - 1 is `age`."""
    low, high = times[0] - 1, times[-1] - 1
    wanted = number(low, high, above=True)(name, age)

    def weights(rate: float) -> list[float]:  # of τ in units of the longest difference, so that rates are near 1
        powers = [-rate * (time - times[0]) / (times[-1] - times[0]) for time in times]
        parts = [math.exp(power - max(powers)) for power in powers]
        return [part / math.fsum(parts) for part in parts]

    def mean(rate: float) -> float:
        return math.fsum(weight * (time - 1) for weight, time in zip(weights(rate), times, strict=True))

    return tuple(weights(_root(lambda rate: mean(rate) - wanted)))


def _root(falling: Callable[[float], float]) -> float:
    """Where a function that falls from above 0 to below 0 is 0, by bisection to the last bit."""
    low, high = -1.0, 1.0
    while falling(low) < 0 and low > -1e6:
        low *= 2
    while falling(high) > 0 and high < 1e6:
        high *= 2
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if falling(middle) > 0 else (low, middle)
    return low


def combined(
    buffers: Sequence[Sequence[Tensor]],
    averages: Averages,
    beta: float,
    counts: Tensor,
    *,
    ahead: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """What steps follow of several averages: means, with weights that sum to one; 0 where nothing was averaged yet.

    Args:
        buffers: Of each average, one for each parameter, that already hold the gradients.
        averages: Their betas and weights.
        beta: The first beta, in place of the one there.
        counts: (parameters,), gradients averaged so far, in the type of the buffers.
        ahead: Gradients of this step, for Nesterov's form; None: the plain one.

    Returns:
        New tensors, one for each parameter.
    """
    total: list[Tensor] = []
    newest = torch.zeros_like(counts)
    for own, rate, weight in zip(buffers, averages.betas_from(beta), averages.weights_at(counts), strict=True):
        mass = debias(rate, counts if ahead is None else counts + 1)
        factors = weight / torch.where(mass == 0, 1.0, mass)
        if ahead is not None:
            newest += factors * (1 - rate)
            factors = factors * rate
        terms = list(torch._foreach_mul(list(own), list(factors.unbind())))
        if total:
            torch._foreach_add_(total, terms)
        else:
            total = terms
    if ahead is not None:
        torch._foreach_add_(total, torch._foreach_mul(list(ahead), list(newest.unbind())))
    return total
