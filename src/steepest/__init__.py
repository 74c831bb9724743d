"""Optimizers that are steepest descent in a chosen norm, and a lab that compares them."""

from steepest.anatomy import Plan, Rule, View, route
from steepest.geometry import Ada2, AdaInf, ColNorm, Frobenius, Norm, Nuclear, RowNorm, Schatten, Sign, Spectral
from steepest.linalg import describe, minimax, polar
from steepest.optim import Adam, Muon, MuonAdam, NonFiniteError, SteepestDescent

__version__ = "0.1.0"

__all__ = [
    "Ada2",
    "AdaInf",
    "Adam",
    "ColNorm",
    "Frobenius",
    "Muon",
    "MuonAdam",
    "NonFiniteError",
    "Norm",
    "Nuclear",
    "Plan",
    "RowNorm",
    "Rule",
    "Schatten",
    "Sign",
    "Spectral",
    "SteepestDescent",
    "View",
    "describe",
    "minimax",
    "polar",
    "route",
]
