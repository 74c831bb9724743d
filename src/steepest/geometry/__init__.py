"""Norms on the weight of one layer, each with its dual norm and linear minimisation oracle."""

from steepest.geometry.layer import NORMS, AdaInf, Frobenius, Norm, Sign, Spectral, get_norm
from steepest.geometry.scale import ScaleRule, scale_factor

__all__ = [
    "NORMS",
    "AdaInf",
    "Frobenius",
    "Norm",
    "ScaleRule",
    "Sign",
    "Spectral",
    "get_norm",
    "scale_factor",
]
