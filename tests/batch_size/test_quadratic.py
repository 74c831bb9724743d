"""The bounds against Muon on a quadratic of which everything is known."""

import pytest
import torch

import steepest
from steepest.batch_size.ball import frank_wolfe_gap
from steepest.batch_size.bounds import Setting, bound
from tests.batch_size.quadratic import CURVATURE, FAN_IN, FAN_OUT, TARGET, Muons, gradient, loss, problem, steps_to
from tests.cases import cases

BATCHES = [1, 16, 256]
FOUR = [(False, 0.0), (True, 0.0), (False, 0.5), (True, 0.5)]


def nuclear(x):
    return torch.linalg.matrix_norm(x, ord="nuc")


def test_the_smoothness_and_the_noise_are_upper_bounds(rng):
    change = torch.randn(500, FAN_OUT, FAN_IN, generator=rng, dtype=torch.float64)
    ratio = nuclear(CURVATURE * change) / torch.linalg.matrix_norm(change, ord=2)
    assert ratio.max() <= problem().smoothness
    noise = nuclear(torch.randn(2000, FAN_OUT, FAN_IN, generator=rng, dtype=torch.float64)).mean()
    assert 0.9 * problem().noise < noise <= problem().noise
    orthogonal = torch.linalg.svd(change[:1], full_matrices=False)
    aligned = torch.eye(FAN_OUT, dtype=torch.float64) @ orthogonal.Vh  # H's own left vectors: equality
    assert nuclear(CURVATURE * aligned).item() == pytest.approx(problem().smoothness)


@pytest.mark.slow
@cases("nesterov, decay", FOUR)
@cases("momentum", [0.0, 0.9])
def test_every_run_is_below_the_bound_of_its_setting(nesterov, decay, momentum):
    muons, steps = Muons(BATCHES, lr=0.02, momentum=momentum, nesterov=nesterov, weight_decay=decay), 400
    total = torch.zeros(muons.seeds, len(BATCHES), dtype=torch.float64)
    largest = 0.0
    for _ in range(steps):
        total += frank_wolfe_gap(gradient(muons.weight), muons.weight, weight_decay=decay) / steps
        largest = max(largest, float(torch.linalg.matrix_norm(muons.weight, ord=2).max()))
        muons.step()
    setting = Setting(0.02, momentum, nesterov, decay)
    above = torch.tensor([bound(setting, problem()).at(steps, batch) for batch in BATCHES], dtype=torch.float64)
    assert (total <= above).all()
    ratio = above / total.mean(0)
    assert 3 < ratio.min() <= ratio.max() < (40 if momentum == 0.0 else 12)  # and yet the bound says something
    if decay:
        assert largest <= 1 / decay
        end = bound(setting, problem(), star_convex=True)
        assert (loss(muons.weight) <= torch.tensor([end.at(steps, batch) for batch in BATCHES])).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("nesterov", "expected"),
    [(False, [18_389, 15_744, 22_101, 36_267, 64_000]), (True, [11_008, 12_843, 19_840, 33_621, 60_075])],
)
def test_smallest_cost_is_inside_where_small_batches_never_arrive(nesterov, expected):
    """Momentum 0.9, mean gradient at 1: b K(b) has a minimum. The bound's floor is above 1: it says nothing here."""
    batches = [16, 32, 64, 128, 256, 512]
    steps = steps_to(1.0, Muons(batches, lr=0.02, momentum=0.9, nesterov=nesterov), cap=3000)
    assert steps[:, 0].isinf().all()
    cost = (steps.mean(0) * torch.tensor(batches)).tolist()[1:]
    assert cost[0] == pytest.approx(expected[0], rel=0.12)  # three standard errors of five seeds
    assert cost[1:] == pytest.approx(expected[1:], rel=0.04)
    best = cost.index(min(cost))
    assert best == expected.index(min(expected))
    assert cost[-1] > 3 * cost[best]
    found = bound(Setting(0.02, 0.9, nesterov), problem()).critical(1.0)
    assert found.status == "below the floor"


@pytest.mark.slow
def test_the_measured_order_of_momenta_is_not_that_of_the_bound():
    """Without momentum batches of 4 are best, with 0.9 those of 64: the drift counts, and bounds do not predict."""
    batches = [2, 4, 8, 16, 32]
    steps = steps_to(1.0, Muons(batches, lr=0.02, momentum=0.0, nesterov=False, seeds=3), cap=3000)
    assert steps[:, 0].isinf().all()
    cost = (steps.mean(0) * torch.tensor(batches)).tolist()[1:]
    assert cost == pytest.approx([5_844, 6_120, 7_429, 9_739], rel=0.1)
    assert cost[0] == min(cost)
    eps = 3.0
    none, some = (bound(Setting(0.002, beta, nesterov=False), problem()).best_batch(eps) for beta in (0.0, 0.9))
    assert none > 10 * some


def test_the_pure_loop_is_the_optimizer():
    """Weights after each step, and those of the sum in place of the average; with Nesterov and decay."""
    lr, beta, decay, steps = 0.02, 0.9, 0.5, 20
    muons = Muons([4], lr=lr, momentum=beta, nesterov=True, weight_decay=decay, seeds=1)
    weight = torch.nn.Parameter(torch.zeros(FAN_OUT, FAN_IN, dtype=torch.float64))
    optimizer = steepest.Muon([weight], lr=lr, momentum=beta, weight_decay=decay, polar="svd")
    summed, buffer = torch.zeros_like(weight.data), torch.zeros_like(weight.data)
    noise = torch.Generator().manual_seed(1)
    for _ in range(steps):
        seen = torch.randn(FAN_OUT, FAN_IN, generator=noise, dtype=torch.float64) / 2
        weight.grad = gradient(weight.detach()) + seen
        buffer = beta * buffer + gradient(summed) + seen
        u, _, vh = torch.linalg.svd(gradient(summed) + seen + beta * buffer, full_matrices=False)
        summed = (1 - lr * decay) * summed - lr * u @ vh
        optimizer.step()
        muons.step()
        torch.testing.assert_close(muons.weight[0, 0], weight.data, rtol=0, atol=1e-10)
        torch.testing.assert_close(summed, weight.data, rtol=0, atol=1e-10)


def test_without_momentum_nesterov_changes_nothing():
    plain, ahead = (Muons([4], lr=0.02, momentum=0.0, nesterov=nesterov) for nesterov in (False, True))
    for _ in range(10):
        plain.step()
        ahead.step()
    assert torch.equal(plain.weight, ahead.weight)


@pytest.mark.slow
def test_with_a_minimiser_outside_the_ball_the_gap_vanishes_and_the_gradient_does_not():
    """Without noise and with learning rates that fall: Frank-Wolfe."""
    decay, target = 1.0, 3.0 * TARGET
    assert torch.linalg.matrix_norm(target, ord=2) > 1.5 / decay
    weight = torch.nn.Parameter(torch.zeros_like(target))
    optimizer = steepest.Muon([weight], lr=1.0, momentum=0.0, weight_decay=decay, polar="svd")
    seen = []
    for step in range(3000):
        optimizer.param_groups[0]["lr"] = 2 / (step + 2)
        weight.grad = gradient(weight.detach(), target)
        seen.append(float(frank_wolfe_gap(weight.grad, weight.detach(), weight_decay=decay)))
        optimizer.step()
    remaining = gradient(weight.detach(), target)
    assert min(seen) >= -1e-12
    assert min(seen[-100:]) < 0.01 * seen[0]
    assert nuclear(remaining) > 0.2 * nuclear(gradient(torch.zeros_like(target), target))
    assert torch.linalg.matrix_norm(weight.detach(), ord=2) <= 1 / decay + 1e-12
