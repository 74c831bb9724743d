"""The optimizer, and the recipes that choose its pieces."""

from steepest.optim.descent import SteepestDescent
from steepest.optim.grid import MuonMax, PethickScion, PolarGrad, Scion, SignDescent
from steepest.optim.guard import NonFiniteError, OnNonFinite
from steepest.optim.recipes import Adam, Muon, MuonAdam
from steepest.optim.step_size import Fixed, Momo

__all__ = [
    "Adam",
    "Fixed",
    "Momo",
    "Muon",
    "MuonAdam",
    "MuonMax",
    "NonFiniteError",
    "OnNonFinite",
    "PethickScion",
    "PolarGrad",
    "Scion",
    "SignDescent",
    "SteepestDescent",
]
