"""Momo's own arithmetic, its options, and its way through checkpoints and outside changes."""

import copy
import io
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from steepest import Adam, Euclid, Fixed, Momo, Muon, MuonAdam, MuonMax, PolarGrad, SteepestDescent
from steepest.optim.step_size import MODEL_KEYS, truncated
from tests.optim.training import assert_same, backward, network, snapshot

METHODS = {
    "muon": lambda model, **o: Muon(model, 3.0, weight_decay=0.01, step_size=Momo(0.5), **o),
    "muon_max_stale": lambda model, **o: MuonMax(model, 3.0, dual="stale", step_size=Momo("auto"), **o),
    "polar_grad_direct": lambda model, **o: PolarGrad(model, 3.0, step_size=Momo(0.3, bookkeeping="direct"), **o),
    "adam": lambda model, **o: Adam(model, 1.0, betas=(0.9, 0.9), step_size=Momo(lambda step: 0.1 / (step + 1)), **o),
}


def train(model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        optimizer.step(loss=backward(model, step))


@given(st.floats(-1e30, 1e30), st.floats(0, 1e30))
def test_a_part_of_a_step_is_between_none_and_all(gap, decrease):
    t = truncated(torch.tensor(gap, dtype=torch.float64), torch.tensor(decrease, dtype=torch.float64)).item()
    assert 0 <= t <= 1
    if gap <= 0:
        assert t == 0
    elif decrease > 0:
        assert t == pytest.approx(min(1, gap / decrease))


def test_an_endless_gap_is_all_of_the_step_and_nothing_over_nothing_is_none():
    one, zero = torch.ones(()), torch.zeros(())
    assert truncated(one * math.inf, one) == 1
    assert truncated(zero, zero) == 0


@pytest.mark.parametrize("method", METHODS)
def test_a_run_goes_on_bit_for_bit_through_a_file(method):
    model = network()
    optimizer = METHODS[method](model)
    train(model, optimizer, range(4))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, range(4, 8))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = network()
    resumed = METHODS[method](other)
    resumed.load_state_dict(saved["optimizer"])  # before the weights: the order must not matter
    other.load_state_dict(saved["model"])
    train(other, resumed, range(4, 8))
    for ours, theirs in zip(snapshot(model, optimizer), snapshot(other, resumed), strict=True):
        assert_same(ours, theirs)
    assert optimizer.diagnostics() == resumed.diagnostics()


@pytest.mark.parametrize("method", METHODS)
def test_a_copy_goes_its_own_way(method):
    model = network()
    optimizer = METHODS[method](model)
    train(model, optimizer, range(3))
    pair = copy.deepcopy((model, optimizer))
    train(model, optimizer, range(3, 6))
    train(*pair, range(3, 6))
    for ours, theirs in zip(snapshot(model, optimizer), snapshot(*pair), strict=True):
        assert_same(ours, theirs)


def test_group_keys_exist_from_the_start_and_are_plain_numbers():
    optimizer = MuonAdam(network(), momo=True)
    for group in optimizer.param_groups:
        assert all(group[key] == 0.0 for key in MODEL_KEYS)
    assert all(key not in group for group in MuonAdam(network()).param_groups for key in MODEL_KEYS)


def test_states_with_and_without_momo_load_into_each_other():
    model = network()
    with_momo = MuonAdam(model, momo=True)
    train(model, with_momo, range(3))
    plain = MuonAdam(network())
    plain.load_state_dict(with_momo.state_dict())
    assert all(key not in group for group in plain.param_groups for key in MODEL_KEYS)
    other = network()
    plain = MuonAdam(other)
    train(other, plain, range(3))
    with_momo.load_state_dict(plain.state_dict())
    model.load_state_dict(other.state_dict())
    loss = backward(model, 5)
    with_momo.step(loss=loss)  # a model of the loss that starts here
    assert with_momo.diagnostics()["gap"] == pytest.approx(loss.item())


def test_weights_changed_outside_restart_the_model_with_a_warning():
    model = network()
    optimizer = MuonAdam(model, 3.0, step_size=Momo(0.5))
    train(model, optimizer, range(4))
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)
    optimizer.zero_grad()
    loss = backward(model, 4)
    with pytest.warns(UserWarning, match="Weights were changed since the last step"):
        optimizer.step(loss=loss)
    assert optimizer.diagnostics()["gap"] == pytest.approx(loss.item() - 0.5, abs=1e-6)
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)
    optimizer.step(loss=backward(model, 4))  # no second warning


def test_a_checkpoint_of_other_weights_restarts_the_model():
    model = network()
    optimizer = MuonAdam(model, 3.0, step_size=Momo(0.5))
    train(model, optimizer, range(4))
    state = optimizer.state_dict()
    fresh = network()
    resumed = MuonAdam(fresh, 3.0, step_size=Momo(0.5))
    resumed.load_state_dict(state)
    loss = backward(fresh, 4)
    with pytest.warns(UserWarning, match="Weights were changed since the last step"):
        resumed.step(loss=loss)
    assert resumed.diagnostics()["gap"] == pytest.approx(loss.item() - 0.5, abs=1e-6)


def test_direct_bookkeeping_needs_no_restart():
    model = network(torch.float64)
    optimizer = MuonAdam(model, 3.0, step_size=Momo(0.5, bookkeeping="direct"))
    for step in range(4):
        optimizer.zero_grad()
        optimizer.step(loss=backward(model, step, torch.float64))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.99)


def test_momo_needs_one_momentum():
    model = network()
    optimizer = Muon(model, betas=(0.8, 0.95), momo=True)
    loss = backward(model, 0)
    with pytest.raises(ValueError, match=r"one momentum for all groups.* got matrix 0\.95, .*0\.8"):
        optimizer.step(loss=loss)
    assert not optimizer.state
    Muon(model, momo=True).step(loss=loss)  # the default follows
    pair = [nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
    groups = [{"params": [pair[0]]}, {"params": [pair[1]], "momentum": 0.5}]
    optimizer = MuonAdam(groups, momo=True)
    pair[0].grad, pair[1].grad = torch.ones(2, 2), torch.ones(2, 2)
    with pytest.raises(ValueError, match=r"got matrix 0\.95, matrix 0\.5\. Give momentum="):
        optimizer.step(loss=1.0)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"lower_bound": "automatic"}, TypeError, "a number, a function or 'auto' as lower_bound, got 'automatic'"),
        ({"lower_bound": True}, TypeError, "as lower_bound, got True"),
        ({"lower_bound": math.nan}, ValueError, "below the loss, got nan"),
        ({"lower_bound": math.inf}, ValueError, "below the loss, got inf"),
        ({"bookkeeping": "recurent"}, ValueError, "Unknown bookkeeping 'recurent': did you mean 'recurrent'"),
    ],
)
def test_options_are_checked(options, kind, message):
    with pytest.raises(kind, match=message):
        Momo(**options)


def test_a_schedule_that_returns_nonsense_is_refused():
    model = network()
    optimizer = MuonAdam(model, step_size=Momo(lambda step: None))
    loss = backward(model, 0)
    with pytest.raises(TypeError, match="as lower_bound, got None"):
        optimizer.step(loss=loss)


def test_a_schedule_sees_the_number_of_steps_so_far():
    model = network()
    seen = []
    optimizer = MuonAdam(model, step_size=Momo(lambda step: seen.append(step) or 0.0))
    train(model, optimizer, range(3))
    resumed = MuonAdam(model, step_size=Momo(lambda step: seen.append(step) or 0.0))
    resumed.load_state_dict(optimizer.state_dict())
    train(model, resumed, range(1))
    assert seen == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"dual": "cache"}, ValueError, "Unknown dual 'cache': did you mean 'cached'"),
        ({"regularized": 1}, TypeError, "regularized must be True or False, got 1"),
        ({"product": "hybird"}, ValueError, "Unknown product 'hybird': did you mean 'hybrid'"),
        ({"product": Euclid("matrix", "vector")}, ValueError, "Unknown place in the product norm 'head'"),
    ],
)
def test_the_pieces_are_checked_when_the_optimizer_is_built(options, kind, message):
    with pytest.raises(kind, match=message):
        SteepestDescent(network(), **options)


def test_a_group_can_have_a_place_of_its_own(rng):
    a, b, c = (nn.Parameter(torch.randn(3, 4, generator=rng, dtype=torch.float64)) for _ in range(3))
    groups = [{"params": [a, b]}, {"params": [c], "name": "last"}]
    optimizer = SteepestDescent(
        groups, lr=0.1, product=Euclid("matrix", "last"), norms={"matrix": "frobenius"}, regularized=True
    )
    for p in (a, b, c):
        p.grad = torch.randn(3, 4, generator=rng, dtype=torch.float64)
    start, gradients = [p.detach().clone() for p in (a, b, c)], [p.grad.clone() for p in (a, b, c)]
    optimizer.step()
    for p, w, g in zip((a, b, c), start, gradients, strict=True):  # the Euclidean norm of all: gradient descent
        torch.testing.assert_close(p.detach(), w - 0.1 * g, rtol=1e-10, atol=1e-12)
    with pytest.raises(TypeError, match=r"name must be a text, .* got 3"):
        SteepestDescent([{"params": [a], "name": 3}])


def test_fixed_is_the_default():
    assert Fixed() == Fixed()
    model, other = network(), network()
    for net, optimizer in ((model, SteepestDescent(model)), (other, SteepestDescent(other, step_size=Fixed()))):
        backward(net, 0)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
