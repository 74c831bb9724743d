"""What may stand around the search for a direction: moments of inputs and gradients, scaling of rows, metrics."""

from steepest.stages.basis import Eigenbasis
from steepest.stages.inputs import InputMoment, MissingInputsError
from steepest.stages.metric import DiagonalMetric
from steepest.stages.powers import ShampooPowers
from steepest.stages.radial import RadialBrake, RowFloor
from steepest.stages.rows import RowScaling
from steepest.stages.stage import Entry, Stage

# Those whose entries a checkpoint may have.
KNOWN: tuple[type[Stage], ...] = (InputMoment, RowScaling, DiagonalMetric, Eigenbasis, ShampooPowers)

__all__ = [
    "DiagonalMetric",
    "Eigenbasis",
    "Entry",
    "InputMoment",
    "MissingInputsError",
    "RadialBrake",
    "RowFloor",
    "RowScaling",
    "ShampooPowers",
    "Stage",
]
