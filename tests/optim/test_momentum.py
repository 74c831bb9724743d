import pytest
import torch

from steepest.optim.momentum import FORGET_EVERY, average_, debias, forget_, look_ahead


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.95, 0.999])
def test_debiased_averages_are_weighted_means_with_weights_that_sum_to_one(beta, rng):
    values = torch.randn(30, 4, generator=rng, dtype=torch.float64)
    buffer = torch.zeros(4, dtype=torch.float64)
    for t in range(1, 31):
        average_([buffer], [values[t - 1]], beta)
        weights = (1 - beta) * beta ** torch.arange(t - 1, -1, -1, dtype=torch.float64)
        weights /= weights.sum()
        mean = (weights[:, None] * values[:t]).sum(0)
        torch.testing.assert_close(buffer / debias(beta, torch.tensor(float(t), dtype=torch.float64)), mean)


def test_debias_does_not_cancel_in_single_precision():
    for beta in (0.9, 0.999, 1 - 1e-6):
        exact = -torch.expm1(torch.tensor(3.0, dtype=torch.float64) * torch.tensor(beta, dtype=torch.float64).log())
        assert debias(beta, torch.tensor(3.0)).item() == pytest.approx(exact.item(), rel=1e-6)


def test_the_look_ahead_is_the_next_average_if_the_gradient_repeats(rng):
    beta, buffer = 0.9, torch.zeros(3, dtype=torch.float64)
    for _ in range(5):
        g = torch.randn(3, generator=rng, dtype=torch.float64)
        average_([buffer], [g], beta)
    (ahead,) = look_ahead([buffer], [g], beta)
    average_([buffer], [g], beta)
    torch.testing.assert_close(ahead, buffer, rtol=1e-14, atol=0)


def test_the_look_ahead_points_where_the_heavy_ball_form_points(rng):
    beta, average, total = 0.95, torch.zeros(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    for _ in range(8):
        g = torch.randn(6, generator=rng, dtype=torch.float64)
        average_([average], [g], beta)
        total = beta * total + g
        (ahead,) = look_ahead([average], [g], beta)
        torch.testing.assert_close(ahead / (1 - beta), g + beta * total, rtol=1e-12, atol=0)


def test_a_refused_value_leaves_every_bit(rng):
    buffer = torch.randn(5, generator=rng)
    before = buffer.clone()
    average_([buffer], [torch.full((5,), torch.nan)], 0.9, accept=torch.tensor(False))
    assert torch.equal(buffer, before)
    value = torch.randn(5, generator=rng)
    plain = before.clone()
    average_([buffer], [value], 0.9, accept=torch.tensor(True))
    average_([plain], [value], 0.9)
    assert torch.equal(buffer, plain)


def test_what_is_left_of_an_average_without_gradients_is_forgotten_and_small_gradients_are_not():
    small, none = torch.tensor([1e-38, -1e-40, 1e-44]), torch.zeros(3)
    buffer = torch.tensor([1e-37, 3e-37, 1.0])
    forget_([buffer], [small], 0.95)
    assert torch.equal(buffer, torch.tensor([1e-37, 3e-37, 1.0]))  # each entry has a gradient
    forget_([buffer], [none], 0.95, accept=torch.tensor(False))
    assert torch.equal(buffer, torch.tensor([1e-37, 3e-37, 1.0]))
    forget_([buffer], [none], 0.95, accept=torch.tensor(True))
    assert torch.equal(buffer, torch.tensor([0.0, 3e-37, 1.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("beta", [0.0, 0.9, 0.95, 0.99])
def test_an_average_without_gradients_ends(beta, dtype):
    buffer, none = torch.ones(4, dtype=dtype), torch.zeros(4, dtype=dtype)
    for step in range(round(84 / (1 - beta)) + 2 * FORGET_EVERY):
        average_([buffer], [none], beta)
        if step % FORGET_EVERY == 0:
            forget_([buffer], [none], beta)
    assert not buffer.any()
