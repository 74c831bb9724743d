"""What Momo is for, on a problem whose optimum is known: the learning rate may be wrong by decades.

An 8 x 6 weight and a bias fit a linear map exactly; inputs have scales from 1 to 0.1, and the smallest loss of every
batch is BEST. The bounds below are at least twice what was reached with other seeds of data and batches.
"""

from functools import lru_cache

import pytest
import torch
from torch import nn

from steepest import Fixed, Momo, MuonAdam, MuonMax

# Bounds above the loss are part of what is compared.
pytestmark = pytest.mark.filterwarnings("ignore:The loss was below:UserWarning")

BEST, STEPS = 2.0, 300
HUGE = [1e2, 1e3, 1e4, 1e5, 1e6]
# batch and momentum: exact gradients without an average, noisy gradients with one
SETTINGS = {"full": (None, 0.0), "noisy": (16, 0.9)}
# recipe, setting, excess loss that Momo stays below at every rate
REACHED = [
    (MuonAdam, "full", 1e-6),
    (MuonMax, "full", 5e-5),
    (MuonAdam, "noisy", 2e-5),
    (MuonMax, "noisy", 2e-4),
]


@lru_cache
def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 6, generator=generator, dtype=torch.float64) * torch.logspace(0, -1, 6, dtype=torch.float64)
    weight, bias = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((8, 6), (8,)))
    return x, x @ weight.T + bias


def loss_of(weight, bias, rows):
    x, y = data()
    return BEST + 0.5 * (x[rows] @ weight.T + bias - y[rows]).square().sum(1).mean()


def excess(recipe, setting, lr, step_size, *, dual="cached", seed=1):
    """Loss on all data above the smallest possible one, at the end or where it has left all bounds."""
    size, momentum = SETTINGS[setting]
    parameters = [nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in ((8, 6), (8,))]
    options = {"momentum": momentum, "betas": (momentum, 0.9), "polar": "svd", "dual": dual}
    optimizer = recipe(parameters, lr, adam_lr=lr / 10, step_size=step_size, **options)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        rows = slice(None) if size is None else torch.randint(0, 256, (size,), generator=generator)
        optimizer.zero_grad()
        loss = loss_of(*parameters, rows)
        if loss > 1e15:
            return loss.item()
        loss.backward()
        optimizer.step(loss=loss)
    with torch.no_grad():
        return loss_of(*parameters, slice(None)).item() - BEST


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "setting", "reached"), REACHED)
def test_momo_is_flat_over_four_decades_where_the_base_method_diverges(recipe, setting, reached):
    start = loss_of(torch.zeros(8, 6).double(), torch.zeros(8).double(), slice(None)).item() - BEST
    assert all(excess(recipe, setting, lr, Fixed()) > start for lr in HUGE[::2])
    finals = [excess(recipe, setting, lr, Momo(BEST)) for lr in HUGE]
    assert max(finals) < reached
    if setting == "noisy":  # full batches end in rounding errors, which differ
        assert max(finals) < 1.2 * min(finals)


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "reached"), [(MuonAdam, 2e-5), (MuonMax, 4e-4)])
def test_stale_dual_norms_are_as_flat(recipe, reached):
    finals = [excess(recipe, "noisy", lr, Momo(BEST), dual="stale") for lr in HUGE[::2]]
    assert max(finals) < reached
    assert max(finals) < 1.2 * min(finals)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [MuonAdam, MuonMax])
def test_at_a_small_rate_momo_is_the_base_method_whatever_the_bound(recipe):
    base = excess(recipe, "noisy", 1e-2, Fixed())
    for bound in (0.0, BEST):
        assert excess(recipe, "noisy", 1e-2, Momo(bound)) == base


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [MuonAdam, MuonMax])
@pytest.mark.parametrize("bound", [2.1, 2.5, 4.0])
def test_training_stops_at_a_lower_bound_that_is_too_high(recipe, bound):
    assert excess(recipe, "full", 1e3, Momo(bound)) == pytest.approx(bound - BEST, rel=1e-2)
