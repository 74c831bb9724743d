import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steepest.linalg.inverse_polynomial import PLANS, SLACK, InversePlan, _iterate, polynomial_inverse
from steepest.linalg.spd import damped_inverse
from tests.cases import cases

every_plan = cases("plan", PLANS)


def budget(plan, dtype):
    """What rounding may add to a plan's residual; 0.0042 / smallest is the most that was seen in bfloat16."""
    return 0.005 / plan.smallest if dtype == torch.bfloat16 else 1e-3


def rotated(spectrum, rng):
    """Symmetric matrices (B, n, n) with the given eigenvalues (B, n), float64."""
    vectors, _ = torch.linalg.qr(torch.randn(*spectrum.shape, spectrum.size(-1), generator=rng, dtype=torch.float64))
    product = (vectors * spectrum.unsqueeze(-2)) @ vectors.mT
    return (product + product.mT) / 2


def spectra(smallest, n):
    """Eigenvalues that fill [smallest, 1]: evenly, by decades, all at the lower end, all at the upper one."""
    even = torch.linspace(smallest, 1, n, dtype=torch.float64)
    last = torch.arange(n) == n - 1
    low, high = torch.where(last, 1.0, smallest), torch.where(last, smallest, 1.0)
    return torch.stack([even, smallest ** (1 - even), low.double(), high.double()])


def damped(moment, ridge):
    return moment.double() + ridge.double()[:, None, None] * torch.eye(moment.size(-1), dtype=torch.float64)


def residuals(moment, ridge, inverse):
    """‖I - (K + γ I) X‖₂ of each matrix, in float64."""
    eye = torch.eye(moment.size(-1), dtype=torch.float64)
    return torch.linalg.matrix_norm(eye - damped(moment, ridge) @ inverse.double(), ord=2)


def ridge_for(moment, share):
    """γ that is just above the given share of the bound on the largest eigenvalue of K + γ I."""
    rows = moment.abs().sum(-1).amax(-1)
    bound = torch.minimum(torch.linalg.matrix_norm(moment), rows)
    return share * bound / (1 - share)


@pytest.mark.parametrize(
    ("plan", "largest"),
    [(PLANS[0], 0.007458), (PLANS[1], 0.007118), (PLANS[2], 0.046094)],
    ids=["0.025", "0.012", "0.006"],
)
def test_each_plan_leaves_what_is_stated_but_for_its_thousandth(plan, largest):
    grid = torch.linspace(plan.smallest, 1, 2_000_001, dtype=torch.float64)
    left = plan(grid)
    assert left.abs().max() <= plan.residual
    assert left.abs().max().item() == pytest.approx(largest, abs=1e-6)
    assert plan.residual - left.abs().max() == pytest.approx(1e-3, abs=6e-5)
    assert ((1 - left) / grid > 0.9).all()  # X(x), the eigenvalues of the inverse
    first = InversePlan(plan.smallest, 0.99, plan.steps[:1])(grid)
    assert first.max().item() == pytest.approx(-first.min().item(), abs=1e-6)  # as of every best polynomial
    assert left.max() > 0.9 * plan.residual - 1e-3  # the error takes its extreme with both signs
    assert left.min() < -0.9 * plan.residual + 1e-3


@every_plan
@cases("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_spectra_that_fill_the_interval_are_inverted(plan, dtype, rng):
    """The recursion by itself, where alpha plays no part."""
    scaled = rotated(spectra(plan.smallest, 96), rng)
    inverse, inverted = _iterate(scaled.to(dtype), plan)
    assert inverted.all()
    assert inverse.dtype == dtype
    assert torch.equal(inverse, inverse.mT)
    assert (residuals(scaled, torch.zeros(4), inverse) <= plan.residual + budget(plan, dtype)).all()
    assert (torch.linalg.eigvalsh(inverse.double()) > 0.5).all()


@every_plan
def test_the_recursion_is_its_scalar_map_on_the_eigenvalues(plan, rng):
    spectrum = spectra(plan.smallest, 16)
    vectors, _ = torch.linalg.qr(torch.randn(4, 16, 16, generator=rng, dtype=torch.float64))
    inverse, _ = _iterate((vectors * spectrum.unsqueeze(-2)) @ vectors.mT, plan)
    expected = (vectors * ((1 - plan(spectrum)) / spectrum).unsqueeze(-2)) @ vectors.mT
    torch.testing.assert_close(inverse, expected, rtol=0, atol=1e-9)


@every_plan
@cases("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_at_the_smallest_ridge_of_a_plan_the_inverse_is_as_close_as_it_says(plan, dtype, rng):
    wide = torch.promote_types(dtype, torch.float32)
    spectrum = torch.logspace(-9, -0.5, 64, dtype=torch.float64).repeat(3, 1)
    spectrum[0, -1], spectrum[1, :-1], spectrum[2, :32] = 1, 0, 0
    moment = (rotated(spectrum, rng) * torch.tensor([1e-6, 1, 1e6], dtype=torch.float64)[:, None, None]).to(wide)
    ridge = ridge_for(moment, plan.smallest * (1 + 2 * SLACK * torch.finfo(dtype).eps))
    power, ok, raised = polynomial_inverse(moment, ridge, plan=plan, dtype=dtype)
    assert ok.all()
    assert not raised.any()
    assert power.dtype == wide
    if dtype == torch.bfloat16:
        exact = polynomial_inverse(moment, ridge, plan=plan).power
        assert (residuals(moment, ridge, power) > 2 * residuals(moment, ridge, exact)).any()
    assert torch.equal(power, power.mT)
    assert (residuals(moment, ridge, power) <= plan.residual + budget(plan, dtype)).all()
    assert (torch.linalg.eigvalsh(power.double()) > 0).all()
    power, ok, _ = polynomial_inverse(moment, ridge * (1 - 4 * SLACK * torch.finfo(dtype).eps), plan=plan, dtype=dtype)
    assert not ok.any()
    assert not power.any()


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(1, 24),
    samples=st.integers(1, 40),
    ridge=st.floats(0.03, 100),
    decades=st.integers(-12, 12),
    seed=st.integers(0, 10**6),
)
def test_any_second_moment_is_inverted_within_its_plan_or_marked(n, samples, ridge, decades, seed):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(3, n, samples, generator=generator) * torch.logspace(-2, 0, n)[:, None] * 10 ** (decades / 2)
    moment = z @ z.mT / samples
    ridges = ridge * moment.diagonal(dim1=-2, dim2=-1).mean(-1)
    power, ok, _ = polynomial_inverse(moment, ridges)
    shares = ridges / (ridges + torch.minimum(torch.linalg.matrix_norm(moment), moment.abs().sum(-1).amax(-1)))
    assert (ok | (shares < PLANS[-1].smallest * (1 + 1e-5))).all()
    loosest = max(plan.residual for plan in PLANS)
    assert (residuals(moment, ridges, power)[ok] <= loosest + 1e-3).all()
    assert (torch.linalg.eigvalsh(power[ok].double()) > 0).all()


def test_the_cheapest_certified_plan_is_taken(rng):
    moment = rotated(torch.logspace(-6, 0, 32, dtype=torch.float64).repeat(5, 1), rng)
    shares = torch.tensor([0.5, 0.026, 0.013, 0.0061, 0.0059], dtype=torch.float64)
    ridge = ridge_for(moment, shares)
    together = polynomial_inverse(moment, ridge)
    assert together.ok.tolist() == [True, True, True, True, False]
    for index, plan in enumerate((PLANS[0], *PLANS)):
        alone = polynomial_inverse(moment[index : index + 1], ridge[index : index + 1], plan=plan)
        torch.testing.assert_close(alone.power[0], together.power[index], rtol=1e-10, atol=1e-10)
        others = [other for other in PLANS if other is not plan and other.smallest <= shares[index]]
        for other in others:  # so that the comparison above can fail
            different = polynomial_inverse(moment[index : index + 1], ridge[index : index + 1], plan=other)
            assert (different.power[0] - together.power[index]).abs().max() > 1e-4
    assert polynomial_inverse(moment[:0], ridge[:0]).power.shape == (0, 32, 32)


def test_it_comes_close_to_cholesky_and_to_the_exact_inverse_of_a_multiple_of_the_identity(rng):
    z = torch.randn(2, 24, 200, generator=rng)
    moment, ridge = z @ z.mT / 200, torch.full((2,), 0.2)
    exact, power = damped_inverse(moment, ridge).power, polynomial_inverse(moment, ridge).power
    largest = torch.linalg.matrix_norm(exact, ord=2)
    assert (torch.linalg.matrix_norm(power - exact, ord=2) <= 0.0095 * largest).all()
    identity = 3 * torch.eye(5).unsqueeze(0)
    power, ok, _ = polynomial_inverse(identity, torch.tensor([0.6]))
    assert ok.all()
    torch.testing.assert_close(power, torch.eye(5).unsqueeze(0) / 3.6, rtol=0.0085, atol=1e-6)
    wide = 3 * torch.eye(64).unsqueeze(0)  # its Frobenius norm is eight times its largest row sum
    power, ok, _ = polynomial_inverse(wide, torch.tensor([0.09]))
    torch.testing.assert_close(power, torch.eye(64).unsqueeze(0) / 3.09, rtol=0.0085, atol=1e-6)
    assert ok.all()
    power, ok, _ = polynomial_inverse(torch.zeros(1, 5, 5), torch.tensor([0.6]))
    torch.testing.assert_close(power, torch.eye(5).unsqueeze(0) / 0.6, rtol=0.0085, atol=1e-6)
    assert ok.all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_what_cannot_be_inverted_is_marked_and_its_neighbours_keep_every_bit(dtype, rng):
    z = torch.randn(9, 8, 64, generator=rng)
    moment, ridge = z @ z.mT / 64, torch.full((9,), 0.3)
    expected = polynomial_inverse(moment, ridge, dtype=dtype)
    assert expected.ok.all()
    moment[1, 2, 2], moment[2, 0, 1] = torch.nan, torch.inf
    moment[3, 5, 5] = -0.8  # so that K + γ I is indefinite, though not by much
    moment[4], ridge[4] = 0, 0
    moment[5] *= 1e38
    ridge[6], ridge[7], ridge[8] = -0.3, torch.nan, 0
    power, ok, raised = polynomial_inverse(moment, ridge, dtype=dtype)
    assert ok.tolist() == [True] + 8 * [False]
    assert torch.equal(power[0], expected.power[0])
    assert not raised.any()


@every_plan
def test_no_negative_eigenvalue_passes_for_an_inverted_one(plan, rng):
    negative = -torch.logspace(-4, 0, 40, dtype=torch.float64)
    assert (plan(negative) > 1).all()
    spectrum = torch.linspace(plan.smallest, 1, 16, dtype=torch.float64).repeat(40, 1)
    spectrum[:, 0] = negative
    _, inverted = _iterate(rotated(spectrum, rng).float(), plan)
    assert not inverted.any()


@cases(
    "arguments, message",
    [
        ((0.01, 0.0085, PLANS[0].steps), "smallest=0.01, residual=0.0085, and steps that leave 0.2659"),
        ((0.0, 0.5, PLANS[0].steps), "takes smallest in (0, 1)"),
        ((0.5, 1.5, ((1.0, 1.0, 0.0),)), "a residual below 1 that its steps keep on [smallest, 1]"),
        ((0.5, 0.5, ((torch.nan, 1.0, 0.0),)), "steps that leave nan. Raise smallest or residual, or add steps."),
        ((0.5, 0.4, ((1.0, 1.0, -1.0),)), "invert some negative eigenvalues as if they were positive: ((1.0, 1.0, -1"),
    ],
)
def test_a_plan_that_does_not_do_what_it_says_is_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        InversePlan(*arguments)


def test_a_plan_of_ones_own_is_taken(rng):
    squaring = InversePlan(0.1, 0.9**8 + 1e-6, ((1.0, 1.0, 0.0),) * 3)  # R <- R²
    moment, ridge = rotated(torch.logspace(-3, 0, 12, dtype=torch.float64).unsqueeze(0), rng), torch.tensor([0.5])
    power, ok, _ = polynomial_inverse(moment, ridge.double(), plan=squaring)
    assert ok.all()
    assert residuals(moment, ridge, power) <= squaring.residual
