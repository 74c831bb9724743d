"""The learning rate over a run, when it is evaluated, and when it ends early."""

import statistics
from collections.abc import Sequence
from typing import Literal

Schedule = Literal["cooldown", "constant"]
COOLDOWN = 0.7
SMOOTHED = 5  # evaluations whose median must be below a target: one lucky evaluation does not end a run
SPACING = 0.02  # of the steps so far, at most, from one evaluation to the next in a run that is near its target
FAR_SPACING = 0.2  # likewise before that
NEAR = 1.2  # one training loss below this times the loss to watch from shows that the run is near


def cooldown(step: float, *, steps: int) -> float:
    """Constant, then linear to 0 over the last 70 % of the steps; each of `steps` steps has a rate above 0.

    Args:
        step: Steps done so far, from 0.
        steps: Length of the run.

    Returns:
        A factor in [0, 1] on every learning rate.
    """
    return min(1.0, (steps - step) / (COOLDOWN * steps))


def rate_factor(step: float, *, steps: int, schedule: Schedule) -> float:
    """The factor on every learning rate: that of `cooldown`, or 1.

    Args:
        step: Steps done so far, from 0.
        steps: Length of the run.
        schedule: Which.
    """
    return cooldown(step, steps=steps) if schedule == "cooldown" else 1.0


def evaluates(step: int, *, every: int, spacing: float | None) -> bool:
    """Whether a run is evaluated after `step` steps, its last step apart.

    A run to a target is evaluated at steps that lie at most 2 % apart once it is near, or `every` if that is more:
    where a curve crosses the target is then known to that precision, however many steps it takes.

    Args:
        step: At least 1.
        every: Steps from one evaluation to the next.
        spacing: Part of the steps so far that may lie between two evaluations; None: `every` holds throughout.
    """
    distance = every
    while spacing is not None and 2 * distance <= spacing * step:
        distance *= 2
    return step % distance == 0


def reached(losses: Sequence[float], target: float | None) -> bool:
    """Whether a run has come to its target: the median of its last five evaluations is not above it.

    Args:
        losses: Of the evaluations so far, the last ones at least.
        target: None: never.
    """
    return target is not None and len(losses) >= SMOOTHED and statistics.median(losses[-SMOOTHED:]) <= target
