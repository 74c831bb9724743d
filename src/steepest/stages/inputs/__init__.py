"""Second moments of layer inputs, as Newton-Muon needs them: watched, averaged, inverted, multiplied with."""

from steepest.stages.inputs.feeds import Rows
from steepest.stages.inputs.moments import MomentLayout, given_rows
from steepest.stages.inputs.options import PRESETS, InputMoment
from steepest.stages.inputs.readers import Reader, find_readers
from steepest.stages.inputs.stage import InputMoments, MissingInputsError
from steepest.stages.inputs.watch import InputWatch

__all__ = [
    "PRESETS",
    "InputMoment",
    "InputMoments",
    "InputWatch",
    "MissingInputsError",
    "MomentLayout",
    "Reader",
    "Rows",
    "find_readers",
    "given_rows",
]
