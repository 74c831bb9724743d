"""Checkpoints, copies and hooks: a run that goes on goes on exactly."""

import copy
import warnings

import torch
from torch import nn

from steepest import Muon, Spectral
from tests.optim.training import assert_same, network, train


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
