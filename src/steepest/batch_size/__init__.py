"""Critical batch size: convergence bounds, gradient noise scales, and fits of how many steps a batch size needs.

Fits need numpy and scipy, and are imported by themselves: `steepest.batch_size.curve`.
"""

from steepest.batch_size.ball import Ball, frank_wolfe_gap
from steepest.batch_size.bounds import Bound, Critical, LogCurve, PowerCurve, Problem, Setting, bound, lag, noise_factor
from steepest.batch_size.estimators import alignment, euclidean, l1, nested_sizes, nuclear
from steepest.batch_size.noise import NoiseScale
from steepest.batch_size.noise_report import Curve, NoiseReport, Scale
from steepest.batch_size.ranks import effective_rank, noise_of_covariance, noise_of_entries, noise_of_variance
from steepest.batch_size.ratio import Ratio, batch_for, ratio_of_means
from steepest.linalg import overshoot

__all__ = [
    "Ball",
    "Bound",
    "Critical",
    "Curve",
    "LogCurve",
    "NoiseReport",
    "NoiseScale",
    "PowerCurve",
    "Problem",
    "Ratio",
    "Scale",
    "Setting",
    "alignment",
    "batch_for",
    "bound",
    "effective_rank",
    "euclidean",
    "frank_wolfe_gap",
    "l1",
    "lag",
    "nested_sizes",
    "noise_factor",
    "noise_of_covariance",
    "noise_of_entries",
    "noise_of_variance",
    "nuclear",
    "overshoot",
    "ratio_of_means",
]
