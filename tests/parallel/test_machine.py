import itertools
import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from steepest.parallel import Machine, calibrate, typical
from steepest.parallel.machine import CALLS, CHAINS, PASS_BYTES, REPETITIONS, SIDES

MACHINE = Machine(((64, 50e9), (256, 200e9)), ((2**10, 100e9), (2**20, 10e9)), 1e-6)


class Calls(TorchDispatchMode):
    """Counts calls on tensors of a few entries, as the last measurement of a calibration makes them."""

    def __init__(self):
        super().__init__()
        self.tiny = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.tiny += isinstance(result, torch.Tensor) and result.numel() in (1, 16) and "lift" not in function.name()
        return result


def test_rates_are_those_measured_and_a_power_law_between():
    assert [MACHINE.flops_per_s(side) for side in (64, 128, 256)] == pytest.approx([50e9, 100e9, 200e9])
    assert [MACHINE.bytes_per_s(2**power) for power in (10, 15, 20)] == pytest.approx([100e9, 1e10 * 10**0.5, 10e9])


def test_rates_stay_those_at_the_ends_beyond_them():
    assert (MACHINE.flops_per_s(1), MACHINE.flops_per_s(10**6)) == (50e9, 200e9)
    assert (MACHINE.bytes_per_s(1), MACHINE.bytes_per_s(2**40)) == (100e9, 10e9)


def test_calibration_with_a_clock_that_ticks_knows_what_was_done_in_a_tick():
    ticks = itertools.count()
    machine = calibrate(clock=lambda: float(next(ticks)))
    assert [side for side, _ in machine.products] == list(SIDES)
    assert all(2**25 < rate <= 2**32 for _, rate in machine.products)
    assert machine.passes == tuple((size, 3.0 * size) for size in PASS_BYTES)
    assert machine.seconds_per_call == 1 / (CHAINS * CALLS)
    assert next(ticks) == 2 * REPETITIONS * (len(SIDES) + len(PASS_BYTES) + 1)


def test_calls_are_as_many_as_they_are_taken_for():
    with Calls() as calls:
        calibrate()
    assert calls.tiny == pytest.approx(CHAINS * CALLS * (REPETITIONS + 1), rel=0.01)


def test_the_typical_machine_is_the_median_of_each_number():
    fast = Machine(((64, 90e9), (256, 90e9)), ((2**10, 1e9), (2**20, 2e9)), 3e-6)
    lucky = Machine(((64, 9e12), (256, 9e12)), MACHINE.passes, 1e-6)
    assert typical([fast, lucky, MACHINE]) == Machine(((64, 90e9), (256, 200e9)), MACHINE.passes, 1e-6)
    assert typical([MACHINE]) == MACHINE


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
        ({"products": ()}, "products=((size, rate), ...) of increasing sizes, got ()."),
        ({"passes": ((8, 1.0), (4, 1.0))}, "passes=((size, rate), ...) of increasing sizes, got ((8, 1.0), (4, 1.0))."),
    ],
)
def test_numbers_that_no_machine_has_are_refused(changed, text):
    numbers = {"products": ((8, 1e9),), "passes": ((8, 1e9),), "seconds_per_call": 1e-6}
    with pytest.raises(ValueError, match=re.escape(text)):
        Machine(**{**numbers, **changed})
