"""What may stand around the search for a direction: moments of layer inputs, row normalisation, stages of users."""

from steepest.stages.inputs import PRESETS, InputMoment, MissingInputsError
from steepest.stages.rows import RowScaling
from steepest.stages.stage import Entry, Stage, state_dtype

KNOWN: tuple[type[Stage], ...] = (InputMoment, RowScaling)  # those whose entries a checkpoint may have

__all__ = ["KNOWN", "PRESETS", "Entry", "InputMoment", "MissingInputsError", "RowScaling", "Stage", "state_dtype"]
