"""Optimizers that are steepest descent in a chosen norm, and a lab that compares them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from steepest.anatomy import InputMoment, Plan, Rule, View, route
    from steepest.geometry import (
        Ada2,
        AdaInf,
        ColNorm,
        Euclid,
        Frobenius,
        Hybrid,
        Max,
        Norm,
        Nuclear,
        RowNorm,
        Scaled,
        Schatten,
        Sign,
        Spectral,
        Sum,
    )
    from steepest.linalg import describe, minimax, polar
    from steepest.optim import (
        Adam,
        Fixed,
        MissingInputsError,
        Momo,
        Muon,
        MuonAdam,
        MuonMax,
        NewtonMuon,
        NewtonMuonMax,
        NonFiniteError,
        PethickScion,
        PolarGrad,
        Scion,
        SignDescent,
        SteepestDescent,
    )

__version__ = "0.1.0"

__all__ = [
    "Ada2",
    "AdaInf",
    "Adam",
    "ColNorm",
    "Euclid",
    "Fixed",
    "Frobenius",
    "Hybrid",
    "InputMoment",
    "Max",
    "MissingInputsError",
    "Momo",
    "Muon",
    "MuonAdam",
    "MuonMax",
    "NewtonMuon",
    "NewtonMuonMax",
    "NonFiniteError",
    "Norm",
    "Nuclear",
    "PethickScion",
    "Plan",
    "PolarGrad",
    "RowNorm",
    "Rule",
    "Scaled",
    "Schatten",
    "Scion",
    "Sign",
    "SignDescent",
    "Spectral",
    "SteepestDescent",
    "Sum",
    "View",
    "describe",
    "minimax",
    "polar",
    "route",
]

_ROOMS = ("linalg", "geometry", "anatomy", "optim", "parallel", "batch_size", "theory", "lab")


def __getattr__(name: str) -> object:
    """Bring in torch when something that needs it is asked for first: the command line answers, and ends, before."""
    if name in _ROOMS:
        return import_module(f"{__name__}.{name}")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    rooms = [import_module(f"{__name__}.{room}") for room in ("anatomy", "geometry", "linalg", "optim")]
    found = getattr(next(room for room in rooms if name in room.__all__), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})
