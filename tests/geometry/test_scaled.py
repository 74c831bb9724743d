"""A scaled norm is a norm, and longer steps by its factor."""

import math

import pytest
import torch

from steepest import AdaInf, ColNorm, Frobenius, Scaled, Sign, Spectral
from tests.cases import cases

NORMS = [
    (Scaled(ColNorm(), "sqrt_fan_out"), lambda m, n: math.sqrt(m)),
    (Scaled(Sign(), "inverse_fan_in"), lambda m, n: 1 / n),
    (Scaled(Frobenius(), "sqrt_size"), lambda m, n: math.sqrt(m * n)),
    (Scaled(Spectral(polar="svd"), 3), lambda m, n: 3),
    (Scaled(AdaInf(), 0.5), lambda m, n: 0.5),
]


@cases("norm, factor", NORMS)
@cases("shape", [(3, 5), (2, 4, 3), (1, 7)])
def test_contract(norm, factor, shape, rng):
    m = torch.randn(shape, generator=rng, dtype=torch.float64)
    v = m.square() + 0.3 if norm.adapts else None
    direction, dual = norm.lmo(m, v), norm.dual(m, v)
    torch.testing.assert_close(-(m * direction).sum((-2, -1)), dual, rtol=1e-12, atol=0)
    torch.testing.assert_close(norm.primal(direction, m, v), torch.ones_like(dual), rtol=1e-12, atol=0)
    torch.testing.assert_close(direction, factor(*shape[-2:]) * norm.norm.lmo(m, v))


def test_the_norms_between_root_mean_squares_keep_a_root_mean_square_of_one(rng):
    m = torch.randn(6, 10, generator=rng, dtype=torch.float64)
    columns = Scaled(ColNorm(), "sqrt_fan_out").lmo(m)  # the output for a one-hot input
    torch.testing.assert_close(columns.square().mean(0), torch.ones(10, dtype=torch.float64))
    x = torch.ones(10, dtype=torch.float64)
    assert (Scaled(Sign(), "inverse_fan_in").lmo(m) @ x).abs().max() <= 1
    vector = Scaled(Frobenius(), "sqrt_size").lmo(m[:1])
    torch.testing.assert_close(vector.square().mean(), torch.ones((), dtype=torch.float64))


def test_rules_of_a_linear_map_need_one():
    assert Scaled(Sign(), "inverse_fan_in").matrix
    assert not Scaled(Sign(), 2.0).matrix
    assert Scaled(Spectral(), 2.0).matrix
    assert str(Scaled(Sign(), "inverse_fan_in")) == "sign × inverse_fan_in"
    assert str(Scaled(Sign(), 2)) == "sign × 2"


@pytest.mark.parametrize("by", [0, -1.0, math.inf, math.nan])
def test_a_factor_is_a_finite_number_above_zero(by):
    with pytest.raises(ValueError, match="Scaled: by must be finite and above 0, got "):
        Scaled(Sign(), by)


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="Unknown rule 'sqrt_fanout': did you mean 'sqrt_fan_out'"):
        Scaled(Sign(), "sqrt_fanout")
