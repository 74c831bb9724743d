"""Norms on the weight of one layer, each with its dual norm and linear minimisation oracle."""

from steepest.geometry.adaptive import Ada2, AdaInf
from steepest.geometry.layer import NORMS, ColNorm, Frobenius, RowNorm, Sign, Spectral, check_norm, get_norm
from steepest.geometry.norm import Norm, completed
from steepest.geometry.product import PRODUCTS, Combined, Euclid, Hybrid, Max, Product, Sum, get_product
from steepest.geometry.scale import ScaleRule, scale_factor
from steepest.geometry.scaled import Scaled
from steepest.geometry.spectrum import Nuclear, Schatten

__all__ = [
    "NORMS",
    "PRODUCTS",
    "Ada2",
    "AdaInf",
    "ColNorm",
    "Combined",
    "Euclid",
    "Frobenius",
    "Hybrid",
    "Max",
    "Norm",
    "Nuclear",
    "Product",
    "RowNorm",
    "ScaleRule",
    "Scaled",
    "Schatten",
    "Sign",
    "Spectral",
    "Sum",
    "check_norm",
    "completed",
    "get_norm",
    "get_product",
    "scale_factor",
]
