"""Figures of the theory commands as PNG: scores of directions, and steps on the model with one large input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from steepest.lab.report.figure import Axis, Curve, Dots, Figure, decades, end_labels, named
from steepest.lab.report.palette import Style, styles
from steepest.lab.report.vega import to_png
from steepest.theory import LayerDirections, Steps
from steepest.theory.spike import SPIKE_METHODS, SpikeMethod

Row = Mapping[str, float | None]  # by direction; None where there is no score


def scores_png(ratios: Mapping[str, Row]) -> bytes:
    """Scores of the synthetic study, relative to Newton's.

    Args:
        ratios: By case and direction, all positive.

    Returns:
        The PNG.
    """
    return _dots("scores", "Scores on random quadratics", "score / score of Newton's direction", ratios)


def directions_png(layers: Sequence[LayerDirections]) -> bytes:
    """Scores of directions of a trained model, relative to the best of their layer.

    Args:
        layers: At least one with a direction of positive curvature.

    Returns:
        The PNG; directions without a score are missing from it, and it says so.
    """
    rows: dict[str, Row] = {}
    for layer in layers:
        values = {name: score.value for name, score in layer.scores.items()}
        best = max((value for value in values.values() if value), default=1.0)
        rows[layer.layer] = {name: None if value is None else value / best for name, value in values.items()}
    return _dots("directions", "Scores on a trained model", "score / best score of the layer", rows)


def spike_png(steps: Mapping[float, Mapping[SpikeMethod, Steps]], *, eps: float) -> bytes:
    """Steps until all coefficients stay within `eps`, against κ.

    Args:
        steps: By κ and method, at least one κ.
        eps: What was reached.

    Returns:
        The PNG.
    """
    looks, kappas = styles(SPIKE_METHODS, baseline="gradient-descent"), sorted(steps)
    curves = [
        _curve(method, looks[method], kappas, [float(max(1, steps[kappa][method].settled)) for kappa in kappas])
        for method in SPIKE_METHODS
    ]
    top = 2 * max(max(curve.y) for curve in curves)
    y = Axis(f"steps until all errors stay below {eps:g}", 0.8, top, logarithmic=True, ticks=decades(0.8, top))
    low, high = kappas[0] / 1.1, kappas[-1] * 1.1
    figure = Figure(
        key="spike",
        title="Steps against the variance of one input",
        caption="",
        x=Axis("variance of the large input", low, high, logarithmic=True, ticks=decades(low, high)),
        y=y,
        height=400,
        curves=tuple(curves),
        labels=end_labels(curves, y),
    )
    return to_png(figure)


def _curve(name: str, style: Style, x: Sequence[float], y: Sequence[float]) -> Curve:
    return Curve(name=name, style=style, x=tuple(x), y=tuple(y), low=(), high=())


def _dots(key: str, title: str, x_title: str, rows: Mapping[str, Row]) -> bytes:
    """A line per row, a mark per direction; marks of one row are a little below each other, so that all are seen."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    looks = styles(names, baseline="gradient")
    dots: list[Dots] = []
    for place, name in enumerate(names):
        shift = 0.3 - 0.6 * place / max(1, len(names) - 1)
        points = [(value, shift - y) for y, row in enumerate(rows.values()) if (value := row.get(name)) is not None]
        x, y = tuple(x for x, _ in points), tuple(y for _, y in points)
        dots.append(Dots(name, looks[name], "mean", x, y, ()))
    missing = sum(value is None for row in rows.values() for value in row.values())
    figure = Figure(
        key=key,
        title=title,
        caption="",
        x=Axis(x_title, 0.0, 1.05),
        y=named(list(rows)),
        height=110 + max(60 * len(rows), 26 * len(names)),
        dots=tuple(dots),
        above=f"not shown: {missing} without positive curvature" if missing else "",
        keyed=True,
    )
    return to_png(figure)
