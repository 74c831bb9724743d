"""When runs come to a target."""

from __future__ import annotations

from steepest.batch_size.curve_crossing import Crossing, first_crossings
from steepest.lab.records import Run
from steepest.lab.schedule import SMOOTHED


def run_crossing(run: Run, target: float) -> Crossing:
    """Where the validation loss of a run, by its running median, first comes down to a target.

    Args:
        run: Finished or not.
        target: Loss.
    """
    steps, losses = [row.step for row in run.evals], [row.loss for row in run.evals]
    return first_crossings(steps, losses, [target], window=SMOOTHED)[0]
