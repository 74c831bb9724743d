"""Checkpoints, copies and hooks: a run that goes on goes on exactly."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

from steepest import Muon, Spectral
from tests.optim.training import assert_same, backward, network, train


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


@pytest.mark.parametrize("stop", [0, 1, 3])
def test_resuming_anywhere_is_exact_to_the_bit(recipe, stop):
    model = network()
    expected = train(model, recipe(model), range(6))
    model = network()
    optimizer = recipe(model)
    train(model, optimizer, range(stop))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    model = network()
    train(model, recipe(model), [7])  # other weights, to be overwritten
    model.load_state_dict(saved["model"])
    optimizer = recipe(model)
    optimizer.load_state_dict(saved["optimizer"])
    assert_same(expected, train(model, optimizer, range(stop, 6)))


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
def test_copies_continue_on_their_own(recipe, clone):
    model = network()
    optimizer = recipe(model)
    train(model, optimizer, range(3))
    twin_model, twin = clone((model, optimizer))
    assert str(twin.plan) == str(optimizer.plan)
    expected = train(model, optimizer, range(3, 6))
    assert_same(expected, train(twin_model, twin, range(3, 6)))


def test_half_precision_models_resume_with_single_precision_state(recipe):
    model = network(torch.bfloat16)
    optimizer = recipe(model)
    for step in range(3):
        optimizer.zero_grad()
        backward(model, step, torch.bfloat16)
        optimizer.step()
    other = recipe(model)
    other.load_state_dict(state_dict=optimizer.state_dict())  # by keyword, as distributed checkpoints call it
    for p in model.parameters():
        assert_same([optimizer.state[p]], [other.state[p]])


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
