"""Optimizers that are steepest descent in a chosen norm, and a lab that compares them."""

__version__ = "0.1.0"
