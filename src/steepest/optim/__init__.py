"""The optimizer, and the recipes that choose its pieces."""

from steepest.optim import recipes
from steepest.optim.averaging import TailAverage
from steepest.optim.decay import Cautious, Decay, Decoupled, Sphere
from steepest.optim.descent import SteepestDescent
from steepest.optim.guard import NonFiniteError, OnNonFinite
from steepest.optim.momentum import Averages
from steepest.optim.momo import Fixed, Momo, StepSize
from steepest.optim.outer import OuterNesterov
from steepest.optim.qk_clip import QKClip
from steepest.optim.recipes import *  # noqa: F403 - each recipe

__all__ = [
    "Averages",
    "Cautious",
    "Decay",
    "Decoupled",
    "Fixed",
    "Momo",
    "NonFiniteError",
    "OnNonFinite",
    "OuterNesterov",
    "QKClip",
    "Sphere",
    "SteepestDescent",
    "StepSize",
    "TailAverage",
]
__all__ += recipes.__all__
