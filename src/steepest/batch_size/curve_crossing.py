"""When a loss curve first comes down to a target: the number of steps K that the fits of K(b) start from."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Literal

from steepest.batch_size.curve_fit import Point

CrossingStatus = Literal["reached", "stopped", "diverged", "at the start"]
"""Whether a run came to its target."""

FINE = 0.02  # evaluations this much closer than K leave less than the seeds' noise


@dataclass(frozen=True)
class Crossing:
    """What one run says of one target.

    Args:
        target: Loss.
        steps: To the target, on a line between two evaluations; else the last step that was evaluated, which is all
            one knows K to be above. At the start: the first step evaluated, which K may be below.
        status: Whether it got there. A run whose last loss is not finite counts as stopped there, and says "diverged".
        resolution: Distance of the two evaluations around the crossing as a share of `steps`; 0 if it was not reached.
    """

    target: float
    steps: float
    status: CrossingStatus
    resolution: float

    @property
    def coarse(self) -> bool:
        """Whether evaluations are too far apart to trust the line between them (2% of K)."""
        return self.resolution > FINE

    def point(self, batch_size: int, seed: int) -> Point:
        """The run as an entry of a fit.

        Args:
            batch_size: Of the run.
            seed: Of the run.

        Returns:
            The point; censored if the target was not reached.

        Raises:
            ValueError: If the loss was below the target from the start.
        """
        if self.status == "at the start":
            problem = f"The run with batch size {batch_size} and seed {seed} is below the target {self.target:g}"
            raise ValueError(f"{problem} at its first evaluation, step {self.steps:g}. Take a lower target.")
        return Point(batch_size, seed, self.steps, censored=self.status != "reached")


def first_crossings(
    steps: Sequence[float], losses: Sequence[float | None], targets: Sequence[float], *, window: int = 1
) -> tuple[Crossing, ...]:
    """Where a curve first comes down to each of several targets.

    Between two evaluations the logarithm of the loss is a straight line in the steps.

    Args:
        steps: Increasing steps of the evaluations.
        losses: Loss at each, above zero; None, inf or nan count as above any target.
        targets: Losses to reach, above zero.
        window: Odd number of neighbouring evaluations whose median replaces each loss; as many on both sides, so fewer
            near the ends.

    Returns:
        For each target.

    Raises:
        ValueError: If there are no evaluations, lengths differ, steps do not increase, a loss or target is not above
            zero, or the window is not odd.
    """
    if not steps or len(steps) != len(losses):
        problem = f"A loss curve takes as many losses as steps and at least one, got {len(steps)} steps"
        raise ValueError(f"{problem} and {len(losses)} losses.")
    if any(after <= before for before, after in pairwise(steps)) or steps[0] < 0:
        raise ValueError("Steps of a loss curve must increase from 0 or more.")
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window must be an odd number of evaluations, got {window}.")
    known = [math.inf if loss is None or math.isnan(loss) else loss for loss in losses]
    for name, values in (("Losses", known), ("Targets", targets)):
        if not all(value > 0 for value in values):
            problem = f"{name} must be above zero, as crossings are interpolated in log loss; got {min(values):g}"
            raise ValueError(f"{problem}. Subtract less from the loss, or add a constant to losses and targets.")
    smooth = _running_median(known, window)
    diverged = math.isinf(known[-1])
    return tuple(_cross(steps, smooth, target, diverged) for target in targets)


def first_crossing(
    steps: Sequence[float], losses: Sequence[float | None], target: float, *, window: int = 1
) -> Crossing:
    """Where a curve first comes down to one target; see `first_crossings`.

    Args:
        steps: Increasing steps of the evaluations.
        losses: Loss at each, above zero; None, inf or nan count as above any target.
        target: Loss to reach, above zero.
        window: Odd number of evaluations in the running median.

    Returns:
        The crossing.

    Raises:
        ValueError: As for `first_crossings`.

    Examples:
        >>> first_crossing([0, 100, 200], [4.0, 1.0, 0.5], 2.0).steps
        50.0
    """
    return first_crossings(steps, losses, [target], window=window)[0]


def _running_median(values: Sequence[float], window: int) -> list[float]:
    last = len(values) - 1
    reaches = [min(window // 2, index, last - index) for index in range(len(values))]  # as far to both sides
    return [median(values[index - reach : index + reach + 1]) for index, reach in enumerate(reaches)]


def _cross(steps: Sequence[float], losses: Sequence[float], target: float, diverged: bool) -> Crossing:
    for index, loss in enumerate(losses):
        if loss > target:
            continue
        if index == 0:
            return Crossing(target, float(steps[0]), "at the start", 0.0)
        start, end, before = steps[index - 1], steps[index], losses[index - 1]
        share = math.log(before / target) / math.log(before / loss) if math.isfinite(before) else 1.0
        at = start + (end - start) * share
        return Crossing(target, at, "reached", (end - start) / at)
    return Crossing(target, float(steps[-1]), "diverged" if diverged else "stopped", 0.0)
