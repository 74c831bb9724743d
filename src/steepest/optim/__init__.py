"""The optimizer, and the recipes that choose its pieces."""

from steepest.optim.descent import SteepestDescent
from steepest.optim.guard import NonFiniteError, OnNonFinite
from steepest.optim.input_moments import MissingInputsError
from steepest.optim.recipes import (
    Adam,
    Muon,
    MuonAdam,
    MuonMax,
    NewtonMuon,
    NewtonMuonMax,
    PethickScion,
    PolarGrad,
    Scion,
    SignDescent,
)
from steepest.optim.step_size import Fixed, Momo

__all__ = [
    "Adam",
    "Fixed",
    "MissingInputsError",
    "Momo",
    "Muon",
    "MuonAdam",
    "MuonMax",
    "NewtonMuon",
    "NewtonMuonMax",
    "NonFiniteError",
    "OnNonFinite",
    "PethickScion",
    "PolarGrad",
    "Scion",
    "SignDescent",
    "SteepestDescent",
]
