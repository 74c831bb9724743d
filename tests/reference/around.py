"""What stages do around the norm, in float64 from all gradients so far: for `Block.around`."""

import numpy as np

from tests.reference.grid import Around, Array


def moving(values: Array, beta: float) -> Array:
    """A moving average from zero, by its weights."""
    t = len(values)
    return np.tensordot((1 - beta) * beta ** np.arange(t - 1, -1, -1.0), values, 1)


def scaled_like(d: Array, found: Array) -> Array:
    size = np.sqrt((d**2).sum())
    return d * np.sqrt((found**2).sum()) / size if size > 0 else d


def diagonal_metric(
    *,
    sides: str = "both",
    source: str = "noise",
    exponent: float = 0.5,
    bounds: tuple[float, float] = (0.5, 2.0),
    beta2: float = 0.95,
    keep_size: bool = True,
) -> Around:
    """IsoMuon's metric: B^-1/2 lmo(B^-1/2 M A^-1/2) A^-1/2."""

    def metric(squares: Array) -> Array:
        v = moving(squares, beta2)
        if v.mean() == 0:
            return np.ones_like(v)
        r = np.minimum(np.maximum((v / v.mean()) ** exponent, bounds[0]), bounds[1])
        return r / r.mean()

    def around(gradients, averages):
        squares = (gradients - averages) ** 2 if source == "noise" else gradients**2
        if source == "noise":
            squares[0] = 0  # the first average is the first gradient
        _, m, n = gradients.shape
        b = metric(squares.mean(2)) if sides != "columns" else np.ones(m)
        a = metric(squares.mean(1)) if sides != "rows" else np.ones(n)
        left, right = np.diag(b**-0.5), np.diag(a**-0.5)

        def after(found):
            d = left @ found @ right
            return scaled_like(d, found) if keep_size else d

        return lambda average: left @ average @ right, after

    return around
