"""The surrogate and its minimisers: against brute force, Newton's step, and changes of coordinates."""

import pytest
import torch

from steepest.linalg import polar
from steepest.theory import (
    displacement_root,
    hessian_score,
    minimiser,
    muon_direction,
    newton_step,
    surrogate,
    surrogate_score,
)
from tests.cases import cases

SHAPES = [(4, 7), (6, 6), (9, 5)]


def normal(rng, *shape):
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def spd(rng, n):
    """Positive definite, condition of about ten."""
    root = normal(rng, n, 3 * n)
    return root @ root.mT / (3 * n)


def problem(rng, m, n):
    """Displacement D = W - W*, curvature H, moment K and the gradient H D K."""
    displacement, h, k = normal(rng, m, n), spd(rng, m), spd(rng, n)
    return displacement, h, k, h @ displacement @ k


def close(actual, expected, atol=1e-10):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_surrogate_is_its_sum_over_tokens(shape, rng):
    m, n = shape
    q, g, h, z = normal(rng, m, n), normal(rng, m, n), spd(rng, m), normal(rng, n, 12)
    tokens = sum((q @ z[:, i]) @ h @ (q @ z[:, i]) / 2 for i in range(12)) / 12
    close(surrogate(q, g, h, z @ z.mT / 12), tokens - torch.trace(q @ g.mT), atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_step_reaches_the_minimum_when_the_displacements_moment_is_known(shape, rng):
    displacement, _, k, gradient = problem(rng, *shape)
    root = displacement_root(displacement)
    close(root @ root.mT, displacement @ displacement.mT)
    close(minimiser(gradient, k, factor=root), displacement)
    close(minimiser(gradient, k, factor=displacement), displacement)
    mixed = displacement @ torch.linalg.qr(normal(rng, shape[1], shape[1]))[0]  # another factor of the same moment
    close(minimiser(gradient, k, factor=mixed), displacement)
    close(minimiser(1e6 * gradient, 1e-3 * k, factor=root), displacement)


def test_a_displacement_of_low_rank_is_found_from_its_narrow_factor(rng):
    _, h, k, _ = problem(rng, 6, 5)
    narrow, right = normal(rng, 6, 2), torch.linalg.qr(normal(rng, 5, 2))[0]
    displacement = narrow @ right.mT
    gradient = h @ displacement @ k
    close(minimiser(gradient, k, factor=narrow), displacement)
    close(minimiser(gradient, k, factor=displacement_root(displacement)), displacement)


def test_batches_are_minimised_one_by_one(rng):
    parts = [problem(rng, 4, 6) for _ in range(3)]
    d, _, k, g = (torch.stack(part) for part in zip(*parts, strict=True))
    close(minimiser(g, k, factor=displacement_root(d)), d)
    close(muon_direction(g, k, inner=0.5, outer=0.5)[1], muon_direction(g[1], k[1], inner=0.5, outer=0.5))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_other_step_has_a_smaller_surrogate(shape, rng):
    displacement, h, k, gradient = problem(rng, *shape)
    best = minimiser(gradient, k, factor=displacement_root(displacement))
    lowest = surrogate(best, gradient, h, k)
    for size in (1e-3, 1e-1, 1.0, 10.0):
        others = surrogate(best + size * normal(rng, 200, *shape), gradient, h, k)
        assert (others > lowest).all()
    close(newton_step(gradient, h, k), best)
    close(surrogate_score(best, gradient, h, k), -2 * lowest, atol=1e-9)


def test_least_squares_is_solved_by_one_step_without_a_sign(rng):
    """H = 1 there: the preconditioned gradient is Newton's step, and a learning rate of 1 lands on W*."""
    weight, target, z = normal(rng, 5, 8), normal(rng, 5, 8), normal(rng, 8, 40)
    weight.requires_grad_()
    (gradient,) = torch.autograd.grad(((weight - target) @ z).square().sum() / (2 * 40), weight)
    step = newton_step(gradient, torch.eye(5), z @ z.mT / 40)
    close(weight.detach() - step, target)


def test_newton_muon_descends_for_any_positive_definite_moment(rng):
    """Also for a moment that has nothing to do with the gradient, and for inexact signs."""
    for _ in range(200):
        gradient, k = normal(rng, 24, 16), spd(rng, 16)
        direction = minimiser(gradient, k)
        assert (direction * gradient).sum() > 1
        whitened = gradient @ torch.linalg.inv(k)
        inexact = polar(whitened, method="newton-schulz", coefficients="jordan")
        assert (inexact * gradient).sum() > 1


def test_isotropic_inputs_make_newton_muon_muon(rng):
    gradient = normal(rng, 5, 7)
    muon = polar(gradient, method="svd")
    for scale in (1e-3, 1.0, 1e3):
        close(minimiser(gradient, scale * torch.eye(7)), muon, atol=1e-12)
    close(muon_direction(gradient, spd(rng, 7), inner=1.0, ridge=1e12), muon, atol=1e-9)
    close(muon_direction(gradient, spd(rng, 7), inner=0.0), muon, atol=1e-12)


def reparametrised(rng, a):
    """Gradient and moment before and after z -> A z, W -> W A⁻¹."""
    gradient, k = normal(rng, 5, 6), spd(rng, 6)
    return gradient, k, gradient @ a.mT, a @ k @ a.mT


FAMILY = {"muon": (0.0, 0.0), "half": (0.5, 0.0), "newton-muon": (1.0, 0.0), "whitened": (0.5, 0.5)}


@cases("inner, outer", FAMILY.values(), FAMILY)
@cases("ridge", [0.0, 0.2])
def test_a_rotation_of_inputs_rotates_the_step(inner, outer, ridge, rng):
    rotation, left = (torch.linalg.qr(normal(rng, n, n))[0] for n in (6, 5))
    gradient, k, turned, turned_k = reparametrised(rng, rotation)
    options = {"inner": inner, "outer": outer, "ridge": ridge}
    expected = left @ muon_direction(gradient, k, **options) @ rotation.mT
    close(muon_direction(left @ turned, turned_k, **options), expected)


def test_only_whitened_muon_is_the_same_in_all_coordinates(rng):
    a = normal(rng, 6, 6) + 3 * torch.eye(6)
    inverse = torch.linalg.inv(a)
    gradient, k, changed, changed_k = reparametrised(rng, a)

    def error(inner, outer, ridge=0.0):
        here = muon_direction(gradient, k, inner=inner, outer=outer, ridge=ridge) @ inverse
        there = muon_direction(changed, changed_k, inner=inner, outer=outer, ridge=ridge)
        return (there - here).abs().max().item()

    assert error(0.5, 0.5) < 1e-9
    assert error(1.0, 0.0) > 1e-2
    assert error(0.0, 0.0) > 1e-2
    assert error(0.5, 0.5, ridge=0.2) > 1e-2
    before_the_sign = newton_step(gradient, torch.eye(5), k) @ inverse
    close(newton_step(changed, torch.eye(5), changed_k), before_the_sign, atol=1e-9)


def test_a_singular_moment_is_refused_and_a_ridge_helps(rng):
    gradient, z = normal(rng, 3, 6), normal(rng, 6, 4)
    k = z @ z.mT / 4
    with pytest.raises(ValueError, match=r"The moment \(6, 6\) with a ridge of 0 .* not positive definite"):
        minimiser(gradient, k)
    with pytest.raises(ValueError, match=r"The curvature \(3, 3\) with a ridge of 0"):
        newton_step(gradient, torch.zeros(3, 3), torch.eye(6))
    assert muon_direction(gradient, k, inner=1.0, ridge=1e-3).isfinite().all()


def test_surrogate_and_exact_score_agree_on_least_squares(rng):
    weight, target, z = normal(rng, 4, 5), normal(rng, 4, 5), normal(rng, 5, 30)
    weight.requires_grad_()
    loss = ((weight - target) @ z).square().sum() / 60
    (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
    q = normal(rng, 4, 5)
    exact = hessian_score(q, gradient, weight)
    model = surrogate_score(q, gradient.detach(), torch.eye(4), z @ z.mT / 30)
    assert 2 * exact.decrease == pytest.approx(model.item(), rel=1e-12)
