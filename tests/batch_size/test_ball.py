"""The ball of weight decay: no gradients lead out of it, some lead to its edge, and beyond 2 nothing holds."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import steepest
from steepest.batch_size.ball import Ball, frank_wolfe_gap
from steepest.geometry import scale_factor
from steepest.linalg import COEFFICIENTS, overshoot, polar
from tests.cases import cases

SCALES = ["original", "match_rms_adamw", "spectral", "none"]


def spectral(x):
    return float(torch.linalg.matrix_norm(x, ord=2))


def next_gradient(kind, weight, step, rng):
    """Random ones; or those that push outward, back and forth, or along one matrix for ever."""
    if kind == "outward":
        return -weight + 1e-3 * torch.randn(weight.shape, generator=rng, dtype=weight.dtype)
    if kind == "back and forth":
        return weight * (-1) ** step + 1e-3 * torch.eye(*weight.shape, dtype=weight.dtype)
    if kind == "constant":
        return -torch.eye(*weight.shape, dtype=weight.dtype)
    return torch.randn(weight.shape, generator=rng, dtype=weight.dtype) * 10 ** float(torch.randn((), generator=rng))


@pytest.mark.slow
@given(
    shape=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    product=st.floats(1e-3, 1.0),
    decay=st.floats(1e-2, 10.0),
    scale=st.sampled_from(SCALES),
    coefficients=st.sampled_from([None, *COEFFICIENTS]),
    momentum=st.floats(0.0, 0.99),
    nesterov=st.booleans(),
    kind=st.sampled_from(["random", "outward", "back and forth", "constant"]),
    start=st.floats(0.0, 3.0),
    falling=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=80, deadline=None)
def test_no_gradients_lead_out_of_the_ball(
    shape, product, decay, scale, coefficients, momentum, nesterov, kind, start, falling, seed
):
    rng = torch.Generator().manual_seed(seed)
    lr = product / decay
    ball = Ball(lr=lr, weight_decay=decay, scale=scale_factor(scale, *shape), overshoot=overshoot(coefficients))
    weight = torch.nn.Parameter(torch.randn(shape, generator=rng, dtype=torch.float64))
    weight.data *= start * ball.radius / spectral(weight.data)
    options = {"polar": "svd"} if coefficients is None else {"polar": "newton-schulz", "coefficients": coefficients}
    optimizer = steepest.Muon(
        [weight], lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=decay, scale=scale, **options
    )
    first, inside = spectral(weight.data), start <= 1
    for step in range(12):
        if falling:
            optimizer.param_groups[0]["lr"] = lr / (step + 1)
        before = weight.detach().clone()
        weight.grad = next_gradient(kind, before, step, rng)
        optimizer.step()
        assert spectral(weight.data) <= max(first, ball.radius) * (1 + 1e-6)
        if inside:
            assert spectral(weight.data - before) <= ball.step * (1 + 1e-6)
        if not falling:
            assert spectral(weight.data) <= ball.after(first, step + 1) * (1 + 1e-6)
        frobenius = math.sqrt(min(shape)) * max(first, ball.radius)
        assert float(weight.data.norm()) <= frobenius * (1 + 1e-6)


def descend(gradient_of, *, lr, decay, steps, coefficients=None, start=0.0, size=4):
    """Largest singular value after each step, without momentum; W_0 = start times the identity."""
    weight = start * torch.eye(size, dtype=torch.float64)
    method = "svd" if coefficients is None else "newton-schulz"
    seen = [spectral(weight)]
    for step in range(steps):
        direction = polar(gradient_of(weight, step), method=method, coefficients=coefficients or "jordan")
        weight = (1 - lr * decay) * weight - lr * direction
        seen.append(spectral(weight))
    return seen


@cases("coefficients", [None, *COEFFICIENTS])
def test_a_constant_gradient_leads_to_the_edge(coefficients):
    """With singular values at which the polynomial overshoots most: the radius is not only an upper bound."""
    gradient = -torch.eye(4, dtype=torch.float64)
    if coefficients is not None:
        s = torch.linspace(0, 1, 200_001, dtype=torch.float64)
        worst = s[COEFFICIENTS[coefficients](s).argmax()]
        order = {"frobenius": 2, "schatten8": 8}[COEFFICIENTS[coefficients].norm]  # of the norm that is divided by
        rest = (1 - worst**order).clamp_min(0) ** (1 / order)
        gradient = -torch.diag(torch.tensor([worst, rest, 0, 0], dtype=torch.float64))
    seen = descend(lambda weight, step: gradient, lr=0.5, decay=0.5, steps=80, coefficients=coefficients)
    radius = Ball(lr=0.5, weight_decay=0.5, overshoot=overshoot(coefficients)).radius
    assert seen[-1] == pytest.approx(radius, rel=1e-4)
    assert max(seen) <= radius * (1 + 1e-9)


@pytest.mark.parametrize("product", [1.1, 1.5, 1.9])
def test_between_one_and_two_alternating_gradients_attain_the_limit(product):
    decay = 0.5
    ball = Ball(lr=product / decay, weight_decay=decay)
    assert ball.regime == "bounded"
    seen = descend(lambda weight, step: weight, lr=ball.lr, decay=decay, steps=300, start=0.1)
    assert seen[-1] == pytest.approx(ball.limit, rel=1e-6)
    assert ball.limit > ball.radius
    for step, size in enumerate(seen):
        assert size == pytest.approx(ball.after(0.1, step), rel=1e-9)


def test_numbers_of_random_gradients_between_one_and_two(rng):
    for product, limit in ((1.5, 6.0), (1.9, 38.0)):
        ball = Ball(lr=2 * product, weight_decay=0.5)
        assert ball.limit == pytest.approx(limit)
        sizes = descend(
            lambda w, step: torch.randn(w.shape, generator=rng, dtype=w.dtype), lr=ball.lr, decay=0.5, steps=300
        )
        assert 1 / 0.5 < max(sizes) <= limit


@pytest.mark.slow
@pytest.mark.parametrize(("product", "expected"), [(2.0, 1200.0), (2.2, 4.4 * (1.2**300 - 1) / 0.2)])
def test_from_two_on_weights_grow_without_end(product, expected):
    ball = Ball(lr=2 * product, weight_decay=0.5)
    assert (ball.regime, ball.limit) == ("may diverge", math.inf)
    start = 1e-9
    seen = descend(lambda weight, step: weight, lr=ball.lr, decay=0.5, steps=300, start=start)
    assert seen[-1] == pytest.approx(expected, rel=1e-6)
    assert seen[-1] == pytest.approx(ball.after(start, 300), rel=1e-9)
    assert ball.after(1.0, 10**9) == (math.inf if product > 2 else 1.0 + 4e9)


def test_from_far_outside_the_way_in_is_geometric():
    lr, decay, start = 0.1, 0.5, 100.0
    seen = descend(lambda weight, step: -weight, lr=lr, decay=decay, steps=200, start=start)
    for step, size in enumerate(seen):
        assert size - 1 / decay <= (1 - lr * decay) ** step * (start - 1 / decay) * (1 + 1e-9) + 1e-12
    assert seen[-1] - 1 / decay == pytest.approx((1 - lr * decay) ** 200 * (start - 1 / decay), rel=1e-6)


def test_numbers_of_known_settings():
    assert overshoot("jordan") == pytest.approx(1.2024, abs=5e-5)
    assert [overshoot([COEFFICIENTS["jordan"].steps[0]] * k) for k in range(1, 8)] == pytest.approx(
        [1.2024] * 7, abs=5e-5
    )
    assert overshoot(None) == 1
    scale = scale_factor("match_rms_adamw", 4096, 4096)
    assert Ball(lr=0.02, weight_decay=0.1, scale=scale, overshoot=overshoot("jordan")).radius == pytest.approx(
        153.9, abs=0.1
    )
    assert Ball(lr=0.02, weight_decay=0.0).radius == math.inf
    assert [Ball(lr=lr, weight_decay=0.0625).regime for lr in (16.0, 24.0, 32.0)] == [
        "ball holds",
        "bounded",
        "may diverge",
    ]


@cases("name", COEFFICIENTS)
def test_the_overshoot_is_the_largest_value_of_the_map(name):
    x = torch.cat(
        [torch.logspace(-9, 0, 100_001, dtype=torch.float64), torch.linspace(0, 1, 100_001, dtype=torch.float64)]
    )
    largest = float(COEFFICIENTS[name](x).max())
    assert largest <= overshoot(name) + 1e-12
    assert overshoot(name) == pytest.approx(max(1.0, largest), abs=1e-6)


@cases("name", [name for name in COEFFICIENTS if COEFFICIENTS[name].certify().bears(torch.bfloat16)])
def test_products_in_bfloat16_add_up_to_two_percent(name, rng):
    """Ranks from one to full, and singular values that fall off fast or slowly."""
    left, right = torch.randn(40, 16, 1, generator=rng), torch.randn(40, 1, 32, generator=rng)
    spread = torch.logspace(0, -2, 16).unsqueeze(-1) * torch.randn(40, 16, 32, generator=rng)
    for x in (left * right, spread, torch.randn(40, 16, 32, generator=rng)):
        factor = polar(x, method="newton-schulz", coefficients=name, dtype=torch.bfloat16)
        assert float(torch.linalg.matrix_norm(factor, ord=2).max()) <= 1.02 * overshoot(name)


def test_the_gradient_bound_holds_where_the_ball_does(rng):
    """For ½ tr((W - W*)ᵀ H (W - W*)) and any weights of the ball."""
    curvature = torch.rand(6, 1, generator=rng, dtype=torch.float64)
    target = torch.randn(6, 9, generator=rng, dtype=torch.float64)
    ball = Ball(lr=0.1, weight_decay=0.25)
    weights = torch.randn(500, 6, 9, generator=rng, dtype=torch.float64)
    weights *= ball.radius / torch.linalg.matrix_norm(weights, ord=2, keepdim=True)
    seen = torch.linalg.matrix_norm(curvature * (weights - target), ord="nuc").max()
    assert seen <= ball.gradient(float(curvature.sum()), minimiser=spectral(target))
    assert ball.gradient(2.0, minimiser=1.0, initial=7.0) == 16.0
    assert Ball(lr=3.0, weight_decay=0.5).gradient(2.0, minimiser=1.0) == 14.0
    assert Ball(lr=4.0, weight_decay=0.5).gradient(2.0, minimiser=1.0) == math.inf


def test_each_regime_has_its_sentence():
    words = {
        Ball(lr=0.1, weight_decay=0.0): "without decay nothing bounds the weights",
        Ball(lr=0.1, weight_decay=0.1): "lr * weight_decay = 0.01 <= 1: weights inside the ball stay there",
        Ball(lr=15.0, weight_decay=0.1): "may leave the ball; keep lr below 1 / weight_decay = 10",
        Ball(lr=30.0, weight_decay=0.1): "= 3 >= 2: weights may grow without end; keep lr below 1 / weight_decay = 10",
    }
    for ball, text in words.items():
        assert text in ball.sentence
    assert Ball(lr=0.1, weight_decay=0.0).step == 0.1


@given(size=st.floats(0.0, 1.0), seed=st.integers(0, 2**16), scale=st.floats(0.1, 10))
@settings(max_examples=60, deadline=None)
def test_the_gap_is_not_negative_in_the_ball_and_bounds_the_gradient(size, seed, scale):
    rng = torch.Generator().manual_seed(seed)
    gradient, weight = (torch.randn(20, 4, 7, generator=rng, dtype=torch.float64) for _ in range(2))
    weight *= size * scale / 0.3 / torch.linalg.matrix_norm(weight, ord=2, keepdim=True)
    gap = frank_wolfe_gap(gradient, weight, weight_decay=0.3, scale=scale)
    norm = torch.linalg.matrix_norm(gradient, ord="nuc")
    assert (gap >= -1e-9 * norm).all()
    assert (norm * (1 - size) <= gap * (1 + 1e-9) + 1e-9 * norm).all()


def test_the_gap_is_zero_at_a_stationary_point_on_the_edge(rng):
    """W = U Vᵀ / λ and a gradient that pulls outward along each direction."""
    u, _, vh = torch.linalg.svd(torch.randn(4, 7, generator=rng, dtype=torch.float64), full_matrices=False)
    gradient = -(u * torch.tensor([3.0, 1.0, 0.5, 0.0], dtype=torch.float64)) @ vh
    assert float(frank_wolfe_gap(gradient, u @ vh / 0.5, weight_decay=0.5)) == pytest.approx(0, abs=1e-12)
    assert float(frank_wolfe_gap(gradient, u @ vh, weight_decay=0.0)) == pytest.approx(4.5)


@cases(
    "call, message",
    [
        (lambda: Ball(lr=0.0, weight_decay=0.1), "Ball: lr must be finite and above 0, got 0.0."),
        (lambda: Ball(lr=0.1, weight_decay=0.1, scale=math.inf), "Ball: scale must be finite and above 0, got inf."),
        (lambda: Ball(lr=0.1, weight_decay=-1.0), "Ball: weight_decay must be finite and at least 0, got -1.0."),
        (
            lambda: Ball(lr=0.1, weight_decay=0.1, overshoot=0.5),
            "Ball: overshoot must be finite and at least 1, got 0.5.",
        ),
        (
            lambda: frank_wolfe_gap(torch.zeros(2, 3), torch.zeros(3, 2), weight_decay=0.1),
            "The gap takes a gradient of the weight's shape, got (2, 3) and (3, 2).",
        ),
        (lambda: overshoot("jordn"), "Unknown coefficients 'jordn': did you mean 'jordan'?"),
    ],
)
def test_wrong_input_is_refused(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
