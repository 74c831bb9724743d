"""The basin of a learning rate: how far off one may be, in decades, and still end near the best.

Final losses in, numbers out; no files, no text. Along a grid of learning rates the mean final loss is taken to run on
straight lines in log10(lr). A point with a diverged run has no mean, and no line leads to or from a point without one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from steepest.lab.report.statistics import Summary, summarize

TOLERANCES = (0.01, 0.02, 0.05)


@dataclass(frozen=True)
class Point:
    """One learning rate of a grid.

    Args:
        lr: Learning rate, above 0.
        loss: Final loss over seeds; None if a run diverged, or none has ended.
        n: Number of seeds that have ended, diverged ones included.
        diverged: Number of diverged ones.
    """

    lr: float
    loss: Summary | None
    n: int
    diverged: int


@dataclass(frozen=True)
class Basin:
    """Where the mean final loss is at or below a threshold.

    Args:
        width: Total length in decades.
        intervals: (lowest, highest) learning rate of each piece, ascending.
        open_ended: Whether it reaches the lowest or highest rate of the grid, or one beside which runs are still
            missing, so that the true basin is at least as wide.
    """

    width: float
    intervals: tuple[tuple[float, float], ...]
    open_ended: bool


@dataclass(frozen=True)
class Best:
    """The point of the lowest mean loss, the lower rate on a tie, with the loss to report; `at_edge` of the grid."""

    lr: float
    loss: Summary
    at_edge: bool


def grid(finals: Mapping[float, Sequence[float | None]]) -> tuple[Point, ...]:
    """The points of a grid in ascending order.

    Args:
        finals: Final losses by learning rate, one for each seed that has ended; None for a diverged one.

    Raises:
        ValueError: If a learning rate is not a finite number above 0.
    """
    for lr in finals:
        if not 0 < lr < math.inf:
            raise ValueError(f"lr must be a finite number above 0, got {lr}: its logarithm is needed.")
    return tuple(_point(lr, finals[lr]) for lr in sorted(finals))


def best(points: Sequence[Point], *, by: Sequence[Point]) -> Best | None:
    """The best point of a grid in ascending order; None if no point has a mean.

    Args:
        points: With the losses to report.
        by: The same points with the losses to choose by.
    """
    known = [(point.loss.mean, i) for i, point in enumerate(by) if point.loss is not None]
    if not known:
        return None
    _, place = min(known)
    loss = points[place].loss
    return None if loss is None else Best(points[place].lr, loss, at_edge=place in (0, len(points) - 1))


def basin(points: Sequence[Point], *, reference: float, tolerance: float) -> Basin:
    """The learning rates whose mean final loss is at most `reference * (1 + tolerance)`.

    Args:
        points: A grid in ascending order.
        reference: Loss of the best, of this grid or of several, above 0.
        tolerance: Such as 0.05 for "within 5%", at least 0.

    Raises:
        ValueError: If a loss is not above 0, so that per cent of it mean nothing, or the tolerance is negative.
    """
    if tolerance < 0:
        raise ValueError(f"tolerance must be at least 0, got {tolerance}.")
    lowest = min([reference, *(point.loss.mean for point in points if point.loss is not None)])
    if not lowest > 0:
        raise ValueError(f"A basin needs losses above 0, got {lowest:g}: 'within x%' means nothing else.")
    threshold = reference * (1 + tolerance)
    within = [math.log10(p.lr) for p in points if p.loss is not None and p.loss.mean <= threshold]
    pieces = [(place, place) for place in within]  # a point between two without a mean has no width, but is there
    for left, right in pairwise(points):
        if left.loss is not None and right.loss is not None:
            pieces += _below(left.lr, left.loss.mean, right.lr, right.loss.mean, threshold)
    merged = _merged(pieces)
    intervals = tuple((10**low, 10**high) for low, high in merged)
    return Basin(sum(high - low for low, high in merged), intervals, _open_ended(points, threshold))


def expected_best(losses: Sequence[float]) -> tuple[float, ...]:
    """The expected lowest of k losses drawn at random without replacement, for k = 1, 2, ..., all.

    The i-th lowest of n is the lowest drawn if the other k - 1 come from the n - i above it, which is so in
    C(n - i, k - 1) of C(n, k) draws.

    Args:
        losses: One of each setting, finite. The caller decides what a diverged one is worth.

    Returns:
        As many numbers as there are losses; the first is their mean, the last their minimum.

    Source:
        Dodge et al., 2019, arXiv:1909.03004, where the draws are with replacement; a grid is tried without.
    """
    ordered = sorted(losses)
    return tuple(_expected_lowest(ordered, k) for k in range(1, len(ordered) + 1))


def unchanged(curves: Mapping[float, Mapping[int, Sequence[float]]]) -> tuple[tuple[float, ...], ...]:
    """Groups of learning rates that gave exactly the same curves with every seed they share: the rate had no effect.

    Args:
        curves: By learning rate and seed, the losses along a run that ended without diverging.

    Returns:
        Groups of at least two rates, ascending.
    """
    groups: list[list[float]] = []
    for lr in sorted(lr for lr, by_seed in curves.items() if by_seed):
        home = next((group for group in groups if _same(curves[group[0]], curves[lr])), None)
        if home is None:
            groups.append([lr])
        else:
            home.append(lr)
    return tuple(tuple(group) for group in groups if len(group) > 1)


def _point(lr: float, losses: Sequence[float | None]) -> Point:
    known = [loss for loss in losses if loss is not None]
    diverged = len(losses) - len(known)
    return Point(lr, None if diverged else summarize(known), len(losses), diverged)


def _below(x0: float, y0: float, x1: float, y1: float, threshold: float) -> list[tuple[float, float]]:
    """The part at or below the threshold of a line between two points, in log10 of x; at most one piece."""
    a, b = math.log10(x0), math.log10(x1)
    if max(y0, y1) <= threshold:
        return [(a, b)]
    if min(y0, y1) > threshold:
        return []
    crossing = a + (b - a) * ((threshold - y0) / (y1 - y0))
    return [(a, crossing)] if y0 <= threshold else [(crossing, b)]


def _merged(pieces: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Pieces that touch, joined; those of neighbouring segments share their end exactly."""
    merged: list[tuple[float, float]] = []
    for low, high in sorted(pieces):
        if merged and low <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], high))
        else:
            merged.append((low, high))
    return merged


def _open_ended(points: Sequence[Point], threshold: float) -> bool:
    tried = [None, *(point if point.n else None for point in points), None]  # None: not tried, or not yet
    return any(
        point is not None and point.loss is not None and point.loss.mean <= threshold and None in (before, after)
        for before, point, after in zip(tried, tried[1:], tried[2:], strict=False)
    )


def _expected_lowest(ordered: Sequence[float], k: int) -> float:
    n, expected, weight = len(ordered), 0.0, k / len(ordered)  # C(n - 1, k - 1) / C(n, k)
    for i, loss in enumerate(ordered[: n - k + 1]):
        weight *= (n - i - k + 1) / (n - i) if i else 1.0  # C(n - i - 1, k - 1) / C(n - i, k - 1)
        expected += weight * loss
    return expected


def _same(first: Mapping[int, Sequence[float]], second: Mapping[int, Sequence[float]]) -> bool:
    shared = first.keys() & second.keys()
    return bool(shared) and all(list(first[seed]) == list(second[seed]) for seed in shared)
