"""True curves, and runs drawn from them."""

import numpy as np

from steepest.batch_size.curve_families import FAMILIES
from steepest.batch_size.curve_fit import Point

OCTAVES = tuple(16 * 2**k for k in range(8))
HALVES = (16, 23, 32, 45, 64, 91, 128, 181)
TRUTH = {
    "H": (130.0,),
    "S": (14.0,),
    "I": (14.0,),
    "P": (90.0, 0.76),
    "U": (13.0, 0.5, 2.0),
    "W": (11.1, 2.8),
}


def curve(key, sizes, *, parameters=None, scale=1000.0):
    """K(b) of a family, by its definition here and not by that of the package."""
    first, *rest = parameters or TRUTH[key]
    ratio = first / np.asarray(sizes, dtype=float)
    with np.errstate(invalid="ignore", divide="ignore"):
        steps = {
            "H": lambda: 1 + ratio,
            "S": lambda: 1 / (1 - np.sqrt(ratio)),
            "I": lambda: 1 / (1 - ratio),
            "P": lambda: 1 + ratio ** rest[0],
            "U": lambda: (1 - ratio ** rest[0]) ** -rest[1],
            "W": lambda: rest[0] - np.log(1 - np.sqrt(ratio)),
        }[key]()
    return scale * np.where((ratio < 1) | (key in "HP"), steps, np.inf)


def runs(key, sizes=OCTAVES, *, sigma=0.0, seeds=3, seed=0, budget=np.inf, parameters=None):
    """Points with log-normal noise; those that would take more steps than the budget are stopped there."""
    rng = np.random.default_rng(seed)
    steps = curve(key, sizes, parameters=parameters)[:, None] * np.exp(sigma * rng.standard_normal((len(sizes), seeds)))
    return [
        Point(size, s, float(min(steps[row, s], budget)), bool(steps[row, s] > budget))
        for row, size in enumerate(sizes)
        for s in range(seeds)
    ]


def theta(key):
    """Logarithms of the true parameters."""
    return np.log(TRUTH[key])


def shape(key):
    """The family itself."""
    return FAMILIES[key]
