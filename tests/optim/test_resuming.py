"""Checkpoints, copies and hooks: a run that goes on goes on exactly."""

import copy
import warnings

import pytest
import torch
from torch import nn

from steepest import Frobenius, Momo, Muon, MuonMax, Spectral, SteepestDescent
from tests.cases import cases
from tests.optim.training import assert_same, backward, network, snapshot, train


def test_hooks_of_the_user_may_reorder_a_state_dict():
    first, second = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2, 2))
    saved = Muon([("a", first), ("b", second)])
    first.grad, second.grad = torch.full((2, 2), 1.0), torch.full((2, 2), 2.0)
    saved.step()
    optimizer = Muon([("b", second), ("a", first)])

    def by_name(target, state_dict):
        names = state_dict["param_groups"][0]["param_names"]
        order = [names.index(name) for name in target.param_groups[0]["param_names"]]
        state = {new: state_dict["state"][old] for new, old in enumerate(order)}
        return {**state_dict, "state": state}

    optimizer.register_load_state_dict_pre_hook(by_name)
    after = []
    optimizer.register_load_state_dict_post_hook(lambda o: after.append(o.state[first]["momentum_buffer"].clone()))
    optimizer.load_state_dict(saved.state_dict())
    assert torch.equal(optimizer.state[first]["momentum_buffer"], saved.state[first]["momentum_buffer"])
    assert torch.equal(after[0], saved.state[first]["momentum_buffer"])


def test_loaded_state_is_a_copy():
    model = network()
    optimizer = Muon(model)
    train(model, optimizer, [0])
    saved = optimizer.state_dict()
    other = Muon(model)
    other.load_state_dict(saved)
    weight = model[5].weight
    assert other.state[weight]["momentum_buffer"].data_ptr() != optimizer.state[weight]["momentum_buffer"].data_ptr()


def test_options_come_from_the_checkpoint_and_norms_from_the_optimizer():
    model = network()
    saved = Muon(model, lr=0.5, scale="none").state_dict()
    assert all(isinstance(group["norm"], str) for group in saved["param_groups"])
    optimizer = Muon(model, lr=0.1, scale="spectral")
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.param_groups[0]["norm"] == Spectral(scale="spectral")


def test_distributed_checkpoints_can_initialise_state():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    with warnings.catch_warnings():  # torch's own notices about its checkpoint format
        warnings.simplefilter("ignore")
        model = network()
        optimizer = Muon(model, weight_decay=0.1)
        before = [p.detach().clone() for p in model.parameters()]
        fresh = get_optimizer_state_dict(model, optimizer)
        assert_same(before, list(model.parameters()))
        optimizer = Muon(model, weight_decay=0.1)
        train(model, optimizer, range(3))
        saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
        expected = train(model, optimizer, range(3, 5))
        model = network()
        optimizer = Muon(model, weight_decay=0.1)
        train(model, optimizer, range(3))
        weights = copy.deepcopy(model.state_dict())
        optimizer = Muon(model, weight_decay=0.1)
        model.load_state_dict(weights)
        optimizer.zero_grad()
        set_optimizer_state_dict(model, optimizer, saved)
        assert fresh["state"].keys() == saved["state"].keys()
        assert_same(expected, train(model, optimizer, range(3, 5)))


# A step that fails leaves everything as it was, or says what it has changed.


def shape(model, _):
    model[7].weight.grad.data = torch.ones(4, 1)


def broadcast(model, _):
    model[5].bias.grad.data = torch.ones(())


def kind(model, _):
    model[7].weight.data = model[7].weight.data.double()
    model[7].weight.grad = torch.ones(4, 12, dtype=torch.float64)


def swapped(model, _):
    model[7].weight.data = torch.ones(3, 12)
    model[7].weight.grad = torch.ones(3, 12)


def complicated(model, _):
    model[7].weight.grad.data = torch.ones(4, 12, dtype=torch.complex64)


def sparse(model, _):
    model[7].weight.grad = torch.ones(4, 12).to_sparse()


def rate(_, optimizer):
    optimizer.param_groups[-1]["lr"] = -1.0


FAULTS = {
    "shape": (
        shape,
        ValueError,
        r"gradient of '7\.weight' has shape \(4, 1\) on cpu, but the param",
    ),
    "broadcast": (broadcast, ValueError, r"gradient of '5\.bias' has shape \(\)"),
    "kind": (kind, ValueError, r"became torch\.float64"),
    "swapped": (swapped, ValueError, r"'7\.weight' ha[sd] .*\(3, 12\)"),
    "complex": (
        complicated,
        TypeError,
        r"gradient of '7\.weight' must be of real floating point, got torch\.c",
    ),
    "sparse": (sparse, ValueError, "layout"),
    "rate": (rate, ValueError, "lr"),
}


@pytest.mark.slow
@cases("first", [True, False], ["first", "later"])
@cases("fault", FAULTS)
def test_what_can_be_seen_before_is_refused_before(recipe, fault, first):
    change, error, message = FAULTS[fault]
    model = network()
    optimizer = recipe(model)
    if not first:
        train(model, optimizer, range(2))
    if fault in ("kind", "swapped") and first:
        return  # the state is made for what is there then
    backward(model, 2)
    change(model, optimizer)
    before = snapshot(model, optimizer)
    with pytest.raises(error, match=message):
        optimizer.step()
    for part, other in zip(before, snapshot(model, optimizer), strict=True):
        assert_same(part, other)
    assert len(optimizer.state) == (0 if first else len(list(model.parameters())))


def bound_that_fails(calls):
    if calls == 2:
        raise RuntimeError("no bound today")
    return 0.0


def test_a_lower_bound_that_raises_changes_nothing():
    model = network()
    optimizer = MuonMax(model, step_size=Momo(bound_that_fails))
    for step in range(3):
        optimizer.zero_grad()
        loss = backward(model, step)
        before = snapshot(model, optimizer)
        if step < 2:
            optimizer.step(loss=loss)
    with pytest.raises(RuntimeError, match="no bound today") as raised:
        optimizer.step(loss=loss)
    for part, other in zip(before, snapshot(model, optimizer), strict=True):
        assert_same(part, other)
    assert not hasattr(raised.value, "__notes__")


class Failing(Frobenius):
    """A norm of a user, with a fault."""

    def lmo(self, m, /, v=None):
        raise KeyboardInterrupt


@pytest.mark.parametrize("together", [False, True])
def test_a_norm_that_raises_is_told_with_what_was_changed(together):
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    groups = [
        {"params": [("first", model[0].weight)], "role": "matrix"},
        {"params": [("second", model[1].weight)], "role": "head", "norm": Failing()},
    ]
    optimizer = SteepestDescent(groups, product="euclid" if together else "max")
    for parameter in model.parameters():
        parameter.grad = torch.ones(3, 3)
    with pytest.raises(KeyboardInterrupt) as raised:
        optimizer.step()
    (note,) = raised.value.__notes__
    assert "averages and counts of first, second hold the gradients of this step" in note
    assert ("weights of none have moved" if together else "weights of first have moved") in note


def test_state_made_in_inference_mode_serves_later_steps():
    model = network()
    optimizer = Muon(model)
    backward(model, 0)
    with torch.inference_mode():
        optimizer.step()
    train(model, optimizer, range(2))
