"""From runs at several batch sizes to critical batch sizes: everything public of it.

It takes numpy and scipy, which `pip install 'steepest[lab]'` brings; hence it is not imported with `steepest`.
"""

from steepest.batch_size.curve_answers import Answer, Kind, Level, levels
from steepest.batch_size.curve_crossing import Crossing, CrossingStatus, first_crossing, first_crossings
from steepest.batch_size.curve_estimate import Estimate, estimate, lack_of_fit
from steepest.batch_size.curve_families import FAMILIES, Family, family
from steepest.batch_size.curve_fit import Choice, Fit, Point, choose, fit
from steepest.batch_size.curve_intervals import Refits, averaged, bootstrap, percentiles
from steepest.batch_size.curve_time import StepTime, TimeOptimum, linear_step_time, time_optimal
from steepest.batch_size.curve_words import recommendation

__all__ = [
    "FAMILIES",
    "Answer",
    "Choice",
    "Crossing",
    "CrossingStatus",
    "Estimate",
    "Family",
    "Fit",
    "Kind",
    "Level",
    "Point",
    "Refits",
    "StepTime",
    "TimeOptimum",
    "averaged",
    "bootstrap",
    "choose",
    "estimate",
    "family",
    "first_crossing",
    "first_crossings",
    "fit",
    "lack_of_fit",
    "levels",
    "linear_step_time",
    "percentiles",
    "recommendation",
    "time_optimal",
]
