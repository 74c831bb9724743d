import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steepest.linalg.spd import ATTEMPTS, KNOWN, damped_factor, damped_inverse, damped_power, diagonal_power, ridge_unit
from tests.cases import cases

DTYPES = [torch.float32, torch.float64]
UNITS = ["trace", "frobenius", "spectral"]
WAYS = {
    "inverse": damped_inverse,
    "factor": damped_factor,
    "root": lambda moment, ridge, **options: damped_power(moment, ridge, 0.5, **options),
}
every_way = cases("way", WAYS.values(), WAYS)
every_dtype = cases("dtype", DTYPES)


def second_moments(batch, n, samples, rng, dtype=torch.float64):
    """Moments of inputs whose features differ in size by a factor of 30, so by 1000 in the moment."""
    z = torch.randn(batch, n, samples, generator=rng, dtype=dtype) * torch.logspace(-1.5, 0, n, dtype=dtype)[:, None]
    return z @ z.mT / samples


def plus(moment, ridge):
    return moment.double() + ridge.double()[:, None, None] * torch.eye(moment.size(-1), dtype=torch.float64)


def oracle(moment, ridge, exponent):
    """V diag((λ + γ)^-p) Vᵀ in float64."""
    values, vectors = torch.linalg.eigh(plus(moment, ridge))
    return (vectors * (values**-exponent).unsqueeze(-2)) @ vectors.mT


def raised_ridge(moment, ridge, raised):
    """The ridge after so many rises: tenfold each, but at least twice what rounding hides."""
    least = 2 * KNOWN * torch.finfo(moment.dtype).eps * torch.linalg.matrix_norm(moment.double()).item()
    for _ in range(raised):
        ridge = max(10 * ridge, least)
    return ridge


def relative_error(actual, expected):
    """In the spectral norm, the largest of a batch."""
    difference = torch.linalg.matrix_norm(actual.double() - expected, ord=2)
    return (difference / torch.linalg.matrix_norm(expected, ord=2)).max()


def tolerance(dtype, condition=1e4):
    return 8 * condition * torch.finfo(dtype).eps


@every_dtype
@cases("n", [1, 2, 7, 33])
def test_the_inverse_is_the_inverse(n, dtype, rng):
    moment, ridge = second_moments(5, n, 2 * n, rng, dtype), torch.logspace(-3, 1, 5, dtype=dtype)
    power, ok, raised = damped_inverse(moment, ridge)
    assert relative_error(power, torch.linalg.inv(plus(moment, ridge))) < tolerance(dtype)
    assert torch.equal(power, power.mT)
    assert ok.all()
    assert not raised.any()
    assert power.dtype == dtype


@every_dtype
@cases("exponent", [-1, 0, 0.25, 0.5, 1, 1.37, 2])
def test_a_power_is_that_of_the_eigenvalues(exponent, dtype, rng):
    moment, ridge = second_moments(3, 12, 20, rng, dtype), torch.tensor([0.001, 0.1, 10], dtype=dtype)
    power, ok, raised = damped_power(moment, ridge, exponent)
    assert relative_error(power, oracle(moment, ridge, exponent)) < tolerance(dtype)
    assert torch.equal(power, power.mT)
    assert ok.all()
    assert not raised.any()


@settings(deadline=None, max_examples=30)
@given(a=st.floats(-1, 2), b=st.floats(-1, 2), seed=st.integers(0, 1000))
def test_exponents_add(a, b, seed):
    moment = second_moments(2, 6, 9, torch.Generator().manual_seed(seed))
    ridge = torch.tensor([0.05, 0.5], dtype=torch.float64)
    powers = [damped_power(moment, ridge, exponent).power for exponent in (a, b, a + b)]
    assert relative_error(powers[0] @ powers[1], powers[2]) < 1e-7


def test_two_roots_are_the_inverse_by_cholesky(rng):
    moment, ridge = second_moments(3, 10, 30, rng), torch.full((3,), 0.01, dtype=torch.float64)
    root = damped_power(moment, ridge, 0.5).power
    torch.testing.assert_close(root @ root, damped_inverse(moment, ridge).power, rtol=1e-9, atol=1e-9)


@every_dtype
def test_the_factor_is_lower_triangular_and_solves(dtype, rng):
    moment, ridge = second_moments(4, 9, 30, rng, dtype), torch.full((4,), 0.05, dtype=dtype)
    factor, ok, raised = damped_factor(moment, ridge)
    assert torch.equal(factor, factor.tril())
    assert (factor.diagonal(dim1=-2, dim2=-1) > 0).all()
    assert relative_error(factor.double() @ factor.double().mT, plus(moment, ridge)) < tolerance(dtype, condition=1)
    right = torch.randn(4, 9, 2, generator=rng, dtype=dtype)
    solved = torch.linalg.solve(plus(moment, ridge), right.double())
    assert relative_error(torch.cholesky_solve(right, factor), solved) < tolerance(dtype)
    assert ok.all()
    assert not raised.any()


@every_dtype
@cases("exponent", [-0.5, 0.5, 1, 2])
def test_a_diagonal_matrix_is_its_diagonal(exponent, dtype, rng):
    diagonal = torch.rand(3, 8, generator=rng, dtype=dtype)
    diagonal[0, 3] = 0
    ridge = torch.tensor([0.01, 0.1, 1], dtype=dtype)
    power, ok, raised = diagonal_power(diagonal, ridge, exponent)
    full = damped_power(torch.diag_embed(diagonal), ridge, exponent)
    torch.testing.assert_close(torch.diag_embed(power), full.power, rtol=1e-4, atol=1e-12)
    torch.testing.assert_close(
        power.double(), (diagonal.double() + ridge.double()[:, None]) ** -exponent, rtol=1e-6, atol=0
    )
    assert torch.equal(ok, full.ok)
    assert torch.equal(raised, full.raised)
    if exponent == 1:
        torch.testing.assert_close(torch.diag_embed(power), damped_inverse(torch.diag_embed(diagonal), ridge).power)


def test_a_diagonal_that_has_no_power_is_marked():
    nan, inf = torch.nan, torch.inf
    diagonal = torch.tensor([[1.0, 2], [1, nan], [1, inf], [1, -2], [1, 0], [1, 0], [1, 2], [1, 2], [1e-38, 1]])
    ridge = torch.tensor([0.5, 0.5, 0.5, 0.5, 0, 0.5, -0.5, nan, 0])
    power, ok, raised = diagonal_power(diagonal, ridge, 2)
    assert ok.tolist() == [True, False, False, False, False, True, False, False, False]
    torch.testing.assert_close(power[ok], torch.tensor([[1 / 1.5**2, 1 / 2.5**2], [1 / 1.5**2, 4]]))
    assert not raised.any()


@every_way
def test_rotating_the_inputs_rotates_the_result(way, rng):
    moment, ridge = second_moments(1, 8, 20, rng), torch.tensor([0.05], dtype=torch.float64)
    rotation, _ = torch.linalg.qr(torch.randn(8, 8, generator=rng, dtype=torch.float64))
    for other in (rotation, torch.eye(8, dtype=torch.float64)[torch.randperm(8, generator=rng)]):
        expected, actual = way(moment, ridge).power, way(other @ moment @ other.mT, ridge).power
        if way is damped_factor:  # a factor is only known up to a rotation from the right
            expected, actual = expected @ expected.mT, actual @ actual.mT
        torch.testing.assert_close(actual, other @ expected @ other.mT, rtol=1e-10, atol=1e-10)


@every_way
@cases("exponent_of_two", [-80, -20, 20, 80])
def test_the_units_of_the_moment_do_not_matter(way, exponent_of_two, rng):
    moment, ridge = second_moments(4, 6, 3, rng, torch.float32), torch.tensor([0.5, 1e-3, 1e-9, 0])
    expected, scaled = way(moment, ridge), way(moment * 2.0**exponent_of_two, ridge * 2.0**exponent_of_two)
    assert torch.equal(scaled.raised, expected.raised)
    assert expected.ok.all()
    assert scaled.ok.all()
    power = {damped_inverse: -1, damped_factor: 0.5}.get(way, -0.5)
    known = expected.raised == 0  # beyond the first digit, what stands on a ridge next to rounding is not
    assert known.tolist() == [True, True, False, False]
    rescaled = scaled.power / 2.0 ** (power * exponent_of_two)
    torch.testing.assert_close(rescaled[known], expected.power[known], rtol=1e-3, atol=1e-3)


@every_way
def test_a_batch_is_its_matrices_one_by_one(way, rng):
    moment, ridge = second_moments(6, 5, 3, rng), torch.tensor([1, 0.1, 0, 0, 1e-3, 1e-20], dtype=torch.float64)
    moment[3] -= 0.2 * torch.eye(5, dtype=torch.float64)
    together = way(moment, ridge)
    assert together.raised.tolist()[:2] == [0, 0]
    assert (together.raised[2:4] > 0).all()
    for index in range(6):
        alone = way(moment[index : index + 1], ridge[index : index + 1])
        torch.testing.assert_close(alone.power[0], together.power[index], rtol=1e-12, atol=0)
        assert alone.ok[0] == together.ok[index]
        assert alone.raised[0] == together.raised[index]


@every_way
def test_arguments_stay_as_they_were_and_no_matrices_are_none(way, rng):
    moment, ridge = second_moments(3, 4, 2, rng), torch.tensor([0, 0.1, torch.nan], dtype=torch.float64)
    moment[1, 0, 0] = -1
    before = moment.clone(), ridge.clone()
    way(moment, ridge)
    assert torch.equal(moment, before[0])
    torch.testing.assert_close(ridge, before[1], rtol=0, atol=0, equal_nan=True)
    assert [tuple(part.shape) for part in way(moment[:0], ridge[:0])] == [(0, 4, 4), (0,), (0,)]


BAD = {
    "nan": (lambda moment: moment[2, 1].fill_(torch.nan), 0.05),
    "infinity": (lambda moment: moment[2, 0, 3].fill_(torch.inf), 0.05),
    "overflow": (lambda moment: moment[2].copy_(3e38 * torch.eye(6)), 3e38),
    "hopeless": (lambda moment: moment[2].copy_(torch.diag(torch.tensor([1.0, -1e9, 1, 1, 1, 1]))), 0.05),
    "negative ridge": (lambda moment: moment, -0.05),
    "ridge that is no number": (lambda moment: moment, torch.nan),
}


@every_way
@cases("spoil, ridge", BAD.values(), BAD)
def test_a_bad_matrix_is_marked_and_its_neighbours_keep_every_bit(way, spoil, ridge, rng):
    moment, ridges = second_moments(4, 6, 12, rng, torch.float32), torch.full((4,), 0.05)
    expected = way(moment, ridges)
    spoil(moment)
    ridges[2] = ridge
    power, ok, raised = way(moment, ridges)
    others = torch.tensor([0, 1, 3])
    assert ok.tolist() == [True, True, False, True]
    assert torch.equal(power[others], expected.power[others])
    assert not raised[others].any()
    assert power[ok].isfinite().all()
    alone = way(moment[others], ridges[others])
    torch.testing.assert_close(alone.power, power[others], rtol=1e-6, atol=0)


@every_dtype
def test_a_ridge_grows_tenfold_until_it_is_large_enough(dtype):
    lowest = torch.tensor([0.5, -0.01, -0.1, -1, -30, -300])
    rotation, _ = torch.linalg.qr(torch.randn(4, 4, dtype=dtype))
    spectra = torch.stack([torch.tensor([float(low), 1, 2, 5]) for low in lowest]).to(dtype)
    moment = (rotation * spectra.unsqueeze(-2)) @ rotation.mT
    ridge = torch.full((6,), 0.02, dtype=dtype)
    expected = [0, 0, 1, 2, 4, 5]  # 0.02, 0.02, 0.2, 2, 200, 2000
    applied = torch.tensor([0.02 * 10**times for times in expected], dtype=dtype)
    for exponent, way in ((1, damped_inverse), (0.5, WAYS["root"])):
        power, ok, raised = way(moment, ridge)
        assert raised.tolist() == expected
        assert ok.all()
        assert relative_error(power, oracle(moment, applied, exponent)) < tolerance(dtype)
    factor, ok, raised = damped_factor(moment, ridge)
    assert raised.tolist() == expected
    assert ok.all()
    assert relative_error(factor.double() @ factor.double().mT, plus(moment, applied)) < tolerance(dtype)


@every_way
def test_no_more_ridges_are_tried_than_allowed(way):
    moment, ridge = torch.diag(torch.tensor([-30.0, 1, 2])).unsqueeze(0), torch.tensor([0.02])
    for attempts, ok, raised in ((1, False, 0), (2, False, 1), (4, False, 3), (5, True, 4), (ATTEMPTS, True, 4)):
        result = way(moment, ridge, attempts=attempts)
        assert (result.ok.item(), result.raised.item()) == (ok, raised)


@every_dtype
@every_way
def test_a_rank_deficient_moment_stays_below_what_its_ridge_allows(way, dtype, rng):
    moment = second_moments(3, 40, 10, rng, dtype)
    dead = torch.rand(40, generator=rng) < 0.3
    moment[:, dead], moment[:, :, dead] = 0, 0
    ridge = torch.tensor([0.2, 1e-2, 1e-3], dtype=dtype)
    power, ok, raised = way(moment, ridge)
    assert ok.all()
    assert not raised.any()
    largest = torch.linalg.matrix_norm(plus(moment, ridge), ord=2)
    bound = {damped_inverse: 1 / ridge, damped_factor: largest.sqrt()}.get(way, ridge**-0.5)
    assert (torch.linalg.matrix_norm(power.double(), ord=2) <= bound * (1 + tolerance(dtype))).all()
    if way is damped_inverse:  # the inputs never leave the directions of the ridge, so it acts there alone
        assert relative_error(power[:, dead][:, :, dead], torch.eye(int(dead.sum())) / ridge[:, None, None]) < 1e-5


@every_dtype
@cases("swallowed", [0, 1e-30, 1e-20])
def test_a_ridge_that_rounding_swallows_is_raised_rather_than_believed(swallowed, dtype, rng):
    """Cholesky factors of singular matrices mostly exist, with pivots of rounding's making."""
    moment = second_moments(8, 24, 12, rng, dtype)
    ridge = torch.full((8,), swallowed, dtype=dtype)
    for exponent, way, error in ((1, damped_inverse, 0.1), (0.5, WAYS["root"], 0.4)):
        power, ok, raised = way(moment, ridge)
        assert ok.all()
        assert (raised >= 1).all()
        assert (raised <= 2).all()
        sizes = zip(moment, raised.tolist(), strict=True)
        applied = torch.tensor([raised_ridge(one, swallowed, times) for one, times in sizes], dtype=torch.float64)
        assert relative_error(power, oracle(moment, applied, exponent)) < error


def test_a_moment_without_a_trace_grows_its_ridge_too():
    power, ok, raised = damped_inverse(torch.diag(torch.tensor([1.0, -1e-4])).unsqueeze(0), torch.zeros(1))
    assert ok.all()
    assert 2 <= raised <= 4  # from about 2e-6 to above 1e-4
    assert power.isfinite().all()
    power, ok, raised = damped_inverse(torch.diag(torch.tensor([1.0, -1])).unsqueeze(0), torch.zeros(1))
    assert not ok.any()
    assert raised.item() == ATTEMPTS - 1


@every_way
def test_nothing_has_no_inverse_but_a_ridge_has(way):
    zero = torch.zeros(2, 3, 3)
    power, ok, _ = way(zero, torch.tensor([0.0, 4.0]))
    assert ok.tolist() == [False, True]
    expected = {damped_inverse: 0.25, damped_factor: 2.0}.get(way, 0.5)
    torch.testing.assert_close(power[1], expected * torch.eye(3))


@every_dtype
@cases("unit", UNITS)
@cases("size", [0, 1e-30, 1e-3, 1, 1e3, 1e30, 3e38])
def test_each_unit_of_a_multiple_of_the_identity_is_the_multiple(unit, size, dtype):
    moment = size * torch.eye(7, dtype=dtype).expand(2, 7, 7)
    torch.testing.assert_close(ridge_unit(moment, unit), torch.full((2,), size, dtype=dtype), rtol=1e-6, atol=0)


@settings(deadline=None, max_examples=50)
@given(n=st.integers(1, 12), samples=st.integers(1, 20), seed=st.integers(0, 10**6), decades=st.integers(-15, 15))
def test_units_are_ordered_and_as_defined(n, samples, seed, decades):
    moment = second_moments(3, n, samples, torch.Generator().manual_seed(seed), torch.float32) * 10.0**decades
    values = torch.linalg.eigvalsh(moment.double())
    trace, frobenius, spectral = (ridge_unit(moment, unit).double() for unit in UNITS)
    torch.testing.assert_close(trace, values.mean(-1), rtol=1e-5, atol=0)
    torch.testing.assert_close(frobenius, values.square().mean(-1).sqrt(), rtol=1e-5, atol=0)
    torch.testing.assert_close(spectral, values[:, -1], rtol=1e-5, atol=0)
    assert (trace <= frobenius * (1 + 1e-5)).all()
    assert (frobenius <= spectral * (1 + 1e-5)).all()


@cases("unit", UNITS)
@cases("bad", [torch.nan, torch.inf])
def test_a_moment_that_is_not_finite_has_no_unit_and_its_neighbour_keeps_its_own(unit, bad, rng):
    moment = second_moments(2, 5, 9, rng)
    expected = ridge_unit(moment, unit)[0]
    moment[1, 2, 2] = bad
    units = ridge_unit(moment, unit)
    assert torch.equal(units[0], expected)
    assert not units[1].isfinite()


def test_an_unknown_unit_is_refused():
    message = "Unknown ridge unit 'tracce': did you mean 'trace'? Valid: frobenius, spectral, trace."
    with pytest.raises(ValueError, match=re.escape(message)):
        ridge_unit(torch.eye(2).unsqueeze(0), "tracce")


def test_wide_powers_do_not_depend_on_the_batch(rng):
    moment = second_moments(13, 8, 40, rng, torch.float32)
    ridge = 1e-3 * ridge_unit(moment)
    together = damped_power(moment, ridge, 0.3, wide=True).power
    for start, stop in ((0, 3), (1, 4), (2, 7), (12, 13)):
        alone = damped_power(moment[start:stop].clone(), ridge[start:stop], 0.3, wide=True).power
        assert torch.equal(alone, together[start:stop])
    narrow = damped_power(moment, ridge, 0.3).power
    torch.testing.assert_close(together, narrow, rtol=1e-5, atol=1e-5 * float(narrow.max()))
