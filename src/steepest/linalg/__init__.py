"""Batches of matrices: coefficients, polar factors, damped powers. Knows no optimizer and no process group."""

from steepest.linalg.coefficients import (
    COEFFICIENTS,
    Certificate,
    Coefficients,
    describe,
    get_coefficients,
    minimax,
    overshoot,
)
from steepest.linalg.polar import PolarMethod, polar
from steepest.linalg.spd import (
    Damped,
    RidgeUnit,
    damped_factor,
    damped_inverse,
    damped_power,
    diagonal_power,
    ridge_unit,
)

__all__ = [
    "COEFFICIENTS",
    "Certificate",
    "Coefficients",
    "Damped",
    "PolarMethod",
    "RidgeUnit",
    "damped_factor",
    "damped_inverse",
    "damped_power",
    "describe",
    "diagonal_power",
    "get_coefficients",
    "minimax",
    "overshoot",
    "polar",
    "ridge_unit",
]
