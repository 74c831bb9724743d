"""The optimizer, and the recipes that choose its pieces."""

from steepest.optim import recipes
from steepest.optim.descent import SteepestDescent
from steepest.optim.guard import NonFiniteError, OnNonFinite
from steepest.optim.input_moments import MissingInputsError
from steepest.optim.recipes import *  # noqa: F403 - each recipe
from steepest.optim.step_size import Fixed, Momo, StepSize

__all__ = ["Fixed", "MissingInputsError", "Momo", "NonFiniteError", "OnNonFinite", "SteepestDescent", "StepSize"]
__all__ += recipes.__all__
