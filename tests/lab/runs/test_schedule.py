from itertools import pairwise

import pytest

from steepest.lab.runs.schedule import SCHEDULES, cooldown, evaluates, rate_factor, reached
from tests.cases import cases


@cases("steps", [1, 2, 10, 150, 999])
def test_constant_then_linear_to_zero(steps):
    factors = [cooldown(step, steps=steps) for step in range(steps + 1)]
    assert factors[0] == 1
    assert factors[-1] == 0
    assert all(factor > 0 for factor in factors[:-1])
    for step, factor in enumerate(factors):
        expected = 1 if step <= 0.3 * steps else (steps - step) / (0.7 * steps)
        assert factor == pytest.approx(expected, abs=1e-12)


def test_a_constant_rate_is_constant():
    assert {rate_factor(step, steps=10, schedule="constant") for step in range(10)} == {1.0}
    assert rate_factor(9, steps=10, schedule="cooldown") == cooldown(9, steps=10)


def test_published_schedules_are_those_of_their_scripts():
    short = [rate_factor(step, steps=6200, schedule="late-cooldown") for step in range(6200)]
    assert short == pytest.approx([1.0 if step < 4400 else (6200 - step) / 1800 for step in range(6200)], abs=1e-12)
    medium = [rate_factor(step, steps=1695, schedule="cooldown-to-tenth") for step in range(1695)]
    falling = [(1 - step / 1695) / 0.45 for step in range(1695)]
    expected = [1.0 if step / 1695 < 0.55 else w + (1 - w) * 0.1 for step, w in enumerate(falling)]
    assert medium == pytest.approx(expected, abs=1e-12)
    both = [rate_factor(step, steps=200, schedule="warmup-cooldown") for step in range(200)]
    assert both[:11] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.0])
    assert both[10:101] == [1.0] * 91
    assert both[101:] == pytest.approx([(200 - step) / 100 for step in range(101, 200)])


@cases("schedule", SCHEDULES)
def test_every_step_has_a_rate_above_zero_and_at_most_one(schedule):
    for steps in (1, 2, 10, 6200):
        assert all(0 < rate_factor(step, steps=steps, schedule=schedule) <= 1 for step in range(steps))


@pytest.mark.parametrize("spacing", [0.02, 0.2])
def test_evaluations_of_a_run_to_a_target_are_never_further_apart_than_asked(spacing):
    steps = [step for step in range(1, 5000) if evaluates(step, every=1, spacing=spacing)]
    gaps = [(after - before, after) for before, after in pairwise(steps)]
    assert all(gap == 1 or gap <= spacing * after for gap, after in gaps)
    assert all(gap > 0.45 * spacing * after for gap, after in gaps if gap > 1)
    assert [step for step in range(1, 40) if evaluates(step, every=10, spacing=None)] == [10, 20, 30]


def test_a_target_is_reached_when_the_middle_of_five_evaluations_is_not_above_it():
    assert reached([3.0, 0.9, 0.9, 3.0, 0.9], 1.0)
    assert reached([3.0, 0.9, 0.9, 3.0, 1.0], 1.0)
    assert not reached([3.0, 0.9, 0.9, 3.0, 1.1], 1.0)
    assert not reached([0.9] * 4, 1.0)
    assert not reached([0.9] * 5, None)
