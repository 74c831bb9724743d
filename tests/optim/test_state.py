"""What is kept of a parameter: made at once for all, declared by stages, and remade while nothing is in it."""

import gc
import weakref
from typing import ClassVar

import pytest
import torch
from torch import nn

from steepest import AdaInf, Entry, InputMoment, Muon, NewtonMuon, RowScaling, Stage
from steepest.testing import backward, network


def pair():
    """Two matrices, of which the second has no gradient."""
    weights = [nn.Parameter(torch.ones(4, 3)) for _ in range(2)]
    weights[0].grad = torch.ones(4, 3)
    return weights


@pytest.mark.parametrize("stages", [[], [RowScaling()]], ids=repr)
def test_all_that_can_be_trained_has_its_state_from_the_first_step_on(stages):
    model = network()
    frozen = model[5].weight.requires_grad_(False)
    optimizer = Muon(model, stages=stages)
    backward(model, 0)
    model[0].weight.grad = None
    optimizer.step()
    kept = {key for state in optimizer.state.values() for key in state}
    assert optimizer.state.keys() == set(model.parameters()) - {frozen}
    assert kept == {"step", "momentum_buffer", "second_moment", *({"row_moment"} if stages else ())}
    assert int(optimizer.state[model[0].weight]["step"]) == 0
    for parameter, state in optimizer.state.items():
        assert state["momentum_buffer"].shape == parameter.shape


@pytest.mark.parametrize("change", ["shape", "dtype", "norm"])
def test_what_nothing_was_averaged_into_may_still_change(change):
    first, idle = pair()
    optimizer = Muon([{"params": [first]}, {"params": [idle]}], stages=[RowScaling()])
    optimizer.step()
    if change == "norm":
        optimizer.param_groups[1]["norm"] = AdaInf()
    else:
        idle.data = torch.ones(6, 3) if change == "shape" else idle.data.double()
    idle.grad = torch.ones_like(idle)
    optimizer.step()
    assert int(optimizer.state[idle]["step"]) == 1
    assert optimizer.state[idle]["momentum_buffer"].shape == idle.shape
    assert optimizer.state[idle]["momentum_buffer"].dtype == (torch.float64 if change == "dtype" else torch.float32)


def test_entries_of_stages_must_fit_a_parameter_that_has_grown():
    weight, _ = pair()
    optimizer = Muon([weight], stages=[RowScaling()])
    optimizer.step()
    weight.data = torch.ones(6, 3)
    weight.grad = torch.ones(6, 3)
    optimizer.state[weight]["momentum_buffer"] = torch.zeros(6, 3)
    with pytest.raises(ValueError, match=r"state 'row_moment' has \(4,\)"):
        optimizer.step()
    optimizer.state[weight]["row_moment"] = torch.zeros(6)
    optimizer.step()
    assert torch.isfinite(weight).all()


def test_a_replaced_parameter_is_let_go():
    weight, new = pair()
    optimizer = Muon([weight])
    optimizer.step()
    gone = weakref.ref(weight)
    optimizer.param_groups[0]["params"] = [new]
    del weight
    for _ in range(2):
        new.grad = torch.ones(4, 3)
        optimizer.step()
    gc.collect()
    assert gone() is None


class Counting(Stage):
    """Counts its calls, in integers."""

    prefix = "counting_"
    group_keys: ClassVar = {"counting_calls": 0}

    def entries(self, row):
        return (Entry("counting_number", torch.Size([2]), dtype=torch.int64),)

    def after(self, load, directions, states, accept):
        for state in states:
            state["counting_number"] += 1
        return directions

    def load(self, states, groups):
        assert groups[0]["counting_calls"] == 0


def test_entries_of_any_type_are_saved_and_loaded():
    weight, _ = pair()
    optimizer = Muon([weight], stages=[Counting()])
    optimizer.step()
    state = optimizer.state_dict()
    other = Muon([weight], stages=[Counting()])
    other.load_state_dict(state)
    assert other.state[weight]["counting_number"].tolist() == [1, 1]
    state["state"][0]["counting_number"] = torch.ones(2)
    with pytest.raises(TypeError, match=r"torch.float32, but a tensor of torch.int64 is needed"):
        other.load_state_dict(state)
    plain = Muon([weight]).state_dict()
    del plain["param_groups"][0]["decay_kind"]  # as from before there were kinds
    other.load_state_dict(plain)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("prefix", "", "must begin with"),
        ("prefix", "other_", "must begin with"),
        ("prefix", "row_x_", "keep their state under names that begin with 'row_x_' and 'row_'"),
        ("entries", lambda self, row: (Entry("momentum_buffer"),), "must begin with the stage's prefix"),
        ("entries", lambda self, row: (Entry("counting_a"), Entry("counting_a")), "be declared once"),
        ("group_keys", {"lr": 5.0}, "has the group key 'lr', which must begin with its prefix"),
    ],
)
def test_a_stage_keeps_to_its_own_names(name, value, message, monkeypatch):
    monkeypatch.setattr(Counting, name, value)
    with pytest.raises(ValueError, match=message):
        Muon(pair(), stages=[Counting()])


def test_what_is_at_work_for_one_optimizer_is_refused_by_another():
    optimizer = NewtonMuon(network(), precondition=InputMoment(structure="full"))
    with pytest.raises(ValueError, match=r"is at work for another optimizer\. Give the options, InputMoment"):
        Muon(network(), stages=optimizer.stages)


def test_a_row_whose_square_is_nothing_spoils_nothing():
    weight = nn.Parameter(torch.ones(8, 2))
    optimizer = Muon([weight], stages=[RowScaling(eps=0.0)])
    weight.grad = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    weight.grad[3] *= 1e-25
    optimizer.step()
    assert optimizer.diagnostics()["skipped_steps"] == 0
    assert torch.isfinite(weight).all()


def test_no_gap_is_told_of_what_never_had_a_gradient():
    weights = pair()
    optimizer = Muon(weights, weight_decay=0.1)
    optimizer.step()
    gaps = [name for name in optimizer.diagnostics(weights=True) if name.endswith("frank_wolfe_gap")]
    assert gaps == ["weights/params[0]/frank_wolfe_gap"]
