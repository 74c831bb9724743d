"""The batch size that reaches the target soonest, given what a step takes."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from steepest.batch_size.curve_families import Array
from steepest.batch_size.curve_fit import Fit

FINENESS = 4001  # places between the smallest and the largest batch size
StepTime = Callable[[Array], Array]


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
