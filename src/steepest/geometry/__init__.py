"""Norms on the weight of one layer, each with its dual norm and linear minimisation oracle."""

from steepest.geometry.adaptive import Ada2, AdaInf
from steepest.geometry.layer import NORMS, ColNorm, Frobenius, RowNorm, Sign, Spectral, get_norm
from steepest.geometry.norm import Norm
from steepest.geometry.scale import ScaleRule, scale_factor
from steepest.geometry.spectrum import Nuclear, Schatten

__all__ = [
    "NORMS",
    "Ada2",
    "AdaInf",
    "ColNorm",
    "Frobenius",
    "Norm",
    "Nuclear",
    "RowNorm",
    "ScaleRule",
    "Schatten",
    "Sign",
    "Spectral",
    "get_norm",
    "scale_factor",
]
