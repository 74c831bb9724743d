"""The surrogate that Newton-Muon minimises, scores of update directions, and the model with one large input."""

from steepest.theory.directions import LayerDirections, directions, linear_layers, score_directions
from steepest.theory.scores import Score, hessian_score, surrogate_score
from steepest.theory.spectra import CASES, Case, simulate
from steepest.theory.spike import SpikePath, Steps, contraction, iterations, path
from steepest.theory.surrogate import displacement_root, minimiser, muon_direction, newton_step, surrogate

__all__ = [
    "CASES",
    "Case",
    "LayerDirections",
    "Score",
    "SpikePath",
    "Steps",
    "contraction",
    "directions",
    "displacement_root",
    "hessian_score",
    "iterations",
    "linear_layers",
    "minimiser",
    "muon_direction",
    "newton_step",
    "path",
    "score_directions",
    "simulate",
    "surrogate",
    "surrogate_score",
]
