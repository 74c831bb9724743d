"""Scores: Hessian-vector products against whole Hessians, and directions that have no best step."""

import math

import pytest
import torch
from torch import nn

from steepest.theory import hessian_score, surrogate_score

ONES = torch.ones(2, 2, dtype=torch.float64)


def gradient_of(loss, weight):
    (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
    return gradient


def test_the_score_is_that_of_the_whole_hessian(rng):
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 5)).double()
    x = torch.randn(20, 4, generator=rng, dtype=torch.float64)
    y = torch.randint(5, (20,), generator=rng)
    weight = model[0].weight

    def loss(w):
        hidden = torch.tanh(nn.functional.linear(x, w, model[0].bias))
        return nn.functional.cross_entropy(model[2](hidden), y)

    hessian = torch.autograd.functional.hessian(loss, weight.detach()).reshape(12, 12)
    gradient = gradient_of(loss(weight), weight)
    g = gradient.detach().flatten()
    for _ in range(5):
        q = torch.randn(3, 4, generator=rng, dtype=torch.float64)
        score = hessian_score(q, gradient, weight)
        curvature = (q.flatten() @ hessian @ q.flatten() / q.square().sum()).item()
        assert score.curvature == pytest.approx(curvature, rel=1e-11)
        assert score.alignment == pytest.approx((q.flatten() @ g / q.norm() / g.norm()).item(), rel=1e-11)
        assert score.gradient_norm == pytest.approx(g.norm().item(), rel=1e-12)
        if curvature > 0:
            assert score.value == pytest.approx(score.alignment**2 / curvature, rel=1e-12)
        assert hessian_score(1e5 * q, gradient, weight).curvature == pytest.approx(curvature, rel=1e-11)


def test_the_decrease_is_that_of_an_exact_line_search(rng):
    """On a quadratic: no step along the direction falls further."""
    root = torch.randn(6, 9, generator=rng, dtype=torch.float64)
    weight = torch.randn(2, 3, generator=rng, dtype=torch.float64).requires_grad_()

    def loss(w):
        return (root.mT @ w.flatten()).square().sum() + w.sum()

    q = torch.randn(2, 3, generator=rng, dtype=torch.float64)
    score = hessian_score(q, gradient_of(loss(weight), weight), weight)
    start = weight.detach()
    sizes = torch.linspace(-2, 2, 4001, dtype=torch.float64)
    falls = torch.stack([loss(start) - loss(start - t * q) for t in sizes])
    assert falls.max().item() == pytest.approx(score.decrease, rel=1e-4)
    assert falls.max().item() <= score.decrease + 1e-9


@pytest.mark.parametrize(
    ("loss", "status"),
    [
        (lambda w: w.square().sum(), "positive"),
        (lambda w: -w.square().sum(), "negative curvature"),
        (lambda w: w.sum(), "zero curvature"),
        (lambda w: (w @ torch.diag(torch.tensor([1.0, -1.0]).double())).mul(w).sum(), "zero curvature"),
    ],
)
def test_a_direction_without_a_best_step_says_so(loss, status):
    weight = (2 * ONES).requires_grad_()
    score = hessian_score(ONES, gradient_of(loss(weight), weight), weight)
    assert score.status == status
    assert (score.value is None) == (score.decrease is None) == (status != "positive")


def test_a_direction_that_is_zero_says_so():
    weight = ONES.clone().requires_grad_()
    gradient = gradient_of(weight.square().sum(), weight)
    score = hessian_score(torch.zeros_like(weight), gradient, weight)
    assert (score.status, score.value, score.alignment) == ("zero direction", None, 0.0)
    at_minimum = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    score = hessian_score(ONES, gradient_of(at_minimum.square().sum(), at_minimum), at_minimum)
    assert (score.status, score.alignment, score.decrease) == ("positive", 0.0, 0.0)


def test_the_gradient_can_be_used_again():
    weight = ONES.clone().requires_grad_()
    gradient = gradient_of(weight.pow(4).sum(), weight)
    first, second = (hessian_score(ONES, gradient, weight) for _ in range(2))
    assert first == second
    assert weight.grad is None


def test_wrong_input_is_refused():
    weight = ONES.clone().requires_grad_()
    gradient = gradient_of(weight.square().sum(), weight)
    single = torch.ones(2, 2, requires_grad=True)
    with pytest.raises(TypeError, match=r"The weight is torch.float32; .* Use model.double\(\)"):
        hessian_score(single, single, single)
    with pytest.raises(ValueError, match=r"The direction has shape \(2,\), the weight \(2, 2\)"):
        hessian_score(torch.ones(2), gradient, weight)
    with pytest.raises(ValueError, match=r"The direction \(2, 2\) is not finite"):
        hessian_score(ONES * math.nan, gradient, weight)
    with pytest.raises(ValueError, match=r"The gradient \(2, 2\) is not finite"):
        hessian_score(ONES, gradient * math.inf, weight)
    zero = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    kinked = gradient_of(zero.abs().pow(1.5).sum(), zero)
    with pytest.raises(ValueError, match="The Hessian along a direction is not finite"):
        hessian_score(ONES, kinked, zero)
    with pytest.raises(ValueError, match=r"the curvature tr\(H Q K Qᵀ\) = 0 and so no best step"):
        surrogate_score(0 * ONES, ONES, ONES, ONES)
