"""Batches of matrices: polynomial coefficients and the polar factor. Knows no optimizer and no process group."""

from steepest.linalg.coefficients import COEFFICIENTS, Certificate, Coefficients, describe, get_coefficients, minimax
from steepest.linalg.polar import PolarMethod, polar

__all__ = [
    "COEFFICIENTS",
    "Certificate",
    "Coefficients",
    "PolarMethod",
    "describe",
    "get_coefficients",
    "minimax",
    "polar",
]
