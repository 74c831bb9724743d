"""Weights that something else wrote to are noticed; weights that came back the same are no change."""

import copy

import pytest
import torch
from torch import nn

from steepest import Adam, Momo, Muon, MuonAdam, MuonMax, PolarGrad
from steepest.optim.momo.arrivals import ENTRIES
from steepest.optim.momo.weights import NEVER, Changes
from tests.optim.training import assert_same, backward, network, snapshot

METHODS = {
    "muon": lambda model: Muon(model, 3.0, weight_decay=0.01, step_size=Momo(0.5)),
    "muon_adam": lambda model: MuonAdam(model, 3.0, step_size=Momo(0.5)),
    "muon_max": lambda model: MuonMax(model, 3.0, step_size=Momo(0.5)),
    "polar_grad": lambda model: PolarGrad(model, 3.0, step_size=Momo(0.5)),
    "adam": lambda model: Adam(model, 1.0, betas=(0.9, 0.9), step_size=Momo(0.5)),
}


def swap_copy(model, other):
    kept = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(other)
        for parameter, own in zip(model.parameters(), kept, strict=True):
            parameter.copy_(own)


def swap_foreach(model, other):
    parameters = list(model.parameters())
    kept = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        torch._foreach_mul_(parameters, other)
        torch._foreach_copy_(parameters, kept)


def swap_data(model, other):
    kept = [p.data for p in model.parameters()]
    for parameter in model.parameters():
        parameter.data = parameter.data * other
    for parameter, own in zip(model.parameters(), kept, strict=True):
        parameter.data = own


def swap_data_clone(model, other):
    kept = [p.data.clone() for p in model.parameters()]
    for parameter in model.parameters():
        parameter.data.mul_(other)
    for parameter, own in zip(model.parameters(), kept, strict=True):
        parameter.data = own


def swap_vector(model, other):
    kept = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    nn.utils.vector_to_parameters(kept * other, model.parameters())
    nn.utils.vector_to_parameters(kept, model.parameters())


def swap_state(model, other):
    kept = copy.deepcopy(model.state_dict())
    model.load_state_dict({name: other * value for name, value in kept.items()})
    model.load_state_dict(kept)


SWAPS = {
    "copy": swap_copy,
    "foreach": swap_foreach,
    "data": swap_data,
    "data_clone": swap_data_clone,
    "vector": swap_vector,
    "state_dict": swap_state,
}


def trained(method, between=None, steps=6):
    model = network()
    optimizer = METHODS[method](model)
    for step in range(steps):
        optimizer.zero_grad()
        optimizer.step(loss=backward(model, step))
        if between is not None and step % 2:
            between(model)
    return snapshot(model, optimizer), optimizer.diagnostics()


@pytest.mark.slow
@pytest.mark.parametrize("swap", SWAPS)
@pytest.mark.parametrize("method", METHODS)
def test_weights_that_come_back_the_same_are_no_change(method, swap):
    expected, numbers = trained(method)
    found, other = trained(method, lambda model: SWAPS[swap](model, 0.9))
    for ours, theirs in zip(expected, found, strict=True):
        assert_same(ours, theirs)
    assert numbers == other


def write(parameter):
    with torch.no_grad():
        parameter.mul_(1.01)


CHANGES = {
    "written": write,
    "data": lambda parameter: parameter.data.mul_(1.01),
    "data_assigned": lambda parameter: setattr(parameter, "data", parameter.data * 1.01),
    "transposed": lambda parameter: setattr(parameter, "data", (parameter.data.mT * 1.01).contiguous().mT),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("method", METHODS)
def test_other_values_are_found_however_they_were_written(method, change):
    model = network()
    optimizer = METHODS[method](model)
    for step in range(3):
        optimizer.zero_grad()
        optimizer.step(loss=backward(model, step))
    CHANGES[change](model[5].weight)
    optimizer.zero_grad()
    loss = backward(model, 3)
    with pytest.warns(UserWarning, match="Weights were changed since the last step") as told:
        optimizer.step(loss=loss)
    assert told[0].filename == __file__


def test_after_the_first_writing_a_single_entry_is_found():
    weight = torch.arange(10.0 * ENTRIES).reshape(ENTRIES, 10)
    changes = Changes()
    changes.note([weight])
    swap_copy(nn.ParameterList([weight]), 2.0)
    weight.copy_(weight.clone())
    assert not changes.found(warn=False)
    changes.note([weight])
    assert not changes.found(warn=False)
    weight[0, 1] += 1  # not among the entries looked at
    assert changes.found(warn=False)
    changes.note([weight])
    weight[0, 1] -= 1
    weight[0, 1] += 1
    assert not changes.found(warn=False)


def test_a_checkpoint_of_swapped_weights_starts_the_model_again():
    model = network()
    optimizer = METHODS["muon_adam"](model)
    for step in range(3):
        optimizer.zero_grad()
        optimizer.step(loss=backward(model, step))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)  # as an average of weights, for evaluation
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    assert saved[1]["param_groups"][0]["momo_weights"] == NEVER
    other = network()
    resumed = METHODS["muon_adam"](other)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    loss = backward(other, 3)
    with pytest.warns(UserWarning, match="Weights were changed since the last step"):
        resumed.step(loss=loss)
    assert resumed.diagnostics()["gap"] == pytest.approx(loss.item() - 0.5, abs=1e-6)


def test_a_parameter_without_a_gradient_may_change_the_set_but_not_the_answer():
    model = network()
    optimizer = METHODS["muon_adam"](model)
    for step in range(4):
        optimizer.zero_grad()
        loss = backward(model, step)
        if step % 2:
            model[0].weight.grad = None
        optimizer.step(loss=loss)
        swap_foreach(model, 3.0)
