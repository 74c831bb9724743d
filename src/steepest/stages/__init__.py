"""What may stand around the search for a direction: moments of inputs, scaling of rows, metrics, stages of users."""

from steepest.stages.inputs import InputMoment, MissingInputsError
from steepest.stages.metric import DiagonalMetric
from steepest.stages.radial import RadialBrake, RowFloor
from steepest.stages.rows import RowScaling
from steepest.stages.stage import Entry, Stage

KNOWN: tuple[type[Stage], ...] = (InputMoment, RowScaling, DiagonalMetric)  # those whose entries a checkpoint may have

__all__ = [
    "DiagonalMetric",
    "Entry",
    "InputMoment",
    "MissingInputsError",
    "RadialBrake",
    "RowFloor",
    "RowScaling",
    "Stage",
]
