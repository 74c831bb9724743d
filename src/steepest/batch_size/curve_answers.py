"""What the runs say of a batch size: a number where they determine it, a range where they do not.

A batch size b* that minimises b K(b) is given as a number only if

* the chosen family has such a minimum (the hyperbola has none),
* the measured b K(b), geometric means over seeds, is least inside the grid, and
* the target was reached by all seeds at two or more batch sizes on each side of b*.

Otherwise the answer is a range with ends on the grid.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from steepest.batch_size.curve_families import Array
from steepest.batch_size.curve_fit import Fit, Runs
from steepest.batch_size.curve_intervals import percentiles

Kind = Literal["point", "at most", "at least", "between", "refused"]
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
