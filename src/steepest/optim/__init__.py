"""The optimizer, and the recipes that choose its pieces."""

from steepest.optim.descent import SteepestDescent
from steepest.optim.guard import NonFiniteError, OnNonFinite
from steepest.optim.recipes import Adam, Muon, MuonAdam

__all__ = ["Adam", "Muon", "MuonAdam", "NonFiniteError", "OnNonFinite", "SteepestDescent"]
