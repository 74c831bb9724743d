import pytest

from steepest.lab.schedule import cooldown


@pytest.mark.parametrize("steps", [1, 2, 10, 150, 999])
def test_constant_then_linear_to_zero(steps):
    factors = [cooldown(step, steps=steps) for step in range(steps + 1)]
    assert factors[0] == 1
    assert factors[-1] == 0
    assert all(factor > 0 for factor in factors[:-1])
    for step, factor in enumerate(factors):
        expected = 1 if step <= 0.3 * steps else (steps - step) / (0.7 * steps)
        assert factor == pytest.approx(expected, abs=1e-12)
