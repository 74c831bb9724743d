"""A matrix, or a row, whose gradient is zero comes to rest; one whose gradients are tiny goes on."""

import pytest
import torch
from torch import nn

from steepest import (
    Ada2,
    ColNorm,
    Frobenius,
    Momo,
    Muon,
    Nuclear,
    RowNorm,
    Schatten,
    Sign,
    Spectral,
    SteepestDescent,
    View,
)
from steepest.optim.guard import Guard
from tests.optim.training import assert_same

ROLE = {"role": "matrix", "view": View(experts=True)}
NORMS = {
    "spectral": Spectral(),
    "newton-schulz": Spectral(polar="newton-schulz", coefficients="jordan"),
    "gram": Spectral(polar="gram"),
    "svd": Spectral(polar="svd"),
    "row": RowNorm(),
    "col": ColNorm(),
    "sign": Sign(),
    "nuclear": Nuclear(),
    "schatten": Schatten(3.0),
}
OPTIONS = {
    "plain": {},
    "nesterov": {"nesterov": True},
    "momo": {"step_size": Momo(-1e6)},
    "direct": {"step_size": Momo(-1e6, bookkeeping="direct")},
    "sum": {"product": "sum"},
}
BETA, LAST = 0.7, 280 + 61  # after so many steps nothing may move any more


def gradient(step, dtype=torch.float32):
    return torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float32).to(dtype)


def idle(norm, dtype=torch.float32, steps=LAST + 5, **options):
    """The second of two experts has gradients in three steps only."""
    weight = nn.Parameter(torch.ones(2, 5, 4, dtype=dtype))
    optimizer = SteepestDescent(
        [{"params": [weight], **ROLE}], lr=0.5, momentum=BETA, norms={"matrix": norm}, **options
    )
    moved = []
    for step in range(steps):
        weight.grad = gradient(step, dtype)
        if step >= 3:
            weight.grad[1] = 0
        before = weight.detach().clone()
        optimizer.step(loss=1.0)
        moved.append((weight.detach() - before).abs().amax((1, 2)))
    return torch.stack(moved), optimizer.state[weight]["momentum_buffer"]


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
def test_an_idle_expert_comes_to_rest_under_every_norm(norm):
    moved, average = idle(NORMS[norm])
    assert (moved[:60, 1] > 0).all()  # while there is an average
    assert not moved[LAST:, 1].any()
    assert not average[1].any()
    assert (moved[:, 0] > 0).all()  # the other has gradients all the time


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS)
def test_an_idle_expert_comes_to_rest_with_every_option(options):
    moved, _ = idle(Spectral(), **OPTIONS[options])
    assert not moved[LAST:, 1].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_an_idle_expert_comes_to_rest_in_every_type(dtype):
    moved, average = idle(Sign(), dtype)
    assert not moved[LAST:, 1].any()
    assert not average[1].any()


@pytest.mark.parametrize("stale", [False, True])
def test_an_idle_expert_comes_to_rest_where_steps_are_masked(stale, monkeypatch):
    monkeypatch.setattr(Guard, "admit", lambda self, names, gradients, loss: torch.tensor(True))
    options = {"product": "hybrid", "regularized": True, "dual": "stale"} if stale else {}
    moved, average = idle(Sign(), **options)
    assert not moved[LAST:, 1].any()
    assert not average[1].any()


def test_the_row_of_a_token_seen_once_comes_to_rest():
    table = nn.Embedding(4, 3)
    optimizer = SteepestDescent(table, lr=0.01, momentum=BETA, norms={"embedding": Sign()})
    for step in range(LAST + 5):
        optimizer.zero_grad(set_to_none=False)
        table(torch.tensor([step % 3 if step else 3])).sum().backward()
        before = table.weight.detach()[3].clone()
        optimizer.step()
    assert torch.equal(table.weight.detach()[3], before)


@pytest.mark.parametrize("size", [1e-30, 1e-38])
@pytest.mark.parametrize("norm", [Spectral(), Sign(), Frobenius(), ColNorm(), Ada2()], ids=str)
def test_tiny_gradients_count_for_ever(norm, size):
    weight = nn.Parameter(torch.zeros(3, 4))
    optimizer = SteepestDescent([weight], lr=1.0, momentum=BETA, norms={"matrix": norm})
    for _ in range(150):
        weight.grad = size * (1 + torch.rand(3, 4))
        before = weight.detach().clone()
        optimizer.step()
        assert ((weight - before).abs() > 1e-2).any()


def test_going_on_from_a_checkpoint_forgets_at_the_same_step():
    def run(saved_at):
        weight = nn.Parameter(torch.ones(2, 5, 4))
        optimizer = Muon([{"params": [weight], **ROLE}], momentum=BETA)
        for step in range(LAST):
            if step == saved_at:
                saved = optimizer.state_dict()
                optimizer = Muon([{"params": [weight], **ROLE}], momentum=BETA)
                optimizer.load_state_dict(saved)
            weight.grad = gradient(step)
            weight.grad[1] = weight.grad[1] if step < 3 else 0
            optimizer.step()
        return weight.detach()

    assert_same([run(None)], [run(77)])
