"""Basins against closed forms, a fine grid and brute force."""

from __future__ import annotations

import math
from itertools import combinations, pairwise
from statistics import fmean

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from steepest.lab.studies.sweep.basin import TOLERANCES, Point, basin, best, expected_best, grid, unchanged
from tests.cases import cases

LOSSES = st.floats(0.01, 10)


def valley(*losses: float | None, seeds: int = 1) -> tuple[Point, ...]:
    """Mean losses at lr = 1, 10, 100, ...; None for a diverged point."""
    return grid({10.0**i: [loss] * seeds for i, loss in enumerate(losses)})


def width(points: tuple[Point, ...], reference: float, tolerance: float) -> float:
    return basin(points, reference=reference, tolerance=tolerance).width


def test_a_grid_is_sorted_and_a_point_with_a_diverged_seed_has_no_mean() -> None:
    low, middle, high = grid({0.1: [2.0, None], 0.01: [1.0, 3.0], 1.0: []})
    assert (low.lr, low.n, low.diverged) == (0.01, 2, 0)
    assert low.loss is not None
    assert (low.loss.mean, low.loss.sd) == (2.0, math.sqrt(2))
    assert (middle.lr, middle.loss, middle.n, middle.diverged) == (0.1, None, 2, 1)
    assert (high.lr, high.loss, high.n, high.diverged) == (1.0, None, 0, 0)


@pytest.mark.parametrize("lr", [0.0, -1.0, math.inf, math.nan])
def test_a_rate_without_logarithm_is_refused(lr: float) -> None:
    with pytest.raises(ValueError, match=rf"lr must be a finite number above 0, got {lr}: its logarithm is needed\."):
        grid({lr: [1.0]})


@cases("tolerance", TOLERANCES)
@cases("left, right", [(2.0, 2.0), (1.3, 4.0), (7.0, 1.06)])
def test_the_width_of_a_v_is_known(tolerance: float, left: float, right: float) -> None:
    """From 1 up to 1 + x at slope s, the loss takes x / s decades."""
    found = basin(valley(left, 1.0, right), reference=1.0, tolerance=tolerance)
    down, up = tolerance / (left - 1), tolerance / (right - 1)
    assert found.width == pytest.approx(down + up, rel=1e-12)
    [(low, high)] = found.intervals
    assert (low, high) == pytest.approx((10 ** (1 - down), 10 ** (1 + up)), rel=1e-12)
    assert not found.open_ended


def test_the_reference_may_be_the_best_of_another_method() -> None:
    points = valley(2.0, 1.04, 2.0)
    assert width(points, 1.0, 0.05) == pytest.approx(2 * 0.01 / 0.96, rel=1e-9)
    assert width(points, 1.0, 0.02) == 0
    assert basin(points, reference=1.0, tolerance=0.02).intervals == ()
    assert width(points, 1.04, 0.05) > width(points, 1.0, 0.05)


def test_two_valleys_are_two_pieces() -> None:
    found = basin(valley(3, 1, 3, 1, 3), reference=1.0, tolerance=0.05)
    assert len(found.intervals) == 2
    assert found.width == pytest.approx(4 * 0.025, rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ((1.0, 1.0, None, 1.0, 1.0, 9.0), 2 + 0.05 / 8),  # no line across the divergence
        ((9.0, 1.0, None), 0.05 / 8),
        ((None, 1.0, None), 0.0),
        ((None, None), 0.0),
    ],
)
def test_a_basin_ends_at_the_last_point_before_a_divergence(losses: tuple[float | None, ...], expected: float) -> None:
    assert width(valley(*losses), 1.0, 0.05) == pytest.approx(expected, abs=1e-12)


def test_a_single_point_between_divergences_is_a_piece_without_width() -> None:
    found = basin(valley(None, 1.0, None), reference=1.0, tolerance=0.05)
    assert found.intervals == (pytest.approx((10.0, 10.0)),)
    assert not found.open_ended


@cases(
    "losses, open_ended",
    [((1.0, 9.0, 9.0), True), ((9.0, 9.0, 1.05), True), ((9.0, 1.0, 9.0), False), ((1.0,), True), ((None, 1.0), True)],
)
def test_a_basin_at_the_edge_of_the_grid_may_go_on(losses: tuple[float | None, ...], open_ended: bool) -> None:
    assert basin(valley(*losses), reference=1.0, tolerance=0.05).open_ended == open_ended


def test_a_basin_beside_a_missing_point_may_go_on_but_not_beside_a_diverged_one() -> None:
    missing = grid({1.0: [9.0], 10.0: [1.0], 100.0: [], 1000.0: [9.0]})
    diverged = grid({1.0: [9.0], 10.0: [1.0], 100.0: [None], 1000.0: [9.0]})
    assert basin(missing, reference=1.0, tolerance=0.05).open_ended
    assert not basin(diverged, reference=1.0, tolerance=0.05).open_ended


@given(losses=st.lists(st.none() | LOSSES, min_size=1, max_size=8), tolerance=st.sampled_from(TOLERANCES))
def test_the_width_is_what_a_fine_grid_measures(losses: list[float | None], tolerance: float) -> None:
    """The share of many small steps whose loss is within the threshold; off by at most a step at each end."""
    known = [loss for loss in losses if loss is not None]
    assume(known)
    per_decade = 5_000
    threshold, measured = min(known) * (1 + tolerance), 0.0
    for left, right in pairwise(losses):
        if left is not None and right is not None:
            line = left + (right - left) * (np.arange(per_decade) + 0.5) / per_decade
            measured += float(np.mean(line <= threshold))
    assert width(valley(*losses), min(known), tolerance) == pytest.approx(measured, abs=2 * len(losses) / per_decade)


@given(losses=st.lists(LOSSES, min_size=2, max_size=8), scale=st.floats(0.01, 100))
def test_units_of_loss_and_of_the_rate_do_not_matter_and_more_tolerance_is_wider(
    losses: list[float], scale: float
) -> None:
    points = valley(*losses)
    moved = grid({scale * 10.0**i: [loss] for i, loss in enumerate(losses)})
    widths = [width(points, min(losses), tolerance) for tolerance in TOLERANCES]
    assert widths == sorted(widths)
    assert [width(moved, min(losses), tolerance) for tolerance in TOLERANCES] == pytest.approx(widths, abs=1e-9)


@pytest.mark.parametrize("bad", [0.0, -1.0])
def test_losses_that_per_cent_mean_nothing_of_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match=rf"A basin needs losses above 0, got {bad:g}"):
        basin(valley(1.0, bad), reference=1.0, tolerance=0.05)
    with pytest.raises(ValueError, match=rf"A basin needs losses above 0, got {bad:g}"):
        basin(valley(1.0), reference=bad, tolerance=0.05)


def test_a_negative_tolerance_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tolerance must be at least 0, got -0\.1\."):
        basin(valley(1.0), reference=1.0, tolerance=-0.1)


def test_the_best_point_and_whether_it_is_an_end() -> None:
    inside, tie, edge = (best(own, by=own) for own in (valley(3, 1, 2), valley(2, 1, 1, 2), valley(None, 2, 1)))
    assert inside is not None
    assert (inside.lr, inside.loss.mean, inside.at_edge) == (10.0, 1.0, False)
    assert tie is not None
    assert tie.lr == 10.0
    assert edge is not None
    assert (edge.lr, edge.at_edge) == (100.0, True)
    assert best(valley(None, None), by=valley(None, None)) is None


def test_what_is_chosen_by_is_not_what_is_reported() -> None:
    found = best(valley(3, 1, 2), by=valley(3, 2, 1))
    assert found is not None
    assert found.loss.mean == 2


@given(losses=st.lists(LOSSES, min_size=1, max_size=7))
def test_the_expected_best_is_the_mean_over_all_draws(losses: list[float]) -> None:
    brute = [fmean(map(min, combinations(losses, k))) for k in range(1, len(losses) + 1)]
    assert expected_best(losses) == pytest.approx(brute, rel=1e-9)


def test_the_expected_best_goes_from_the_mean_to_the_minimum() -> None:
    found = expected_best([5.0, 1.0, 3.0])
    assert found == pytest.approx((3.0, (1 + 1 + 3) / 3, 1.0))
    assert expected_best([]) == ()
    assert expected_best([2.0] * 1000)[499] == pytest.approx(2.0)  # binomials far above all floats


def test_rates_with_the_same_curves_changed_nothing() -> None:
    curves = {0.1: {0: [2.0, 1.0], 1: [2.0, 1.5]}, 0.01: {0: [2.0, 1.0], 1: [2.0, 1.5]}, 1.0: {0: [2.0, 1.1]}}
    assert unchanged(curves) == ((0.01, 0.1),)


@pytest.mark.parametrize(
    "other",
    [{0: [2.0, 1.0], 1: [2.0, 1.4]}, {0: [2.0, math.nextafter(1.0, 2)]}, {2: [2.0, 1.0]}, {}],
    ids=["one seed differs", "last bit", "no shared seed", "no run"],
)
def test_rates_that_differ_in_anything_did_something(other: dict[int, list[float]]) -> None:
    assert unchanged({0.1: {0: [2.0, 1.0], 1: [2.0, 1.5]}, 1.0: other}) == ()
