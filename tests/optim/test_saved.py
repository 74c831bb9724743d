"""A state is looked at whole before anything changes: what is refused leaves no trace, and says where, what and why."""

import copy
import io
import math
import re
import types
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from steepest import (
    Adam,
    Frobenius,
    InputMoment,
    Momo,
    Muon,
    MuonAdam,
    MuonMax,
    NewtonMuon,
    PethickScion,
    PolarGrad,
    Scion,
    SignDescent,
    Spectral,
    SteepestDescent,
)
from tests.optim.training import assert_same, backward, network, train

RECIPES = {
    "muon": Muon,
    "momo": lambda model: Muon(model, momo=True),
    "direct": lambda model: Muon(model, step_size=Momo(bookkeeping="direct")),
    "newton": lambda model: NewtonMuon(model, precondition=InputMoment(structure="full", every=2)),
    "max stale": lambda model: MuonMax(model, dual="stale"),
    "polar": PolarGrad,
    "scion": PethickScion,
    "adam": Adam,
}


def advance(model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        loss = backward(model, step)
        optimizer.step(loss=loss.detach())


def trained(recipe, steps):
    model = network()
    optimizer = RECIPES[recipe](model)
    advance(model, optimizer, steps)
    return model, optimizer


def everything(thing, seen=None):
    """All that an optimizer holds, tensors by value, to be compared with ==."""
    seen = {} if seen is None else seen
    if isinstance(thing, torch.Tensor):
        return (str(thing.dtype), tuple(thing.shape), thing.detach().numpy().tobytes())
    if thing is None or isinstance(thing, (bool, int, float, str, types.FunctionType, type)):
        return repr(thing)
    if id(thing) in seen:
        return "again"
    seen[id(thing)] = thing
    if isinstance(thing, dict):
        return [(everything(k, seen), everything(v, seen)) for k, v in thing.items()]
    if isinstance(thing, (list, tuple, set, frozenset)):
        return [everything(v, seen) for v in thing]
    if type(thing).__module__.startswith("steepest"):
        return [type(thing).__name__, everything(vars(thing), seen)]
    return type(thing).__name__


def group(**changes):
    return lambda state: state["param_groups"][0].update(changes)


def without(key):
    return lambda state: state["param_groups"][0].pop(key)


def entry(key, change):
    def damage(state):
        for own in state["state"].values():
            if key in own:
                own[key] = change(own[key])

    return damage


def last(key, change):
    """Of the last parameter only: all before it would have been loaded by then."""

    def damage(state):
        own = state["state"][max(state["state"])]
        own[key] = change(own[key])

    return damage


DAMAGE = {
    "lr nan": (group(lr=math.nan), "parameter group 0 of the state: lr must be finite and at least 0, got nan"),
    "lr inf": (group(lr=math.inf), "lr must be finite and at least 0, got inf"),
    "lr negative": (group(lr=-1.0), "lr must be finite and at least 0, got -1.0"),
    "lr text": (group(lr="0.1"), "lr must be a number, got '0.1'"),
    "lr none": (group(lr=None), "lr must be a number"),
    "lr bool": (group(lr=True), "lr must be a number, got True"),
    "lr of two": (group(lr=torch.ones(2)), "lr"),
    "lr nan tensor": (group(lr=torch.tensor(math.nan)), "lr must be finite and at least 0, got nan"),
    "momentum 1": (group(momentum=1.0), "momentum must be in [0, 1), got 1.0"),
    "momentum nan": (group(momentum=math.nan), "momentum must be in [0, 1), got nan"),
    "momentum tensor": (group(momentum=torch.tensor(2.0)), "momentum must be in [0, 1), got 2.0"),
    "beta2": (group(beta2=-0.5), "beta2 must be in [0, 1), got -0.5"),
    "decay nan": (group(weight_decay=math.nan), "weight_decay must be finite and at least 0, got nan"),
    "decay text": (group(weight_decay="x"), "weight_decay must be a number, got 'x'"),
    "nesterov": (group(nesterov="x"), "nesterov must be True or False, got 'x'"),
    "object": (group(lr=object()), "lr"),
    "initial_lr": (group(initial_lr=math.nan), "initial_lr must be finite and at least 0, got nan"),
    "skipped text": (group(skipped_steps="x"), "skipped_steps must be a whole number of at least 0, got 'x'"),
    "skipped none": (group(skipped_steps=None), "skipped_steps must be a whole number of at least 0"),
    "skipped negative": (group(skipped_steps=-1), "skipped_steps must be a whole number of at least 0, got -1"),
    "skipped part": (group(skipped_steps=0.5), "skipped_steps must be a whole number of at least 0, got 0.5"),
    "taken nan": (group(steps_taken=math.nan), "steps_taken must be a whole number of at least 0, got nan"),
    "inputs negative": (group(input_steps=-3), "input_steps must be a whole number of at least 0, got -3"),
    "inputs text": (group(input_options=3), "input_options must be a text, got 3"),
    "names": (group(param_names=3), "Parameter group 0 of the state: param_names must be a list of "),
    "names of numbers": (
        lambda s: s["param_groups"][0].update(param_names=[1 for _ in s["param_groups"][0]["params"]]),
        "param_names must be a list of ",
    ),
    "too many names": (group(param_names=["a"] * 99), "param_names must be a list of "),
    "role none": (group(role=None), "Parameter group 0 of the state: role must be a text, got None."),
    "role of a list": (group(role=np.ones(2)), "role must be a text"),
    "method none": (group(optimizer=None), "Parameter group 0 of the state: optimizer must be a text, got None."),
    "lr huge": (group(lr=10**400), "lr must be finite and at least 0, got an integer of 1329 bits"),
    "lr meta": (group(lr=torch.tensor(0.1, device="meta")), "lr is a tensor on the meta device, which holds no number"),
    "decay of two": (group(weight_decay=torch.ones(2)), "weight_decay must be a number, got a tensor of shape (2,)"),
    "initial_lr huge": (group(initial_lr=10**400), "initial_lr must be finite and at least 0, got an integer of 1329"),
    "initial_lr text": (group(initial_lr="x"), "initial_lr must be a number, got 'x'"),
    "max_lr of two": (group(max_lr=torch.ones(2)), "max_lr as a tensor must be a 0-d real number, got shape (2,)"),
    "max_lr complex": (group(max_lr=torch.tensor(1j)), "max_lr as a tensor must be a 0-d real number, got torch.comp"),
    "skipped huge": (group(skipped_steps=10**400), "skipped_steps must be a whole number of at most 2^53, got an inte"),
    "taken large": (group(steps_taken=2.0**54), "steps_taken must be a whole number of at most 2^53, got 1.8"),
    "step huge": (last("step", lambda t: 10**400), "'step' of '7.bias' is an integer of 1329 bits, but a whole number"),
    "step large": (last("step", lambda t: 1e30), "'7.bias' is 1e+30, but a whole number of at most 2^53 is needed"),
    "step tensor large": (last("step", lambda t: torch.tensor(1e30)), "but a whole number of at most 2^53 is needed"),
    "step complex": (last("step", lambda t: torch.tensor(1j)), "but a whole number of at least 0 is needed"),
    "step meta": (last("step", lambda t: t.to("meta")), "'step' of '7.bias' is on the meta device, which holds no num"),
    "momentum meta": (last("momentum_buffer", lambda t: t.to("meta")), "is on the meta device, which holds no number"),
    "momentum sparse": (last("momentum_buffer", lambda t: t.to_sparse()), "has the layout torch.sparse_coo, but a den"),
    "meta of somebody": (lambda state: state["state"][0].update(mine=torch.ones(2, device="meta")), "the meta device"),
    "role": (group(role="table"), "was saved with the role 'table'"),
    "norm": (group(norm="Nuclear()"), "was saved with the norm 'Nuclear' but has"),
    "method": (group(optimizer="another"), "The state is of another method, another"),
    "step negative": (entry("step", lambda t: -t - 1), "a whole number of at least 0 is needed"),
    "step nan": (last("step", lambda t: math.nan), "'step' of '7.bias' is nan, but a whole number of at least 0"),
    "step part": (last("step", lambda t: 1.5), "'step' of '7.bias' is 1.5, but a whole number of at least 0"),
    "step of two": (last("step", lambda t: torch.ones(2)), "'step' of '7.bias' has shape (2,), but () is needed"),
    "step text": (last("step", lambda t: "two"), "'step' of '7.bias' is 'two', but a whole number"),
    "momentum nan entry": (last("momentum_buffer", lambda t: t * math.nan), "holds numbers that are not finite"),
    "momentum inf entry": (last("momentum_buffer", lambda t: t + math.inf), "holds numbers that are not finite"),
    "momentum text": (last("momentum_buffer", lambda t: "x"), "is 'x', but a tensor of real floating point is needed"),
    "momentum list": (last("momentum_buffer", torch.Tensor.tolist), "but a tensor of real floating point is needed"),
    "momentum int": (last("momentum_buffer", lambda t: t.int()), "is torch.int32, but a tensor of real floating po"),
    "momentum complex": (last("momentum_buffer", lambda t: t.cfloat()), "is torch.complex64, but a tensor of real"),
    "momentum shape": (last("momentum_buffer", lambda t: t[:1]), "'momentum_buffer' of '7.bias' has shape (1,), but"),
    "momentum none": (last("momentum_buffer", lambda t: None), "but a tensor of real floating point is needed"),
    "momentum missing": (
        lambda state: state["state"][0].pop("momentum_buffer"),
        "but 'momentum_buffer' is missing, without which the others mean nothing",
    ),
    "step missing": (lambda state: state["state"][0].pop("step"), "'step' is missing, without which the others mean"),
    "state of one": (lambda state: state["state"].update({0: [1, 2]}), "must be a dictionary, got a list"),
    "state of a stranger": (lambda state: state["state"].update({99: {}}), "an entry for 99, which is in no parameter"),
    "key that is no text": (lambda state: state["state"][0].update({3: 1.0}), "has the entry 3, but names are texts"),
    "entry of code": (lambda state: state["state"][0].update(mine=print), "mine"),
    "no groups": (lambda state: state.pop("param_groups"), "The state dict has no 'param_groups'; it has 'state'."),
    "no state": (lambda state: state.pop("state"), "The state dict has no 'state'; it has 'param_groups'."),
    "groups of text": (lambda state: state.update(param_groups="x"), "'param_groups' of the state dict must be a list"),
    "states of a list": (lambda state: state.update(state=[]), "'state' of the state dict must be a dictionary"),
    "group of text": (
        lambda state: state["param_groups"].__setitem__(0, "x"),
        "Parameter group 0 of the state must be",
    ),
    "group without params": (without("params"), "Parameter group 0 of the state must be a dictionary with a list"),
    "params of text": (group(params="0123"), "Parameter group 0 of the state must be a dictionary with a list"),
    "a group less": (lambda state: state["param_groups"].pop(), "different number of parameter groups"),
    "a parameter less": (lambda state: state["param_groups"][0]["params"].pop(), "different number of parameters"),
    "an index twice": (
        lambda state: state["param_groups"][0]["params"].__setitem__(0, state["param_groups"][-1]["params"][-1]),
        "The state calls a parameter",
    ),
    "an index of a list": (lambda s: s["param_groups"][0]["params"].__setitem__(0, []), "The state calls a parameter"),
}


def refused(optimizer, state, message):
    """That loading is refused with a message, and leaves no trace."""
    before = everything(vars(optimizer))
    groups, own = optimizer.param_groups, optimizer.state
    with pytest.raises((ValueError, TypeError)) as told:
        optimizer.load_state_dict(state)
    assert message in str(told.value), str(told.value)
    assert optimizer.param_groups is groups
    assert optimizer.state is own
    assert everything(vars(optimizer)) == before
    return str(told.value)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_damage_is_refused_and_leaves_no_trace(recipe):
    state = copy.deepcopy(trained(recipe, range(3))[1].state_dict())
    model, optimizer = trained(recipe, range(4, 6))
    twin_model, twin = trained(recipe, range(4, 6))
    for damage, message in DAMAGE.values():
        damaged = copy.deepcopy(state)
        damage(damaged)
        refused(optimizer, damaged, message)
    advance(model, optimizer, range(6, 8))
    advance(twin_model, twin, range(6, 8))
    assert_same(list(model.parameters()), list(twin_model.parameters()))
    optimizer.load_state_dict(state)


OWN_DAMAGE = [
    ("adam", last("second_moment", lambda t: -t - 1), "it cannot be below 0"),
    ("adam", last("second_moment", lambda t: t * math.nan), "'second_moment' of '7.bias' holds numbers that are not"),
    ("adam", lambda state: state["state"][0].pop("second_moment"), "'second_moment' is missing"),
    ("max stale", entry("dual_norm", lambda t: t * math.nan), "holds numbers that are not finite"),
    ("newton", entry("input_moment", lambda t: t * math.nan), "'input_moment' of '0.weight' holds numbers that are n"),
    ("newton", entry("input_mass", lambda t: t - 9), "it cannot be below 0"),
    ("newton", entry("input_moment", lambda t: t[:, :1]), "'input_moment' of '0.weight' has shape"),
    ("newton", entry("input_leader", lambda t: "x"), "'input_leader' of "),
    ("newton", lambda s: s["state"][0].pop("input_mass"), "has 'input_moment', but 'input_mass' is missing"),
    ("newton", lambda s: s["state"][0].pop("input_moment"), "refers to the moment of layer number"),
    ("max stale", entry("dual_norm", lambda t: torch.ones(2)), "has shape (2,), but (1,) is needed"),
    ("max stale", entry("dual_norm", lambda t: torch.tensor(1.0)), "has shape (), but (1,) is needed"),
    ("momo", group(momo_value=10**400), "was saved with momo_value=an integer of 1329 bits, but a finite number"),
    ("momo", group(momo_bound=torch.ones(2)), "was saved with momo_bound=a tensor of shape (2,), but a finite number"),
    ("momo", group(momo_calls=2.0**54), "was saved with momo_calls=1.8"),
    ("momo", group(role=None), "role must be a text, got None"),
    ("momo", group(momo_value=math.inf), "was saved with momo_value=inf, but a finite number"),
    ("momo", group(momo_steps=-1.0), "was saved with momo_steps=-1.0"),
    ("momo", without("momo_weights"), "was saved with momo_weights=None"),
]


@pytest.mark.parametrize(("recipe", "damage", "message"), OWN_DAMAGE, ids=[str(i) for i in range(len(OWN_DAMAGE))])
def test_damage_of_what_only_some_recipes_keep(recipe, damage, message):
    state = copy.deepcopy(trained(recipe, range(3))[1].state_dict())
    damage(state)
    refused(trained(recipe, range(4, 6))[1], state, message)


@pytest.mark.parametrize("state", [None, [], "optimizer.pt", 3, torch.ones(2), np.ones(2), {1, 2}])
def test_what_is_no_state_dict_is_refused(state):
    refused(trained("muon", range(1))[1], state, "load_state_dict takes what state_dict() returned, a dictionary")


def test_a_whole_checkpoint_is_pointed_out():
    model, optimizer = trained("muon", range(1))
    whole = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    refused(optimizer, whole, "Pass what the optimizer's state_dict() returned, here the entry 'optimizer'.")


def test_an_error_in_the_middle_of_loading_leaves_no_trace(monkeypatch):
    """As when memory runs out while the state is copied."""
    state = trained("momo", range(3))[1].state_dict()
    _, optimizer = trained("momo", range(4, 6))
    before = everything(vars(optimizer))

    def fails(*_):
        raise MemoryError

    monkeypatch.setattr("steepest.optim.descent.restored", fails)
    with pytest.raises(MemoryError):
        optimizer.load_state_dict(state)
    assert everything(vars(optimizer)) == before


def test_an_error_at_the_end_of_loading_leaves_no_trace(monkeypatch):
    """When the loss, its model, rates and counts are loaded."""
    state = trained("momo", range(3))[1].state_dict()
    _, optimizer = trained("momo", range(4, 7))
    optimizer.record_loss(torch.tensor(1.0))
    before = everything(vars(optimizer))

    def fails(*_):
        raise MemoryError

    monkeypatch.setattr("steepest.optim.descent.drop_unknown", fails)
    with pytest.raises(MemoryError):
        optimizer.load_state_dict(state)
    assert everything(vars(optimizer)) == before


@pytest.mark.parametrize("form", [int, float, np.float64])
def test_counts_beyond_float32_come_back_from_numbers(form):
    weight = nn.Parameter(torch.ones(3, 4))
    optimizer = Muon([weight])
    weight.grad = torch.ones(3, 4)
    optimizer.step()
    state = optimizer.state_dict()
    state["state"][0]["step"] = form(2**24 + 1)
    optimizer.load_state_dict(state)
    assert int(optimizer.state[weight]["step"]) == 2**24 + 1


@pytest.mark.parametrize("key", ["lr", "initial_lr", "max_lr", "momo_value"])
def test_whole_numbers_of_any_size_are_floats_from_then_on(key):
    model, optimizer = trained("momo", range(2))
    state = optimizer.state_dict()
    state["param_groups"][0][key] = 2**70
    optimizer.load_state_dict(state)
    assert type(optimizer.param_groups[0][key]) is float
    advance(model, optimizer, range(2, 3))


def test_a_rate_of_one_entry_comes_back_as_a_number():
    model, optimizer = trained("muon", range(2))
    state = optimizer.state_dict()
    state["param_groups"][0]["lr"] = torch.full((1,), 0.1)
    optimizer.load_state_dict(state)
    advance(model, optimizer, range(2, 3))


def test_names_follow_a_parameter_that_left_its_group():
    model = network()
    optimizer = Muon(model.named_parameters())
    group = next(group for group in optimizer.param_groups if len(group["params"]) > 1)
    group["param_names"] = [f"p{number}" for number in range(len(group["params"]))]
    del group["params"][0]
    state = optimizer.state_dict()
    assert all(len(own["param_names"]) == len(own["params"]) for own in state["param_groups"])
    optimizer.load_state_dict(state)


def peer_state(build):
    weight = nn.Parameter(torch.ones(4, 3))
    peer = build([weight])
    weight.grad = torch.ones(4, 3)
    peer.step()
    return peer.state_dict()


PEERS = {
    "torch.optim.Muon": lambda p: torch.optim.Muon(p, lr=0.5),
    "torch.optim.SGD": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9),
    "torch.optim's Adam or AdamW": lambda p: torch.optim.AdamW(p, lr=0.5),
    "another optimizer": lambda p: torch.optim.RMSprop(p, lr=0.5),
}


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("build", [Muon, Adam, MuonMax, SignDescent])
def test_the_state_of_a_peer_is_refused_by_name(peer, build):
    text = refused(build([nn.Parameter(torch.ones(4, 3))]), peer_state(PEERS[peer]), f"it looks like that of {peer};")
    assert "start with fresh state" in text


def test_the_state_of_a_peer_is_refused_before_its_first_step():
    weight = nn.Parameter(torch.ones(4, 3))
    refused(Muon([weight]), torch.optim.AdamW([weight]).state_dict(), "Adam or AdamW; groups with 'lr', 'betas'")


def test_the_state_of_another_method_is_refused():
    weight = nn.Parameter(torch.ones(4, 3))

    def stepped(build):
        optimizer = build([weight])
        weight.grad = torch.ones(4, 3)
        optimizer.step()
        return optimizer

    muon = stepped(Muon).state_dict()
    for other in (MuonMax, PolarGrad):
        assert "param_groups" in refused(stepped(other), muon, "The state is of another method, steepest constrained")
        refused(stepped(Muon), stepped(other).state_dict(), "The state is of another method, steepest regularised")
    refused(stepped(SignDescent), muon, "group 0 was saved with the norm 'Spectral' but has 'Sign' here")
    scaled = [
        stepped(lambda params, text=text: SteepestDescent(params, norms={"matrix": f"Scaled(norm={text}(), by=2.0)"}))
        for text in ("Frobenius", "Sign")
    ]
    refused(scaled[0], scaled[1].state_dict(), "with the norm 'Scaled(Sign)' but has 'Scaled(Frobenius)' here")
    remedied = stepped(MuonMax)
    remedied.load_state_dict({**muon, "param_groups": remedied.state_dict()["param_groups"]})
    assert torch.equal(remedied.state[weight]["momentum_buffer"], muon["state"][0]["momentum_buffer"])


class Mine(Muon):
    """A subclass."""


EQUALS = {
    "a subclass": Mine,
    "by hand": lambda model: SteepestDescent(model, nesterov={"matrix": True, "embedding": False, "head": False,
                                                              "vector": False}),
    "another cell with the same meaning": MuonAdam,
    "Momo": lambda model: Muon(model, momo=True),
}  # fmt: skip


@pytest.mark.parametrize("kind", EQUALS)
def test_the_state_of_the_same_method_by_another_name_is_taken(kind):
    _, optimizer = trained("muon", range(2))
    other = EQUALS[kind](network())
    other.load_state_dict(optimizer.state_dict())
    assert {int(state["step"]) for state in other.state.values()} == {2}


def old(state):
    """As the library wrote it before states said whose they are: counts in float32, norms by their repr."""
    groups = [
        {k: v for k, v in group.items() if k not in ("optimizer", "steps_taken")} for group in state["param_groups"]
    ]
    states = {i: {**own, "step": own["step"].float()} for i, own in state["state"].items()}
    return {"state": states, "param_groups": [{**g, "view": None} for g in groups]}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("form", [old, "number"])
def test_older_states_and_counts_that_are_numbers_go_on_to_the_bit(recipe, form):
    model, optimizer = trained(recipe, range(4))
    state = copy.deepcopy(optimizer.state_dict())
    weights = copy.deepcopy(model.state_dict())
    advance(model, optimizer, range(4, 7))
    if form == "number":
        kinds = iter([int, float, np.float32] * 99)
        for own in state["state"].values():
            own["step"] = next(kinds)(own["step"])
    else:
        state = old(state)
    other = network()
    resumed = RECIPES[recipe](other)
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    advance(other, resumed, range(4, 7))
    assert_same(list(model.parameters()), list(other.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_steps_are_counted_beyond_what_float32_can_hold(dtype):
    weight = nn.Parameter(torch.ones(3, 4, dtype=dtype))
    optimizer = Adam([weight])
    weight.grad = torch.ones(3, 4, dtype=dtype)
    optimizer.step()
    state = optimizer.state_dict()
    state["state"][0]["step"] = 2**24
    optimizer.load_state_dict(state)
    for _ in range(3):
        optimizer.step()
    assert int(optimizer.state[weight]["step"]) == 2**24 + 3
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, weights_only=True))
    assert int(optimizer.state[weight]["step"]) == 2**24 + 3


def test_a_bound_of_minus_infinity_comes_back():
    model = network()
    optimizer = Muon(model, step_size=Momo(-math.inf))
    advance(model, optimizer, range(2))
    Muon(network(), step_size=Momo(-math.inf)).load_state_dict(optimizer.state_dict())


def test_a_norm_of_a_user_comes_back_from_where_it_was_written():
    class Local(Frobenius):
        pass

    def build():
        return SteepestDescent([nn.Parameter(torch.ones(3, 4))], norms={"matrix": Local()})

    state = build().state_dict()
    build().load_state_dict(state)
    state["param_groups"][0]["norm"] = repr(Local())  # as older states have it
    build().load_state_dict(state)
    with pytest.raises(ValueError, match="was saved with the norm 'Local' but has 'Frobenius' here"):
        SteepestDescent([nn.Parameter(torch.ones(3, 4))], norms={"matrix": Frobenius()}).load_state_dict(state)


def test_a_decay_that_is_a_tensor_comes_back():
    optimizer = Muon([nn.Parameter(torch.ones(3, 4))])
    optimizer.param_groups[0]["weight_decay"] = torch.tensor(0.1)
    other = Muon([nn.Parameter(torch.ones(3, 4))])
    other.load_state_dict(optimizer.state_dict())
    assert float(other.param_groups[0]["weight_decay"]) == pytest.approx(0.1)


def test_states_through_torchs_own_distributed_form_are_checked_too():
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    with warnings.catch_warnings():  # torch's own notices about its checkpoint format
        warnings.simplefilter("ignore")
        model = network()
        optimizer = Muon(model)
        train(model, optimizer, range(2))
        for flat in (False, True):
            options = StateDictOptions(flatten_optimizer_state_dict=flat)
            saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
            train(model, optimizer, range(2, 3))
            set_optimizer_state_dict(model, optimizer, saved, options=options)
            assert {int(state["step"]) for state in optimizer.state.values()} == {2}
        saved["param_groups.0.weight.lr"] = math.nan
        with pytest.raises(ValueError, match=re.escape("lr must be finite and at least 0, got nan")):
            set_optimizer_state_dict(model, optimizer, saved, options=options)


def test_options_of_norms_stay_those_of_the_optimizer():
    state = Muon(network(), scale="none").state_dict()
    optimizer = Muon(network(), scale="spectral")
    optimizer.load_state_dict(state)
    assert optimizer.norm_of(optimizer.param_groups[0]) == Spectral(scale="spectral")


def test_states_of_scion_and_muon_differ_in_their_norms():
    with pytest.raises(ValueError, match="was saved with the norm 'Sign' but has 'AdaInf' here"):
        Muon(network()).load_state_dict(Scion(network()).state_dict())
