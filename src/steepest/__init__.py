"""Optimizers that are steepest descent in a chosen norm, and a lab that compares them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import ModuleType

    from steepest.anatomy import Plan as Plan
    from steepest.anatomy import Role as Role
    from steepest.anatomy import Rule as Rule
    from steepest.anatomy import View as View
    from steepest.anatomy import route as route
    from steepest.batch_size import NoiseReport as NoiseReport
    from steepest.batch_size import NoiseScale as NoiseScale
    from steepest.geometry import *  # noqa: F403 - all of a room that is in its __all__
    from steepest.linalg import COEFFICIENTS as COEFFICIENTS
    from steepest.linalg import Coefficients as Coefficients
    from steepest.linalg import describe as describe
    from steepest.linalg import minimax as minimax
    from steepest.linalg import polar as polar
    from steepest.optim import *  # noqa: F403
    from steepest.stages import *  # noqa: F403

__version__ = "0.1.0"

_ROOMS = (
    "linalg",
    "geometry",
    "anatomy",
    "ranks",
    "stages",
    "optim",
    "testing",
    "batch_size",
    "theory",
    "integrations",
    "lab",
)
# Names of the rooms that are names of the package, too; None: all.
_PUBLIC = {
    "anatomy": ("Plan", "Role", "Rule", "View", "route"),
    "geometry": None,
    "linalg": ("COEFFICIENTS", "Coefficients", "describe", "minimax", "polar"),
    "stages": None,
    "optim": None,
    "batch_size": ("NoiseReport", "NoiseScale"),
}


def __getattr__(name: str) -> object:
    """Bring in torch when something that needs it is asked for first: the command line answers, and ends, before."""
    if name in _ROOMS:
        return import_module(f"{__name__}.{name}")
    if name == "__all__" or not name.startswith("_"):
        found = {name: getattr(room, name) for room, names in _public() for name in names}
        globals().update(found, __all__=sorted(found))
    if name not in globals():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals()[name]


def _public() -> list[tuple[ModuleType, Iterable[str]]]:
    rooms = {name: import_module(f"{__name__}.{name}") for name in _PUBLIC}
    return [(rooms[name], names or rooms[name].__all__) for name, names in _PUBLIC.items()]


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOMS, *(name for _, names in _public() for name in names)})
