import numpy as np
import pytest

from steepest.batch_size.curve_fit import fit
from steepest.batch_size.curve_time import linear_step_time, time_optimal
from tests.batch_size.curves import OCTAVES, runs


@pytest.mark.parametrize(("fixed", "each"), [(0.5, 0.001), (0.1, 0.001), (1.0, 0.0005)])
def test_hyperbola_and_linear_steps_have_a_closed_form(fixed, each):
    """(1 + B / b)(τ0 + τ1 b) is least at √(B τ0 / τ1)."""
    found = time_optimal(fit(runs("H"), "H"), linear_step_time(seconds_fixed=fixed, seconds_per_example=each))
    best = np.sqrt(130 * fixed / each)
    assert found.kind == "point"
    assert found.batch_size == pytest.approx(best, rel=2e-3)
    assert found.seconds == pytest.approx(1000 * (1 + 130 / best) * (fixed + each * best), rel=1e-4)


def test_steps_that_cost_by_the_example_are_samples():
    """Then time is b K(b): b* of the curve, and the edge for the hyperbola."""
    timed = linear_step_time(seconds_fixed=0.0, seconds_per_example=0.01)
    assert time_optimal(fit(runs("U"), "U"), timed).batch_size == pytest.approx(52, rel=2e-3)
    edge = time_optimal(fit(runs("H"), "H"), timed)
    assert (edge.kind, edge.batch_size) == ("at most", pytest.approx(16))


def test_steps_that_cost_the_same_take_the_largest_batch():
    found = time_optimal(fit(runs("H"), "H"), linear_step_time(seconds_fixed=1.0, seconds_per_example=0.0))
    assert (found.kind, found.batch_size) == ("at least", pytest.approx(2048))


def test_measured_times_are_joined_by_lines_and_not_extended():
    curve = fit(runs("H"), "H")
    measured = {b: 0.5 + 0.001 * b for b in OCTAVES}
    linear = time_optimal(curve, linear_step_time(seconds_fixed=0.5, seconds_per_example=0.001))
    assert time_optimal(curve, measured).batch_size == pytest.approx(linear.batch_size, rel=1e-9)
    short = time_optimal(curve, {b: seconds for b, seconds in measured.items() if b <= 128})
    assert (short.kind, short.batch_size) == ("at least", pytest.approx(128))


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ({64: 1.0}, "take two or more batch sizes"),
        ({64: 1.0, 128: 0.0}, "with finite seconds above 0"),
        ({1: 1.0, 2: 2.0}, r"do not overlap: the latter are 16 to 2048\. Time steps in that range"),
    ],
)
def test_times_that_are_none(times, message):
    with pytest.raises(ValueError, match=message):
        time_optimal(fit(runs("H"), "H"), times)


@pytest.mark.parametrize(("fixed", "each"), [(0.0, 0.0), (-1.0, 1.0), (np.inf, 1.0)])
def test_linear_times_that_are_none(fixed, each):
    with pytest.raises(ValueError, match=r"must be finite, not negative and not both 0"):
        linear_step_time(seconds_fixed=fixed, seconds_per_example=each)
