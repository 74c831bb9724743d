import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steepest.batch_size.curve_crossing import first_crossing, first_crossings
from steepest.batch_size.curve_fit import Point
from tests.cases import cases


@given(
    rate=st.floats(1e-3, 0.1),
    every=st.integers(1, 50),
    target=st.floats(0.2, 0.9),
)
def test_a_decaying_loss_is_crossed_where_it_is(rate, every, target):
    """exp(-rate · step) is a straight line in log loss, so that nothing is lost between evaluations."""
    steps = list(range(0, int(10 / rate) + every, every))
    found = first_crossing(steps, [math.exp(-rate * step) for step in steps], target)
    assert found.status == "reached"
    assert found.steps == pytest.approx(-math.log(target) / rate, rel=1e-9)
    assert found.resolution == pytest.approx(every / found.steps)


def test_several_targets_at_once():
    steps, losses = [0, 10, 20, 30], [4.0, 2.0, 1.0, 0.9]
    found = first_crossings(steps, losses, [2.0, 1.0, 0.5, 5.0])
    assert [one.steps for one in found] == [10, 20, 30, 0]
    assert [one.status for one in found] == ["reached", "reached", "stopped", "at the start"]
    assert [one.target for one in found] == [2.0, 1.0, 0.5, 5.0]


def test_the_first_crossing_counts_even_if_the_loss_comes_back():
    assert first_crossing([0, 10, 20, 30], [4.0, 1.0, 3.0, 1.0], 2.0).steps == 5


def test_a_median_passes_over_a_single_lucky_evaluation():
    steps, losses = list(range(7)), [4.0, 3.9, 1.0, 3.8, 3.7, 1.5, 1.0]
    assert first_crossing(steps, losses, 2.0).steps < 2
    assert 4 < first_crossing(steps, losses, 2.0, window=3).steps <= 5


@pytest.mark.parametrize("gone", [None, math.inf, math.nan])
def test_losses_that_are_not_finite_are_above_every_target(gone):
    assert first_crossing([0, 10, 20], [4.0, gone, 1.0], 2.0).steps == 20
    lost = first_crossing([0, 10, 20], [4.0, 3.0, gone], 2.0)
    assert (lost.status, lost.steps) == ("diverged", 20)
    assert lost.point(8, 1) == Point(8, 1, 20.0, censored=True)


def test_points():
    assert first_crossing([0, 10], [4.0, 1.0], 2.0).point(32, 3) == Point(32, 3, 5.0)
    assert first_crossing([0, 10], [4.0, 3.0], 2.0).point(32, 3) == Point(32, 3, 10.0, censored=True)
    with pytest.raises(
        ValueError, match=r"batch size 32 and seed 3 is below the target 5 at its first .* lower target"
    ):
        first_crossing([0, 10], [4.0, 3.0], 5.0).point(32, 3)


def test_evaluations_too_far_apart_say_so():
    fine = np.arange(0, 101)
    assert not first_crossing(fine.tolist(), np.exp(-fine / 50).tolist(), 0.25).coarse
    assert first_crossing(fine[::10].tolist(), np.exp(-fine[::10] / 50).tolist(), 0.25).coarse


@cases(
    "steps, losses, target, window, message",
    [
        ([], [], 1.0, 1, "as many losses as steps and at least one, got 0 steps"),
        ([0, 1], [1.0], 1.0, 1, "got 2 steps and 1 losses"),
        ([0, 0], [1.0, 1.0], 1.0, 1, "must increase"),
        ([0, 1], [1.0, 1.0], 1.0, 2, "window must be an odd number of evaluations, got 2"),
        ([0, 1], [1.0, 0.0], 1.0, 1, "Losses must be above zero, as crossings are interpolated in log loss; got 0"),
        ([0, 1], [1.0, 0.5], -1.0, 1, "Targets must be above zero"),
    ],
)
def test_curves_that_are_none(steps, losses, target, window, message):
    with pytest.raises(ValueError, match=message):
        first_crossing(steps, losses, target, window=window)


def test_the_start_is_judged_by_itself_whatever_the_window():
    crossing = first_crossing([0, 100, 200, 300, 400], [4, 0.9, 0.8, 0.7, 0.6], 1.0, window=5)
    assert crossing.status == "reached"
    assert 0 < crossing.steps <= 100
