"""What stands in a group can be saved by anyone and read by torch's strict loader; the rest is refused there."""

import copy
import enum
import io
import pickle
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from steepest import AdaInf, Adam, Frobenius, Muon, NewtonMuon, Scaled, Sign, Spectral, SteepestDescent, View
from tests.optim.training import RECIPES, assert_same, backward, network, train

PLAIN = {type(None), bool, int, float, str, list, torch.Tensor}


def through_a_file(things):
    file = io.BytesIO()
    torch.save(things, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def kept(optimizer):
    """As Lightning's BaseFinetuning saves groups."""
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def test_groups_hold_plain_values(recipe):
    model = network()
    optimizer = recipe(model)
    train(model, optimizer, range(2))
    groups = kept(optimizer)
    assert {type(value) for group in groups for value in group.values()} <= PLAIN
    assert through_a_file(groups) == groups


class Role(enum.StrEnum):
    MATRIX = "matrix"


NUMBERS = {
    "lr float64": {"lr": np.logspace(-3, -1, 3)[1]},
    "lr float32": {"lr": np.float32(0.02)},
    "lr longdouble": {"lr": np.longdouble(0.02)},
    "lr array": {"lr": np.array(0.02)},
    "lr int": {"lr": np.int64(1)},
    "lr fraction": {"lr": Fraction(1, 50)},
    "momentum": {"momentum": np.float64(0.9)},
    "weight decay": {"weight_decay": np.float64(0.1)},
    "nesterov": {"nesterov": np.bool_(True)},
    "name": {"name": np.str_("mine")},
    "role": {"role": Role.MATRIX},
    "scheduler": {"initial_lr": np.float64(0.1)},
    "view": {"view": View(split=(2, 2))},
    "norm": {"norm": Scaled(Spectral(polar="svd"), np.float64(0.5))},
    "names": {"params": [(np.str_("w"), nn.Parameter(torch.ones(4, 3)))]},
}


@pytest.mark.parametrize("case", NUMBERS)
def test_numbers_of_numpy_and_enumerations_become_plain(case):
    group = {"params": [nn.Parameter(torch.ones(4, 3))], **NUMBERS[case]}
    for build in (lambda: Muon([group]), lambda: added(Muon([nn.Parameter(torch.ones(2, 2))]), group)):
        optimizer = build()
        assert {type(value) for own in kept(optimizer) for value in own.values()} <= PLAIN
        assert type(optimizer.param_groups[-1]["param_names"][0]) is str
        again = build()
        again.load_state_dict(through_a_file(optimizer.state_dict()))


def added(optimizer, group):
    optimizer.add_param_group(group)
    return optimizer


def test_numbers_that_a_scheduler_writes_become_plain():
    model = network()
    optimizer = Muon(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5 * (1 + np.cos(np.pi * t / 10)))
    train(model, optimizer, [0])
    scheduler.step()
    assert type(optimizer.param_groups[0]["lr"]) is np.float64
    saved = through_a_file(optimizer.state_dict())
    assert type(saved["param_groups"][0]["lr"]) is float
    scheduler.step()
    train(model, optimizer, [1])
    assert {type(value) for group in kept(optimizer) for value in group.values()} <= PLAIN


def test_what_cannot_be_read_back_is_refused_where_it_is_put():
    model = network()
    optimizer = Muon(model)
    backward(model, 0)
    optimizer.param_groups[1]["mine"] = object()
    with pytest.raises(TypeError, match=r"parameter group 1: mine is a object, which torch\.load\(weights_only=True\)"):
        optimizer.step()
    del optimizer.param_groups[1]["mine"]
    optimizer.step()
    optimizer.state[model[0].weight]["mine"] = frozenset({1.5})
    with pytest.raises(TypeError, match="mine is a frozenset"):
        optimizer.state_dict()


def test_own_entries_of_state_come_back():
    model = network()
    optimizer = Muon(model)
    train(model, optimizer, [0])
    optimizer.state[model[0].weight].update(count=np.int64(3), seen=torch.ones(2, dtype=torch.int32))
    other = Muon(model)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    state = other.state[model[0].weight]
    assert (state["count"], state["seen"].dtype) == (3, torch.int32)


class Own:
    """A norm of a user, which prints as Python's objects do."""

    adapts, matrix = False, False

    def __init__(self, length):
        self.length = length

    def primal(self, w, /, m=None, v=None):
        return Sign().primal(w) / self.length

    def dual(self, m, /, v=None):
        return Sign().dual(m) * self.length

    def lmo(self, m, /, v=None):
        return Sign().lmo(m) * self.length


def own_norms():
    parameters = [nn.Parameter(torch.zeros(2, 2)) for _ in range(2)]
    groups = [{"params": [p], "norm": Own(length)} for p, length in zip(parameters, (1.0, 3.0), strict=True)]
    optimizer = SteepestDescent(groups, lr=1.0)
    for parameter in parameters:
        parameter.grad = -torch.ones(2, 2)
    return optimizer, parameters


def test_norms_of_users_are_full_citizens():
    optimizer, parameters = own_norms()
    optimizer.step()
    assert [float(p.detach().max()) for p in parameters] == [1.0, 3.0]  # though both print alike
    other, _ = own_norms()
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    for clone in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        members = [group["params"][0] for group in clone.param_groups]
        for parameter in members:
            parameter.grad = -torch.ones(2, 2)
        clone.step()
        assert [float(p.detach().max()) for p in members] == [2.0, 6.0]


def test_a_norm_may_be_written_into_a_group_later_as_object_name_or_text():
    weight = nn.Parameter(torch.zeros(2, 2))
    optimizer = SteepestDescent([weight], lr=1.0, norms={"matrix": Sign()})
    for norm in (Frobenius(), "frobenius", "Frobenius()"):
        optimizer.param_groups[0]["norm"] = norm
        assert next(iter(optimizer.plan)).norm == "frobenius"
        before = weight.detach().clone()
        weight.grad = -torch.ones(2, 2)
        optimizer.step()
        torch.testing.assert_close(weight.detach() - before, torch.full((2, 2), 0.5))
        assert optimizer.param_groups[0]["norm"] == "Frobenius()"
    optimizer.param_groups[0]["norm"] = "frobenous"
    with pytest.raises(ValueError, match=r"parameter group 0: norm is 'frobenous'.*did you mean 'frobenius'"):
        optimizer.step()
    optimizer.param_groups[0]["norm"] = Own
    with pytest.raises(TypeError, match=r"parameter group 0: norm is <class .*norm must be a name or an object"):
        optimizer.step()


def test_groups_that_were_saved_can_be_assigned_to_a_new_optimizer():
    """As Lightning's BaseFinetuning does on resuming, before it loads the state."""

    def build():
        model = network()
        return model, Muon([("7.weight", model[7].weight)])

    model, optimizer = build()
    optimizer.add_param_group({"params": [("5.weight", model[5].weight)], "lr": 0.1, "view": View(split=(6, 6))})
    train(model, optimizer, range(2))
    groups = through_a_file([{**group, "params": group["param_names"]} for group in optimizer.param_groups])
    state = through_a_file(optimizer.state_dict())
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = train(model, optimizer, range(2, 4))
    other, resumed = build()
    named = dict(other.named_parameters())
    resumed.param_groups = [{**group, "params": [named[name] for name in group["params"]]} for group in groups]
    resumed.load_state_dict(state)
    other.load_state_dict(weights)
    assert_same(expected, train(other, resumed, range(2, 4)))
    assert str(next(row for row in resumed.plan if row.name == "5.weight").view) == "split=6+6"


def points(optimizer_of):
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(5, 4))
    optimizer = optimizer_of([("points", parameter)])
    parameter.grad = parameter.detach().clone()
    optimizer.step()
    return parameter, optimizer


ADAPTIVE = {"adam": lambda params: Adam(params, lr=0.1), "muon": lambda params: Muon(params, lr=0.1)}


@pytest.mark.parametrize("method", ADAPTIVE)
def test_a_grown_parameter_with_its_state_goes_on(method):
    """Densification of Gaussian splatting: rows are added, their state is zero."""
    parameter, optimizer = points(ADAPTIVE[method])
    grown = nn.Parameter(torch.cat([parameter.detach(), torch.randn(3, 4)]))
    state = optimizer.state.pop(parameter)
    for key in state.keys() - {"step"}:
        state[key] = torch.cat([state[key], torch.zeros(3, 4)])
    optimizer.param_groups[0]["params"][0] = grown
    optimizer.state[grown] = state
    again, built = grown.detach().clone().requires_grad_(), ADAPTIVE[method]
    reference = built([("points", again)])
    reference.state[again] = copy.deepcopy(state)
    for one, own in ((grown, optimizer), (again, reference)):
        one.grad = torch.ones(8, 4)
        own.step()
    assert torch.equal(grown, again)
    assert int(optimizer.state[grown]["step"]) == 2
    assert next(iter(optimizer.plan)).shape == (8, 4)
    assert next(iter(optimizer.plan)).name == "points"
    built([("points", grown)]).load_state_dict(through_a_file(optimizer.state_dict()))


@pytest.mark.parametrize("method", ADAPTIVE)
def test_a_replaced_parameter_without_state_starts_afresh(method):
    parameter, optimizer = points(ADAPTIVE[method])
    wider = nn.Parameter(torch.ones(5, 6))
    optimizer.param_groups[0]["params"] = [wider]
    optimizer.zero_grad()
    wider.grad = torch.ones(5, 6)
    optimizer.step()
    assert int(optimizer.state[wider]["step"]) == 1
    assert parameter not in optimizer.state  # nobody keeps what was replaced
    assert optimizer.diagnostics(weights=True)
    optimizer.load_state_dict(through_a_file(optimizer.state_dict()))


def test_a_parameter_that_grew_in_place_needs_its_state_grown():
    parameter, optimizer = points(ADAPTIVE["muon"])
    parameter.data = torch.ones(8, 4)
    parameter.grad = torch.ones(8, 4)
    with pytest.raises(ValueError, match=r"'points' has shape \(8, 4\), but its state 'momentum_buffer' has \(5, 4\)"):
        optimizer.step()
    del optimizer.state[parameter]
    optimizer.step()
    assert next(iter(optimizer.plan)).shape == (8, 4)


def test_a_state_that_does_not_fit_is_refused():
    parameter, optimizer = points(ADAPTIVE["adam"])
    grown = nn.Parameter(torch.ones(8, 4))
    optimizer.param_groups[0]["params"][0] = grown
    optimizer.state[grown] = optimizer.state.pop(parameter)
    grown.grad = torch.ones(8, 4)
    with pytest.raises(ValueError, match=r"'points' has shape \(8, 4\), but its state 'momentum_buffer' has \(5, 4\)"):
        optimizer.step()
    optimizer.state[grown] = {"momentum_buffer": torch.zeros(8, 4), "second_moment": torch.zeros(8, 4)}
    with pytest.raises(ValueError, match="'points' came without add_param_group and with a state that has no 'step'"):
        optimizer.step()
    optimizer.state[grown]["step"] = 3
    optimizer.step()
    assert int(optimizer.state[grown]["step"]) == 4


WHAT_ASKS = {
    "step": lambda o: o.step(),
    "plan": lambda o: o.plan,
    "state_dict": lambda o: o.state_dict(),
    "load_state_dict": lambda o: o.load_state_dict(o.state_dict()),
    "diagnostics": lambda o: o.diagnostics(weights=True),
    "add_param_group": lambda o: o.add_param_group({"params": [nn.Parameter(torch.ones(3, 3))]}),
}


@pytest.mark.parametrize("ask", WHAT_ASKS)
def test_whoever_asks_is_told_of_a_parameter_that_cannot_be_known(ask):
    weight = nn.Parameter(torch.ones(3, 4))
    optimizer = Muon([weight])
    stranger = nn.Parameter(torch.ones(2, 3, 4))
    stranger.grad = torch.ones(2, 3, 4)
    optimizer.param_groups[0]["params"].append(stranger)
    with pytest.raises(ValueError, match=re.escape("'parameter group 0[1]' of shape (2, 3, 4) came into")) as told:
        WHAT_ASKS[ask](optimizer)
    assert "add_param_group" in str(told.value)
    optimizer.param_groups[0]["params"].pop()
    WHAT_ASKS[ask](optimizer)


@pytest.mark.parametrize("ask", WHAT_ASKS)
def test_whoever_asks_is_told_of_a_group_that_is_not_whole(ask):
    weight, other = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(3, 4))
    other.grad = torch.ones(3, 4)
    optimizer = Muon([weight])
    optimizer.param_groups.append({"params": [other], "lr": 0.1})
    with pytest.raises(ValueError, match="parameter group 1 has no 'beta2': it came into param_groups without add_pa"):
        WHAT_ASKS[ask](optimizer)


def test_a_parameter_in_two_groups_is_refused():
    weight = nn.Parameter(torch.ones(3, 4))
    weight.grad = torch.ones(3, 4)
    optimizer = Muon([weight])
    optimizer.param_groups = [optimizer.param_groups[0], dict(optimizer.param_groups[0])]
    with pytest.raises(ValueError, match="stands twice in param_groups, also in parameter group 1"):
        optimizer.step()


@pytest.mark.parametrize("name", RECIPES)
def test_swapped_parameters_of_any_recipe_are_the_same_run(name):
    """As accelerate does for FSDP2: other tensors of the same values, before the first step."""
    model, twin = network(), network()
    expected = train(model, RECIPES[name](model), range(3))
    optimizer = RECIPES[name](network())
    for group in optimizer.param_groups:
        named = dict(twin.named_parameters())
        group["params"] = [named[n] for n in group["param_names"]]
    assert_same(expected, train(twin, optimizer, range(3)))
    fresh = RECIPES[name](twin)
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    assert str(fresh.plan) == str(optimizer.plan)


def test_momo_starts_again_from_the_present_loss():
    weight = nn.Parameter(torch.ones(3, 4))
    optimizer = Muon([weight], lr=0.1, momo=True)
    for loss in (4.0, 3.5):
        weight.grad = torch.ones(3, 4)
        optimizer.step(loss=loss)
    other = nn.Parameter(torch.ones(3, 6))
    optimizer.param_groups[0]["params"] = [other]
    other.grad = torch.ones(3, 6)
    with pytest.warns(UserWarning, match="Weights were changed since the last step by something else"):
        optimizer.step(loss=2.0)
    assert optimizer.diagnostics()["gap"] == pytest.approx(2.0)


def test_a_preconditioned_layer_cannot_be_replaced():
    model = nn.Sequential(nn.Linear(8, 3), nn.Linear(3, 2))
    optimizer = NewtonMuon(model)
    wider = nn.Parameter(torch.ones(4, 8))
    wider.grad = torch.ones(4, 8)
    optimizer.param_groups[0]["params"][0] = wider
    with pytest.raises(ValueError, match=r"'0\.weight' is preconditioned by what its layer reads.*Build a new optim"):
        optimizer.step()


def test_state_of_parameters_that_left_is_not_saved_and_not_lost():
    weight, other = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(3, 4))
    optimizer = Muon([{"params": [weight]}, {"params": [other]}])
    weight.grad = other.grad = torch.ones(3, 4)
    optimizer.step()
    both = optimizer.param_groups
    optimizer.param_groups = both[:1]
    assert list(optimizer.state_dict()["state"]) == [0]
    optimizer.param_groups = both
    optimizer.step()
    assert int(optimizer.state[other]["step"]) == 2


def test_norms_of_groups_can_be_asked_for():
    optimizer = Muon(network(), scale="none")
    norms = [optimizer.norm_of(group) for group in optimizer.param_groups]
    assert norms == [Spectral(scale="none"), AdaInf(), AdaInf()]
