"""Layers that come after the optimizer was built: they are added with their routing, or told of."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import steepest
from steepest import Adam, InputMoment, Momo, Muon, MuonMax, NewtonMuon, Stage, View
from tests.optim.training import powers_of


class Growing(nn.Module):
    """A table, blocks, and a head."""

    def __init__(self, depth):
        super().__init__()
        self.table = nn.Embedding(12, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)) for _ in range(depth))
        self.out = nn.Linear(8, 12)

    def forward(self, tokens):
        x = self.table(tokens)
        for block in self.blocks:
            x = x + block(x)
        return self.out(x)


def grown(make, *, later):
    """A model of two blocks, whose second one comes `later` or from the start, and its optimizer."""
    torch.manual_seed(0)
    model = Growing(2)
    last = model.blocks.pop(1) if later else None
    optimizer = make(model)
    if last is not None:
        model.blocks.append(last)
        optimizer.add_module(last)
    return model, optimizer


def steps(model, optimizer, count=4):
    for step in range(count):
        tokens = torch.randint(12, (4, 6), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(tokens).transpose(1, 2), tokens)
        loss.backward()
        optimizer.step(loss=loss)
    return [p.detach().clone() for p in model.parameters()]


MAKERS = {
    "muon": lambda model: Muon(model, lr=0.02, weight_decay=0.1),
    "momo": lambda model: MuonMax(model, lr=1.0, step_size=Momo(0.5)),
    "newton": lambda model: NewtonMuon(model, precondition=InputMoment(structure="full", every=2)),
    "roles": lambda model: Muon(
        model,
        precondition=InputMoment(
            structure="full", every=2, on="gradient", exponents=(0.5, 0), roles=("matrix", "head", "embedding")
        ),
    ),
    "adam": Adam,
}


@pytest.mark.parametrize("name", MAKERS)
def test_layers_that_were_added_train_as_those_that_were_there(name):
    ends = [steps(*grown(MAKERS[name], later=later)) for later in (False, True)]
    for there, added in zip(*ends, strict=True):
        torch.testing.assert_close(there, added, rtol=2e-5, atol=2e-6)


def test_layers_join_the_groups_of_their_roles_under_their_names_in_the_model():
    model, optimizer = grown(MAKERS["muon"], later=True)
    assert [group["name"] for group in optimizer.param_groups] == ["matrix", "embedding", "head", "vector"]
    assert optimizer.param_groups[0]["param_names"] == ["blocks.0.0.weight", "blocks.1.0.weight"]
    assert optimizer.plan.row("blocks.1.0.weight").role == "matrix"  # its last matrix, but no output head
    assert optimizer.plan.counts() == steepest.route(model).counts()


def test_options_make_groups_of_their_own():
    torch.manual_seed(0)
    model = Growing(1)
    optimizer = Muon(model, lr=0.02)
    added = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 8))
    rows = optimizer.add_module(added, "adapter", overrides={"adapter.1.weight": "matrix"}, lr=0.5)
    assert [row.name for row in rows] == [f"adapter.{n}" for n in ("0.weight", "0.bias", "1.weight", "1.bias")]
    assert [(group["name"], group["lr"]) for group in optimizer.param_groups[4:]] == [
        ("matrix 2", 0.5),
        ("vector 2", 0.5),
    ]
    assert optimizer.param_groups[4]["param_names"] == ["adapter.0.weight", "adapter.1.weight"]
    before = [p.detach().clone() for p in added.parameters()]
    for parameter in added.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, added.parameters(), strict=True))


def test_inputs_of_added_layers_are_seen_when_it_is_their_turn():
    model, optimizer = grown(MAKERS["newton"], later=True)
    steps(model, optimizer, 3)
    assert powers_of(optimizer, model.blocks[1][0].weight) is not None
    assert optimizer.diagnostics()["input_missing"] == 0


def test_a_saved_state_goes_on_where_layers_are_added_in_the_same_order():
    model, optimizer = grown(MAKERS["newton"], later=True)
    steps(model, optimizer, 3)
    twin, other = grown(MAKERS["newton"], later=True)
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for a, b in zip(steps(model, optimizer, 2), steps(twin, other, 2), strict=True):
        assert torch.equal(a, b)


class Refusing(Stage):
    """Takes no more layers."""

    prefix = "refusing_"

    def added(self, rows):
        raise ValueError(f"no more than {len(rows)}")


def test_layers_that_one_stage_refuses_are_looked_at_by_no_other():
    torch.manual_seed(0)
    model = Growing(1)
    optimizer = NewtonMuon(model, precondition=InputMoment(structure="full"), stages=[Refusing()])
    readers = len(optimizer.stages[0].readers)
    with pytest.raises(ValueError, match="no more than 1"):
        optimizer.add_module(nn.Linear(8, 8))
    assert len(optimizer.stages[0].readers) == readers


@pytest.mark.parametrize("scheduler", [torch.optim.lr_scheduler.CosineAnnealingLR, torch.optim.lr_scheduler.StepLR])
def test_schedulers_that_were_there_go_on(scheduler):
    torch.manual_seed(0)
    model = Growing(1)
    optimizer = Muon(model, lr=0.02)
    schedule = scheduler(optimizer, 4)
    steps(model, optimizer, 1)
    model.blocks.append(nn.Linear(8, 8))
    optimizer.add_module(model.blocks[-1])
    steps(model, optimizer, 1)
    schedule.step()


def raised(kind, message, call):
    with pytest.raises(kind, match=message):
        call()


def test_what_cannot_be_added_changes_nothing():
    model, optimizer = grown(MAKERS["muon"], later=False)
    groups = [dict(group) for group in optimizer.param_groups]
    raised(TypeError, "add_module: module must be a torch.nn.Module, got 3", lambda: optimizer.add_module(3))
    raised(ValueError, "all parameters of Linear are in the optimizer already", lambda: optimizer.add_module(model.out))
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    raised(ValueError, "lr must be finite and at least 0, got -1", lambda: optimizer.add_module(module, lr=-1))
    raised(ValueError, "momentum", lambda: optimizer.add_module(module, momentm=1))
    module.half_of = nn.Parameter(torch.zeros(2, 3, 4))
    raised(
        ValueError,
        "View .split=7. does not fit",
        lambda: optimizer.add_module(module, overrides={"half_of": View(split=(7,))}),
    )
    assert [dict(group) for group in optimizer.param_groups] == groups
    steps(model, optimizer, 1)


def test_which_of_two_groups_is_meant_must_be_said():
    _, optimizer = grown(MAKERS["muon"], later=False)
    optimizer.add_module(nn.Linear(3, 3), lr=0.1)
    with pytest.raises(ValueError, match="the role 'matrix' has the groups 'matrix', 'matrix 2'"):
        optimizer.add_module(nn.Linear(3, 3))


# What happens to a model after its optimizer was built, so that a step does not train all of it.
LATER = {
    "adapters": lambda model: model.blocks.append(nn.Linear(8, 8)),
    "replaced": lambda model: setattr(model.out, "weight", nn.Parameter(model.out.weight.detach().clone())),
}


@pytest.mark.parametrize("name", LATER)
def test_parameters_of_the_model_that_are_not_in_the_optimizer_are_told_of_at_the_first_step(name):
    torch.manual_seed(0)
    model = Growing(1)
    optimizer = Muon(model)
    LATER[name](model)
    with pytest.warns(UserWarning, match=r"not in the optimizer will never be trained: '(blocks\.1|out)\.weight'"):
        steps(model, optimizer, 1)
    steps(model, optimizer, 4)  # once


def test_parameters_that_are_not_in_the_optimizer_are_told_of_where_it_has_no_gradient_at_all():
    """As where adapters come later, and all else is frozen for them."""
    model = nn.ModuleList([nn.Linear(8, 8)])
    optimizer = Muon(model)
    model.requires_grad_(False).append(nn.Linear(8, 8))
    model[1](torch.ones(8)).sum().backward()
    with pytest.warns(UserWarning, match=r"not in the optimizer will never be trained: '1\.weight'"):
        optimizer.step()


def test_parameters_that_come_in_the_middle_of_a_training_are_told_of():
    torch.manual_seed(0)
    model = Growing(1)
    optimizer = Muon(model)
    steps(model, optimizer, 3)
    model.blocks.append(nn.Linear(8, 8))
    with pytest.warns(UserWarning, match="never be trained"):
        steps(model, optimizer, 8)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_nothing_is_told_where_all_is_well(how):
    torch.manual_seed(0)
    model = Growing(1)
    model.out.bias.requires_grad_(False)
    optimizer = Muon(model)
    model.out.bias.requires_grad_(True)  # it was known
    steps(model, optimizer, 2)
    del model
    how(optimizer)
    part = Growing(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own = Muon(part.blocks)  # of others, others take care
        steps(part, own, 1)
