import dataclasses
import itertools
import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from steepest.lab.bench.machine import (
    CALLS,
    CHAINS,
    PASS_BYTES,
    REPETITIONS,
    SIDES,
    TRANSPOSED_BYTES,
    Machine,
    calibrate,
    rate_at,
    typical,
)
from steepest.linalg.polar import polars

PASSES = ((2**10, 100e9), (2**20, 10e9))
MACHINE = Machine(((64, 50e9), (256, 200e9)), PASSES, PASSES, PASSES, 1e-6)


class Calls(TorchDispatchMode):
    """Counts calls."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += 1
        return function(*args, **(kwargs or {}))


def test_rates_are_those_measured_and_a_power_law_between():
    assert [rate_at(MACHINE.products, side) for side in (64, 128, 256)] == pytest.approx([50e9, 100e9, 200e9])
    assert [rate_at(PASSES, 2**power) for power in (10, 15, 20)] == pytest.approx([100e9, 1e10 * 10**0.5, 10e9])


def test_rates_stay_those_at_the_ends_beyond_them():
    assert (rate_at(MACHINE.products, 1), rate_at(MACHINE.products, 10**6)) == (50e9, 200e9)
    assert (rate_at(PASSES, 1), rate_at(PASSES, 2**40)) == (100e9, 10e9)


@pytest.mark.slow
def test_calibration_with_a_clock_that_ticks_knows_what_was_done_in_a_tick():
    ticks = itertools.count()
    machine = calibrate(clock=lambda: float(next(ticks)))
    assert [side for side, _ in machine.products] == list(SIDES)
    assert all(2**26 < rate < 2**35 for _, rate in machine.products)
    assert machine.passes == machine.fresh == tuple((size, 3.0 * size) for size in PASS_BYTES)
    assert machine.transposed == tuple((size, 4.0 * size) for size in TRANSPOSED_BYTES)
    assert machine.seconds_per_call == 1 / (CHAINS * CALLS)
    assert next(ticks) == 2 * REPETITIONS * (len(SIDES) + 2 * len(PASS_BYTES) + len(TRANSPOSED_BYTES) + 1)


def test_calls_are_as_many_as_they_are_taken_for():
    for _ in range(2):  # the first asks once and for all what the processor can do
        with Calls() as counted:
            polars([torch.ones(1, 4, 4)], coefficients="nonic", times=[-1.0])
    assert counted.calls == pytest.approx(CALLS, rel=0.1)


def test_the_typical_machine_is_the_median_of_each_number():
    fast = Machine(((64, 90e9), (256, 90e9)), ((2**10, 1e9), (2**20, 2e9)), PASSES, PASSES, 3e-6)
    lucky = dataclasses.replace(MACHINE, products=((64, 9e12), (256, 9e12)))
    assert typical([fast, lucky, MACHINE]) == dataclasses.replace(MACHINE, products=((64, 90e9), (256, 200e9)))
    assert typical([MACHINE]) == MACHINE


@pytest.mark.slow
def test_calibration_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    calibrate(clock=iter(range(10**6)).__next__)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"products": ((8, 0.0),)}, "finite positive numbers"),
        ({"passes": ((8, float("nan")),)}, "finite positive numbers"),
        ({"seconds_per_call": float("inf")}, "finite positive numbers"),
        ({"transposed": ((8, -1.0),)}, "finite positive numbers"),
        ({"products": ()}, "products=((size, rate), ...) of increasing sizes, got ()."),
        ({"passes": ((8, 1.0), (4, 1.0))}, "passes=((size, rate), ...) of increasing sizes, got ((8, 1.0), (4, 1.0))."),
    ],
)
def test_numbers_that_no_machine_has_are_refused(changed, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        dataclasses.replace(MACHINE, **changed)
