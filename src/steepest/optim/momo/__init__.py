"""Loss-aware step sizes: how losses arrive, the model that they make, and how much of a step that says is useful."""

from steepest.optim.momo.losses import Decision, Heard, Losses
from steepest.optim.momo.model import Fixed, Momo, StepSize
from steepest.optim.momo.tap import Loss

__all__ = ["Decision", "Fixed", "Heard", "Loss", "Losses", "Momo", "StepSize"]
