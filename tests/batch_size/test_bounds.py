"""The bounds' algebra: factors of momentum, shapes, batch sizes, and what is refused."""

import dataclasses
import itertools
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steepest.batch_size.bounds import (
    Bound,
    LogCurve,
    PowerCurve,
    Problem,
    Setting,
    bound,
    inverse_batch_noise,
    lag,
    noise_factor,
)
from steepest.optim.momentum import average_, look_ahead
from tests.cases import cases

PROBLEM = Problem(smoothness=4.4, noise=32.0, gap=1.5, gradient=3.4)
positive = st.floats(1e-3, 1e3)


@cases("nesterov", [False, True])
@cases("momentum", [0.0, 0.7, 0.9, 0.95, 0.99])
def test_the_factors_are_those_of_the_weights(momentum, nesterov):
    """Feed ones and zeros through the library's averages: the weights themselves, and what their sums must be."""
    past = 4000
    buffer, weights = torch.zeros(1, dtype=torch.float64), []
    pulse = torch.ones(1, dtype=torch.float64)
    for _ in range(past):  # the weight of the newest gradient, of the one before, ..., on an average from zero
        average_([buffer], [pulse], momentum)
        weights.append(float(look_ahead([buffer], [pulse], momentum)[0] if nesterov else buffer))
        pulse = torch.zeros_like(pulse)
    w = torch.tensor(weights, dtype=torch.float64)
    assert noise_factor(momentum, nesterov=nesterov) ** 2 == pytest.approx(float(w.square().sum()), rel=1e-12)
    still_missing = 1 - w.cumsum(0)  # of the gradient at the start, after each step; also what drift is weighted with
    assert lag(momentum, nesterov=nesterov) == pytest.approx(float(still_missing.sum()), rel=1e-9, abs=1e-9)


@cases(
    "momentum, plain, nesterov",
    [(0.0, 1, 1), (0.7, 0.1765, 0.3025), (0.9, 0.05263, 0.07063), (0.95, 0.02564, 0.03039), (0.99, 0.005025, 0.005223)],
)
def test_the_table_of_noise_factors(momentum, plain, nesterov):
    assert noise_factor(momentum, nesterov=False) ** 2 == pytest.approx(plain, rel=1e-3)
    assert noise_factor(momentum, nesterov=True) ** 2 == pytest.approx(nesterov, rel=1e-3)
    triangle = momentum * noise_factor(momentum, nesterov=False) + 1 - momentum
    assert noise_factor(momentum, nesterov=True) <= triangle + 1e-12


@cases("nesterov", [False, True])
@cases("momentum", [0.0, 0.7, 0.9, 0.95])
def test_the_measured_variance_of_an_average_is_that_of_its_factor(momentum, nesterov, rng):
    """200,000 entries: the variance of each average has a relative deviation of 0.3%."""
    buffer = torch.zeros(200_000)
    for _ in range(round(6 / (1 - momentum))):
        noise = torch.randn(buffer.shape, generator=rng)
        average_([buffer], [noise], momentum)
    seen = look_ahead([buffer], [noise], momentum)[0] if nesterov else buffer
    assert float(seen.var()) == pytest.approx(noise_factor(momentum, nesterov=nesterov) ** 2, rel=0.01)


def test_numbers_of_the_four_settings():
    eta, s, d = 0.02, math.sqrt(0.1 / 1.9), 9.0
    plain = bound(Setting(eta, 0.9, nesterov=False), PROBLEM)
    assert dataclasses.astuple(plain) == pytest.approx(
        (1.5 / eta + 2 * d * 3.4, 64 * s, 4.4 * eta * 18.5, "1/sqrt(b)", "gradient", 0.0)
    )
    ahead = bound(Setting(eta, 0.9), PROBLEM)
    assert pytest.approx((1.5 / eta + 16.2 * 3.4, 4.4 * eta * 16.7)) == (ahead.X, ahead.Z)
    assert pytest.approx(64 * math.sqrt(0.070632), rel=1e-5) == ahead.Y
    decay = bound(Setting(eta, 0.9, nesterov=False, weight_decay=0.5), PROBLEM)
    assert dataclasses.astuple(decay) == pytest.approx((plain.X, plain.Y, 4.4 * eta * 38, "1/sqrt(b)", "gap", 0.0))
    convex = bound(Setting(eta, 0.9, nesterov=False, weight_decay=0.5), PROBLEM, star_convex=True)
    floor = eta * (2 * 4.4 / 0.5 * 19 + 18 * 3.4)
    expected = (1.5, 2 / 0.5 * s * 32, floor, "geometric", "suboptimality", 0.01)
    assert dataclasses.astuple(convex) == pytest.approx(expected)
    assert decay.at(400, 16) == pytest.approx(decay.X / 400 + decay.Y / 4 + decay.Z)
    assert convex.at(400, 16) == pytest.approx(1.5 * math.exp(-4) + convex.Y / 4 + floor)


@pytest.mark.parametrize("star_convex", [False, True])
def test_a_scale_is_a_longer_step_and_a_wider_ball(star_convex):
    scaled = bound(Setting(0.01, 0.9, weight_decay=0.6, scale=3.0), PROBLEM, star_convex=star_convex)
    plain = bound(Setting(0.03, 0.9, weight_decay=0.2), PROBLEM, star_convex=star_convex)
    for name in ("X", "Y", "Z", "rate"):
        assert getattr(scaled, name) == pytest.approx(getattr(plain, name))


@cases(
    "momentum, plain, nesterov",
    [(0.0, 2304, 2304), (0.7, 407, 697), (0.9, 121, 163), (0.95, 59, 70), (0.99, 11.6, 12.0), (0.999, 1.15, 1.15)],
)
def test_numbers_of_the_best_batch_size(momentum, plain, nesterov):
    """ν = 32 and room c = 2: 9 s² ν² / c²."""
    for expected, ahead in ((plain, False), (nesterov, True)):
        found = dataclasses.replace(bound(Setting(1e-9, momentum, nesterov=ahead), PROBLEM), Z=0.0)
        assert found.best_batch(2.0) == pytest.approx(expected, rel=0.01)


def test_momentum_moves_the_best_batch_size_both_ways():
    """Less noise, but more lag, and from some momentum on the lag wins; without lag (Z = 0) it is monotone."""
    found = [bound(Setting(1e-4, beta, nesterov=False), PROBLEM) for beta in (0.9, 0.99, 0.999, 0.9995)]
    best = [each.best_batch(2.0) for each in found]
    assert best[0] > best[1]
    assert best[2] < best[3]
    lowest = [dataclasses.replace(each, Z=0.0).best_batch(2.0) for each in found]
    assert lowest == sorted(lowest, reverse=True)
    assert all(low < above for low, above in zip(lowest, best, strict=True))


@given(X=positive, Y=positive, room=positive)
@settings(max_examples=100, deadline=None)
def test_the_best_batch_size_of_the_bound(X, Y, room):
    """2.25 b_min, 3 K_∞, 27 X Y² / (4 c³); where it is met, the bound equals the target."""
    b = Bound(X, Y, Z=0.5)
    found = b.critical(room + 0.5)
    c = (room + 0.5) - 0.5
    assert found.status == "reachable"
    assert found.least == pytest.approx((Y / c) ** 2)
    assert found.best == pytest.approx(2.25 * found.least)
    assert found.steps == pytest.approx(3 * X / c)
    assert found.sfo == pytest.approx(27 * X * Y**2 / (4 * c**3))
    assert b.sfo(room + 0.5, found.best) == pytest.approx(found.sfo)
    assert b.at(found.steps, found.best) == pytest.approx(room + 0.5)


@given(t=st.fractions(-50, 50), y=st.fractions(-50, 50))
def test_the_identity_behind_it(t, y):
    """4 (t + Y)³ - 27 Y² t = (2t - Y)² (t + 4Y) >= 0, with t = c√b - Y: b K(b) is smallest at t = Y / 2."""
    assert 4 * (t + y) ** 3 == 27 * y**2 * t + (2 * t - y) ** 2 * (t + 4 * y)


CURVES = [PowerCurve(7.0, 11.0, p, q) for p, q in itertools.product((0.3, 0.5, 1.0, 2.0), (0.5, 1.0, 2.0))]
CURVES += [LogCurve(0.01, ratio, 11.0) for ratio in (1.001, 2.0, 16.7, 1e6)]


@cases("curve", CURVES)
def test_the_cost_falls_to_its_one_minimum_and_rises(curve):
    grid = [curve.least * (1 + 10 ** (e / 200)) for e in range(-1600, 801)]
    cost = [b * curve.steps(b) for b in grid]
    lowest = min(range(len(cost)), key=cost.__getitem__)
    assert grid[lowest] == pytest.approx(curve.best, rel=0.02)
    assert curve.best * curve.steps_at_best <= cost[lowest] * (1 + 1e-12)
    assert curve.steps(curve.best) == pytest.approx(curve.steps_at_best)
    assert cost[: lowest + 1] == sorted(cost[: lowest + 1], reverse=True)
    assert cost[lowest:] == sorted(cost[lowest:])
    assert curve.steps(curve.least) == curve.steps(0.5 * curve.least) == math.inf


@pytest.mark.parametrize(("p", "q", "times"), [(0.5, 1, (2.25, 3)), (1.0, 1, (2, 2)), (0.5, 2, (4, 4))])
def test_the_three_named_rows_of_the_family(p, q, times):
    curve = PowerCurve(7.0, 11.0, p, q)
    assert (curve.best / 11, curve.steps_at_best / 7) == pytest.approx(times)


def test_the_cost_is_not_convex():
    """Beyond 9 b_min it is concave; before, convex."""
    curve = PowerCurve(1.0, 1.0)

    def bend(b):
        return sum(w * (b + h) * curve.steps(b + h) for h, w in ((-0.01, 1), (0, -2), (0.01, 1)))

    assert bend(8.0) > 0 > bend(10.0)


def test_numbers_of_the_geometric_bound():
    found = Bound(5.0, 1.0, 0.2, "geometric", "suboptimality", 0.01).critical(0.5)
    assert (found.least, found.best) == pytest.approx((11.11, 13.33), abs=0.01)
    u = math.sqrt(found.best / found.least)
    u = 1 / (u - 1)
    assert u == pytest.approx(10.51, abs=0.01)
    lambert = -(u + 1) / 2  # W e^W = -c e^(-1/2) / (2 X) on the branch below -1
    assert lambert * math.exp(lambert) == pytest.approx(-0.3 * math.exp(-0.5) / 10)
    b = Bound(5.0, 1.0, 0.2, "geometric", "suboptimality", 0.01)
    assert b.at(found.steps, found.best) == pytest.approx(0.5)


def test_lambert_agrees_with_scipy():
    from scipy.special import lambertw

    for ratio in (1.0001, 1.5, 10.0, 1e9):
        u = -2 * lambertw(-math.exp(-0.5) / (2 * ratio), -1).real - 1
        assert LogCurve(0.1, ratio, 3.0).best == pytest.approx(3.0 * (1 + 1 / u) ** 2, rel=1e-12)


def test_the_older_shape():
    """Y of the weights' second moment; decay adds to it, and b* = 2 Y / c."""
    values = [inverse_batch_noise(Setting(0.02, beta, weight_decay=0.1), sigma=1.0) * 2 for beta in (0.7, 0.95, 0.99)]
    assert values == pytest.approx([0.82, 0.245, 0.1298])
    assert inverse_batch_noise(Setting(0.02, 0.95), sigma=2.0) == pytest.approx(0.29)
    found = Bound(3.0, 1.0, 0.5, shape="1/b").critical(1.0)
    assert (found.least, found.best, found.steps, found.sfo) == pytest.approx((2.0, 4.0, 12.0, 48.0))
    assert Bound(3.0, 1.0, 0.5, shape="1/b").at(12.0, 4.0) == pytest.approx(1.0)


def test_without_noise_every_batch_size_does():
    for b in (Bound(2.0, 0.0, 0.5), Bound(2.0, 0.0, 0.5, "geometric", "suboptimality", 0.1)):
        found = b.critical(1.0)
        assert (found.least, found.best, found.sfo) == (0.0, 0.0, 0.0)
        assert found.steps == b.steps(1.0, 1.0) == b.steps(1.0, 1e9)


@pytest.mark.parametrize("star_convex", [False, True])
def test_the_remedy_for_a_target_below_the_floor_works(star_convex):
    setting = Setting(0.02, 0.9, nesterov=False, weight_decay=0.5)
    refused = bound(setting, PROBLEM, star_convex=star_convex)
    found = refused.critical(0.5)
    assert found.status == "below the floor"
    assert [found.least, found.best, found.steps, found.sfo] == [None] * 4
    factor = float(re.search(r"lower lr to less than ([\d.e-]+) times", found.text).group(1))
    for share, status in ((0.99, "reachable"), (1.01, "below the floor")):
        slower = dataclasses.replace(setting, lr=0.02 * factor * share)
        assert bound(slower, PROBLEM, star_convex=star_convex).critical(0.5).status == status
    with pytest.raises(
        ValueError, match=r"no batch size to offer: no batch size is large enough: the target 0\.5 is not"
    ):
        refused.steps(0.5, 64)


def test_a_start_that_is_good_enough_is_said_to_be():
    good = Bound(1.0, 0.5, 0.2, "geometric", "suboptimality", 0.1)
    found = good.critical(1.3)
    assert found.status == "already there"
    assert "the bound meets 1.3 before the first step if batches are large" in found.text
    assert good.critical(1.19).status == "reachable"


@cases(
    "call, message",
    [
        (lambda: Setting(0.0), "Setting: lr must be finite and above 0, got 0.0"),
        (lambda: Setting(math.nan), "Setting: lr must be finite and above 0, got nan"),
        (lambda: Setting(0.1, weight_decay=-1.0), "Setting: weight_decay must be finite and at least 0, got -1.0"),
        (lambda: Setting(0.1, momentum=1.0), "momentum must be in [0, 1), got 1.0"),
        (lambda: Problem(1.0, 1.0, -1.0, 1.0), "Problem: gap must be finite and at least 0, got -1.0"),
        (lambda: Bound(1.0, math.inf, 0.0), "Bound: Y must be finite and at least 0, got inf"),
        (lambda: Bound(1.0, 1.0, 0.0, "1/sqrt"), "Unknown shape '1/sqrt': did you mean '1/sqrt(b)'?"),
        (lambda: Bound(1.0, 1.0, 0.0, "geometric"), "rate in (0, 1] with shape='geometric' only, got 0.0"),
        (lambda: Bound(1.0, 1.0, 0.0, rate=0.1), "rate in (0, 1] with shape='geometric' only, got 0.1"),
        (lambda: Bound(1.0, 1.0, 0.0).at(0, 8), "A bound takes steps and a batch size above 0, got 0 and 8"),
        (lambda: Bound(1.0, 1.0, 0.0).at(8, -1), "A bound takes steps and a batch size above 0, got 8 and -1"),
        (lambda: Bound(1.0, 1.0, 0.0).critical(0.0), "A target must be a finite number above 0, got 0.0"),
        (
            lambda: bound(Setting(3.0, weight_decay=0.5), PROBLEM),
            "There is no bound for lr * weight_decay = 1.5 above 1; lower lr to at most 1 / weight_decay = 2.",
        ),
        (lambda: bound(Setting(0.1), PROBLEM, star_convex=True), "star-convex bound needs weight_decay above 0"),
        (
            lambda: inverse_batch_noise(Setting(0.1), sigma=-1.0),
            "sigma must be finite and at least 0, got -1.0",
        ),
    ],
)
def test_wrong_input_is_refused(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
