"""The learning rate over a run, when it is evaluated, and when it ends early."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from steepest.lab.tasks.task import Schedule


@dataclass(frozen=True)
class Trapezoid:
    """A rate that rises linearly, stays, and falls linearly.

    Args:
        warm_up: Part of the steps in which it rises to 1; the first of n such steps has 1 / n.
        cool_down: Part of the steps in which it falls.
        end: To what it falls, after the last step.
    """

    warm_up: float = 0.0
    cool_down: float = 0.0
    end: float = 0.0

    def __call__(self, step: float, *, steps: int) -> float:
        """The factor, in [0, 1].

        Args:
            step: Steps done so far, from 0.
            steps: Length of the run.
        """
        up = (step + 1) / (self.warm_up * steps) if self.warm_up else 1.0
        down = (steps - step) / (self.cool_down * steps) if self.cool_down else 1.0
        return min(1.0, up, self.end + (1 - self.end) * down)


cooldown = Trapezoid(cool_down=0.7)
# The first three are the lab's own. The others are those of published training scripts: docs/tracks.md.
SCHEDULES: Mapping[Schedule, Trapezoid] = {
    "cooldown": cooldown,
    "warmup-long-cooldown": Trapezoid(warm_up=0.05, cool_down=0.7),
    "constant": Trapezoid(),
    "late-cooldown": Trapezoid(cool_down=1800 / 6200),
    "warmup-cooldown": Trapezoid(warm_up=0.05, cool_down=0.5),
    "cooldown-to-tenth": Trapezoid(cool_down=0.45, end=0.1),
}
SMOOTHED = 5  # evaluations whose median must be below a target: one lucky evaluation does not end a run
SPACING = 0.02  # of the steps so far, at most, from one evaluation to the next in a run that is near its target
FAR_SPACING = 0.2  # likewise before that
NEAR = 1.2  # one training loss below this times the loss to watch from shows that the run is near


def rate_factor(step: float, *, steps: int, schedule: Schedule) -> float:
    """The factor on every learning rate, in [0, 1]; each of `steps` steps has one above 0.

    Args:
        step: Steps done so far, from 0.
        steps: Length of the run.
        schedule: A key of `SCHEDULES`.
    """
    return SCHEDULES[schedule](step, steps=steps)


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
