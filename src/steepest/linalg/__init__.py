"""Batches of matrices: coefficients, polar factors, damped powers. Knows no optimizer and no process group."""

from steepest.linalg.coefficients import (
    COEFFICIENTS,
    Certificate,
    Coefficients,
    Normaliser,
    get_coefficients,
    overshoot,
)
from steepest.linalg.minimax import describe, minimax
from steepest.linalg.polar import MEMORY_CAP, PolarMethod, compute_dtype, flops, polar, polars
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
    "MEMORY_CAP",
    "Certificate",
    "Coefficients",
    "Damped",
    "Normaliser",
    "PolarMethod",
    "RidgeUnit",
    "compute_dtype",
    "damped_factor",
    "damped_inverse",
    "damped_power",
    "describe",
    "diagonal_power",
    "flops",
    "get_coefficients",
    "minimax",
    "overshoot",
    "polar",
    "polars",
    "ridge_unit",
]
