"""The model with one large input: its reduced dynamics against real matrices, and numbers of steps."""

import math

import pytest
import torch

from steepest.theory import contraction, iterations, path
from steepest.theory.spike import SPIKE_METHODS
from tests.cases import cases

SIZE, RANK = 16, 8


def orthogonal(rng):
    return torch.linalg.qr(torch.randn(SIZE, SIZE, generator=rng, dtype=torch.float64))[0]


def coefficients_of(error, left, right):
    """All 16 x 16 coefficients in the bases of the model."""
    return left.mT @ error @ right


def msgn(x):
    """The exact sign; in random bases, what rounding leaves of a zero singular value is far below the cutoff."""
    u, s, vh = torch.linalg.svd(x)
    return (u * (s > 1e-10 * s[0])) @ vh


def run(method, kappa, *, steps, rng, start=(1.0, 1.0, 1.0)):
    """Real matrices in random bases: coefficients (steps + 1, 16, 16). Step sizes come from the formulas alone."""
    left, right = orthogonal(rng), orthogonal(rng)
    a, b, c = start
    core = torch.zeros(SIZE, SIZE, dtype=torch.float64)
    core[0, 0], core[0, RANK] = a, b
    core[range(1, RANK), range(1, RANK)] = c
    target = left @ core @ right.mT
    gram = right @ torch.diag(torch.tensor([kappa] + [1.0] * (SIZE - 1), dtype=torch.float64)) @ right.mT
    inverse = torch.linalg.inv(gram)
    weight, bound = torch.zeros_like(target), max(map(abs, start))
    seen = [coefficients_of(target - weight, left, right)]
    for _ in range(steps):
        gradient = (weight - target) @ gram
        if method == "gradient-descent":
            weight = weight - 2 / (kappa + 1) * gradient
        else:
            s = math.sqrt(kappa**2 + 1) if method == "muon" else math.sqrt(2)
            bound *= s / (s + 1)
            weight = weight - bound * msgn(gradient @ inverse if method == "newton-muon" else gradient)
        seen.append(coefficients_of(target - weight, left, right))
    return torch.stack(seen)


@cases("method", SPIKE_METHODS)
@cases("kappa, steps", [(2.0, 19), (4.0, 32), (16.0, 40), (64.0, 10), (256.0, 6)])
@cases("start", [(1.0, 1.0, 1.0), (0.3, -0.8, 1.0)])
def test_three_numbers_follow_the_matrices(method, kappa, steps, start, rng):
    """To the end for small kappa; rounding then mixes Muon's bulk modes, the sooner the larger kappa is."""
    steps = min(steps, len(path(method, kappa, start=start).bounds) - 1)
    seen = run(method, kappa, steps=steps, rng=rng, start=start)
    expected = torch.zeros_like(seen)
    reduced = path(method, kappa, start=start).coefficients[: steps + 1]
    expected[:, 0, 0], expected[:, 0, RANK] = reduced[:, 0], reduced[:, 1]
    for mode in range(1, RANK):
        expected[:, mode, mode] = reduced[:, 2]
    torch.testing.assert_close(seen, expected, rtol=0, atol=1e-6)


@cases("seed", range(3))
@cases("kappa, muon", [(2.0, 17), (4.0, 31)])
def test_real_matrices_take_as_many_steps(kappa, muon, seed):
    for method, steps in zip(SPIKE_METHODS, (iterations(kappa)["gradient-descent"].reached, muon, 13), strict=True):
        seen = run(method, kappa, steps=steps, rng=torch.Generator().manual_seed(seed)).abs().amax((1, 2))
        assert (seen <= 1e-3).nonzero().flatten().tolist() == [steps], method


@cases("seed", range(3))
@cases("kappa", [16.0, 64.0])
def test_real_matrices_arrive_when_the_bound_says(kappa, seed):
    """Although rounding mixes Muon's bulk modes."""
    steps = iterations(kappa)["muon"].guaranteed
    seen = run("muon", kappa, steps=steps, rng=torch.Generator().manual_seed(seed)).abs().amax((1, 2))
    assert seen[-1] <= 1e-3
    assert (seen <= 2 * path("muon", kappa).bounds).all()


@cases(
    "kappa, descent, muon",
    [
        (1.0, 1, (13, 13, 13)),
        (2.0, 7, (17, 17, 19)),
        (4.0, 14, (31, 31, 32)),
        (16.0, 56, (63, 113, 115)),
        (64.0, 222, (221, 445, 446)),
        (256.0, 885, (231, 1771, 1772)),
    ],
)
def test_numbers_of_steps(kappa, descent, muon):
    found = iterations(kappa)
    assert set(vars(found["gradient-descent"]).values()) == {descent}
    assert tuple(vars(found["muon"]).values()) == muon
    assert set(vars(found["newton-muon"]).values()) == {13}


@cases("method", SPIKE_METHODS)
@cases("kappa", [1.0, 1.5, 7.0, 300.0])
def test_no_start_within_the_bound_leaves_it(method, kappa, rng):
    starts = 2 * torch.rand(30, 3, generator=rng, dtype=torch.float64) - 1
    corners = [[a, b, c] for a in (-1.0, 0.0, 1.0) for b in (1e-9, 1.0) for c in (0.0, -1.0)]
    for start in [*starts.tolist(), *corners]:
        if not any(start):
            continue
        way = path(method, kappa, start=tuple(start), eps=1e-2)
        assert (way.coefficients.abs().amax(1) <= way.bounds * (1 + 1e-12)).all()
        steps = way.bounds[1:] / way.bounds[:-1]
        torch.testing.assert_close(steps, torch.full_like(steps, contraction(method, kappa)))


@pytest.mark.parametrize("kappa", [1.0, 4.0, 100.0])
def test_no_other_step_has_a_better_bound(kappa):
    """From the worst point (1, 1, 1) and the smallest one, a longer or shorter first step leaves a larger error."""
    s = math.hypot(kappa, 1)
    best = contraction("muon", kappa)
    for eta in (0.99 * best, 1.01 * best):
        shrunk = 1 - eta / s  # b, starting at 1
        overshot = eta  # c, starting at next to nothing
        assert max(shrunk, overshot) > best


def test_where_it_starts_at_the_goal_nothing_is_to_do():
    way = path("muon", 4.0, start=(0.0, 0.0, 0.0))
    assert way.coefficients.tolist() == [[0.0, 0.0, 0.0]]
    assert {tuple(vars(steps).values()) for steps in iterations(4.0, eps=2.0).values()} == {(0, 0, 0)}


@cases(
    "call, message",
    [
        (lambda: contraction("mun", 2.0), "Unknown method 'mun': did you mean 'muon'?"),
        (lambda: contraction("muon", 0.5), "kappa must be a finite number of at least 1, got 0.5"),
        (lambda: iterations(math.nan), "kappa must be a finite number of at least 1, got nan"),
        (lambda: iterations(2.0, eps=0.0), "A path takes eps above 0 and finite coefficients, got 0"),
        (lambda: path("muon", 2.0, start=(math.inf, 0.0, 0.0)), "A path takes eps above 0 and finite"),
        (lambda: iterations(1e9), "gradient-descent would take more than 1,000,000 steps for kappa=1e"),
    ],
)
def test_wrong_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
