"""Options of families of parameters: they are groups that nobody had to build by hand."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import steepest
from steepest import Momo, Muon, Sign, SteepestDescent, route
from tests.cases import cases

STEPS = 50
FAMILIES = {
    "0.weight": {"lr": 0.7, "weight_decay": 0.3},
    "*.bias": {"betas": (0.9, 0.997), "lr": 0.015},
    "vector": {"betas": (0.9, 0.99)},
    "*2*": {"momentum": 0.9, "scale": "none"},
    "head": {"lr": 0.004},
}


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(7, 6),
        nn.Linear(6, 6),
        nn.Linear(6, 6, bias=False),
        nn.LayerNorm(6),
        nn.Linear(6, 7),
    )


def by_hand(model, **options):
    """The same groups, in the same order."""
    rows = {row.name: row for row in route(model)}

    def group(name, role, members, **own):
        named = [(member, rows[member].parameter) for member in members]
        return {"name": name, "role": role, "params": named, **own}

    return Muon(
        [
            group("matrix", "matrix", ["1.weight"]),
            group("*2*", "matrix", ["2.weight"], momentum=0.9, scale="none"),
            group("0.weight", "embedding", ["0.weight"], lr=0.7, weight_decay=0.3),
            group("head", "head", ["4.weight"], lr=0.004),
            group("*.bias", "vector", ["1.bias", "3.bias", "4.bias"], betas=(0.9, 0.997), lr=0.015),
            group("vector", "vector", ["3.weight"], betas=(0.9, 0.99)),
        ],
        **options,
    )


def stepped(model, optimizer, step):
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(7, (12,), generator=generator)
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(tokens), tokens.flip(0))
    loss.backward()
    optimizer.step(loss=loss.detach())


def weights(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


SOURCES = {
    "model": lambda model: model,
    "plan": route,
    "groups": lambda model: [
        {"role": role, "params": [(row.name, row.parameter) for row in route(model) if row.role == role]}
        for role in ("matrix", "embedding", "head", "vector")
    ],
}


@cases("source", SOURCES)
@cases("momo", [False, True])
def test_steps_are_those_of_groups_that_are_built_by_hand(source, momo):
    options = {"momentum": 0.9, "step_size": Momo(0.5)} if momo else {}
    one, other = network(), network()
    optimizer = Muon(SOURCES[source](one), families=FAMILIES, weight_decay=0.1, **options)
    expected = by_hand(other, weight_decay=0.1, **options)
    names = [group["name"] for group in optimizer.param_groups]
    assert names == [group["name"] for group in expected.param_groups]
    for ours, theirs in zip(optimizer.param_groups, expected.param_groups, strict=True):
        for key in ("lr", "momentum", "beta2", "nesterov", "norm", "role"):
            assert ours[key] == theirs[key], (ours["name"], key)
    for step in range(STEPS):
        stepped(one, optimizer, step)
        stepped(other, expected, step)
    assert same(weights(one), weights(other))


def test_eps_of_a_family_goes_to_those_norms_that_have_it():
    optimizer = Muon(network(), families={"*": {"eps": 1e-5, "betas": (0.8, 0.9), "scale": "none"}})
    norms = {group["role"]: str(optimizer.norm_of(group)) for group in optimizer.param_groups}
    assert "eps=1e-05" in norms["vector"]
    assert norms["matrix"] == "spectral scale=none"
    assert [group["name"] for group in optimizer.param_groups] == ["*", "* 2", "* 3", "* 4"]
    with pytest.raises(ValueError, match=r"families\['1\.weight'\]: betas are for norms that adapt"):
        Muon(network(), families={"1.weight": {"betas": (0.8, 0.9)}})


def test_the_first_that_matches_counts_and_all_names_of_a_tied_parameter_do():
    model = network()
    model[4].weight = model[0].weight
    with pytest.raises(ValueError, match=r"families\['0\.\*'\] matches '0\.weight', but families before it match"):
        Muon(model, families={"4.*": {"lr": 0.5}, "0.*": {"lr": 0.25}})
    optimizer = Muon(model, families={"4.weight": {"lr": 0.5}})
    (group,) = (group for group in optimizer.param_groups if group["name"] == "4.weight")
    assert group["params"] == [model[0].weight]


def test_what_a_group_says_itself_goes_first():
    one, two, three = (nn.Parameter(torch.ones(3, 3)) for _ in range(3))
    groups = [{"params": [("a.one", one), ("b.two", two)], "lr": 0.5, "name": "mine"}, {"params": [("a.three", three)]}]
    optimizer = Muon(groups, families={"a.*": {"lr": 0.1, "weight_decay": 0.2}})
    found = [(g["name"], g["lr"], g["weight_decay"], len(g["params"])) for g in optimizer.param_groups]
    assert found == [("mine", 0.5, 0.0, 1), ("a.*", 0.5, 0.2, 1), ("a.* 2", 0.1, 0.2, 1)]
    named = Muon([("a.one", one), ("b.two", two)], families={"a.*": {"lr": 0.1}})
    assert [(g["name"], g["lr"]) for g in named.param_groups] == [("matrix", 0.02), ("a.*", 0.1)]


def test_layers_that_come_later_join_their_families():
    model = network()
    optimizer = Muon(model, families=FAMILIES)
    before = len(optimizer.param_groups)
    model.append(nn.Linear(7, 7))
    optimizer.add_module(model[5])
    assert len(optimizer.param_groups) == before
    (biases,) = (group for group in optimizer.param_groups if group["name"] == "*.bias")
    assert biases["params"][-1] is model[5].bias
    assert biases["param_names"][-1] == "5.bias"
    late = nn.Linear(3, 3, bias=False)
    optimizer.add_module(late, "late2")  # a matrix of the family *2*, which has a group for these
    (group,) = (group for group in optimizer.param_groups if late.weight in set(group["params"]))
    assert group["name"] == "*2*"
    stepped(model, optimizer, 0)
    own = nn.Linear(3, 3)
    optimizer.add_module(own, "own", lr=0.3)
    found = {group["name"]: group["lr"] for group in optimizer.param_groups[before:]}
    assert found == {"matrix 2": 0.3, "*.bias 2": 0.3}
    assert optimizer.param_groups[-1]["beta2"] == 0.997


def test_a_family_whose_role_comes_later_gets_its_options():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.LayerNorm(4, bias=False))
    optimizer = Muon(model, families={"1.*": {"betas": (0.9, 0.5)}, "head": {"lr": 0.3}})
    head = nn.Parameter(torch.ones(3, 3))
    optimizer.add_param_group({"params": [("out", head)], "role": "head"})
    assert (optimizer.param_groups[-1]["name"], optimizer.param_groups[-1]["lr"]) == ("head", 0.3)
    optimizer.add_module(nn.LayerNorm(4), "late")
    assert [group["name"] for group in optimizer.param_groups] == ["matrix", "1.*", "head", "vector"]


def test_states_are_saved_loaded_and_copied():
    model = network()
    optimizer = Muon(model, families=FAMILIES)
    for step in range(3):
        stepped(model, optimizer, step)
    stream = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), stream)
    stream.seek(0)
    saved, state = torch.load(stream, weights_only=True)
    again = network()
    loaded = Muon(again, families=FAMILIES)
    again.load_state_dict(saved)
    loaded.load_state_dict(state)
    runs = [(model, optimizer), (again, loaded), copy.deepcopy((model, optimizer))]
    runs.append(pickle.loads(pickle.dumps((model, optimizer))))
    for m, own in runs:
        for step in range(3, 6):
            stepped(m, own, step)
    for m, own in runs[1:]:
        assert same(weights(m), weights(model))
        own.add_module(nn.LayerNorm(3), "late")
        assert own.param_groups[-2]["name"] == "*.bias"
        assert own.param_groups[-2]["param_names"][-1] == "late.bias"
    with pytest.raises(ValueError, match="groups"):
        Muon(network()).load_state_dict(state)


def test_a_product_norm_can_call_a_family():
    product = steepest.Max("matrix", "*2*", "embedding", "head", "vector")
    optimizer = SteepestDescent(network(), product=product, families={"*2*": {"lr": 0.1}})
    assert "*2*" in [group["name"] for group in optimizer.param_groups]


def test_momo_needs_one_momentum_and_says_which_family_has_another():
    with pytest.raises(ValueError, match=r"Momo needs one momentum for all groups.*\*\.bias 0\.8"):
        Muon(network(), momo=True, families={"*.bias": {"betas": (0.8, 0.99)}})


@pytest.mark.parametrize(
    ("families", "told"),
    [
        ({"*.baias": {"lr": 1.0}}, r"families\['\*\.baias'\] matches no parameter, and is no role .*Did you mean"),
        ({"nothing": {"lr": 1.0}}, r"families\['nothing'\] matches no parameter.* The parameters are 0\.weight"),
        ({"*.bias": {"lr": 1.0}, "1.bias": {"lr": 2.0}}, "families before it match that, too, and the first counts"),
        ({"*.bias": {}}, r"families\['\*\.bias'\] must be at least one option"),
        ({"*.bias": {"lrr": 1.0}}, r"families\['\*\.bias'\]: Unknown option 'lrr': did you mean 'lr'"),
        ({"*.bias": {"lr": -1.0}}, r"families\['\*\.bias'\]: lr must be finite and at least 0"),
        ({"*.bias": {"role": "head"}}, r"has no option 'role'.*route\(model, overrides="),
        ({"*.bias": {"params": []}}, r"has no option 'params'"),
        ({"*.bias": {"name": "x"}}, r"has no option 'name'.*called like the family"),
        ({"*.bias": 3.0}, "families must be a mapping from roles and patterns"),
        ({3: {"lr": 1.0}}, "families must be a mapping from roles and patterns"),
        ([("*.bias", {"lr": 1.0})], "families must be a mapping from roles and patterns"),
    ],
)
def test_what_makes_no_sense_is_refused(families, told):
    with pytest.raises((ValueError, TypeError), match=told):
        Muon(network(), families=families)


def test_a_role_that_the_model_does_not_have_is_no_error():
    model = nn.Sequential(nn.Linear(3, 3, bias=False))
    optimizer = SteepestDescent(model, families={"embedding": {"lr": 0.7}, "matrix": {"norm": Sign()}})
    assert str(optimizer.norm_of(optimizer.param_groups[0])) == "sign"
    assert "family" not in Muon(model).param_groups[0]
