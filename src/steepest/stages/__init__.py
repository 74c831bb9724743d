"""What may stand around the search for a direction: moments of layer inputs, row scaling, stages of users."""

from steepest.stages.inputs import InputMoment, MissingInputsError
from steepest.stages.rows import RowScaling
from steepest.stages.stage import Entry, Stage

KNOWN: tuple[type[Stage], ...] = (InputMoment, RowScaling)  # those whose entries a checkpoint may have

__all__ = ["Entry", "InputMoment", "MissingInputsError", "RowScaling", "Stage"]
