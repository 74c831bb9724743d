"""When runs come to a target."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

from steepest.batch_size.curve_crossing import Crossing, first_crossing
from steepest.lab.runs.records import Run
from steepest.lab.runs.schedule import SMOOTHED


def run_crossing(run: Run, target: float) -> Crossing:
    """Where the validation loss of a run first comes down to a target, as medians of five evaluations say.

    The median counts for the evaluation in the middle; the start counts as it is. So a run has crossed its own target
    exactly if it ended for that reason.

    Args:
        run: With one evaluation at least.
        target: Loss.
    """
    steps = [row.step for row in run.evals]
    losses = [float("inf") if row.loss is None else row.loss for row in run.evals]
    middle = SMOOTHED // 2
    medians = [statistics.median(losses[i - middle : i + middle + 1]) for i in range(middle, len(losses) - middle)]
    crossing = first_crossing([steps[0], *steps[middle : len(steps) - middle]], [losses[0], *medians], target)
    if crossing.status in ("reached", "at the start"):
        return crossing
    return replace(crossing, steps=steps[-1], status="stopped" if math.isfinite(losses[-1]) else "diverged")
