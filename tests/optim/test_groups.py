"""Groups as hosts make them: empty, mixed, with keys of others; each has a name, and guesses are told."""

import re
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from steepest import Ada2, AdaInf, Adam, Max, Muon, MuonMax, Sign, SignDescent, Spectral, SteepestDescent, View
from tests.optim.training import network, train


def weight(*shape):
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))


def stepped(optimizer):
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    optimizer.step()
    return optimizer


EMPTY = {
    "last": lambda: [{"params": [weight(4, 4)], "weight_decay": 0.1}, {"params": [], "weight_decay": 0.0}],
    "first": lambda: [{"params": []}, {"params": [weight(4, 4)]}],
    "between": lambda: [{"params": [weight(4, 4)]}, {"params": iter(())}, {"params": [weight(4)]}],
    "of a role": lambda: [{"params": [weight(4, 4)]}, {"params": [], "role": "matrix", "lr": 0.5}],
    "named": lambda: [{"params": [("w", weight(4, 4))]}, {"params": []}],
}


@pytest.mark.parametrize("make", [Muon, MuonMax, Adam, SignDescent])
@pytest.mark.parametrize("case", EMPTY)
def test_an_empty_group_is_kept_where_it_is(make, case):
    groups = EMPTY[case]()
    optimizer = make(groups, lr=0.1)
    assert len(optimizer.param_groups) == len(groups)
    torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 1.0] * len(groups))
    stepped(optimizer)
    optimizer.diagnostics(weights=True)
    other = make(EMPTY[case](), lr=0.1)
    other.load_state_dict(optimizer.state_dict())
    assert len(other.param_groups) == len(groups)
    assert str(other.plan)


def test_an_empty_group_can_be_added_later():
    optimizer = Muon([weight(4, 4)])
    optimizer.add_param_group({"params": []})
    stepped(optimizer)
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 0]


@pytest.mark.parametrize("make", [list, lambda: iter(()), lambda: [{"params": []}, {"params": []}]])
def test_nothing_at_all_is_refused_with_a_remedy(make):
    with pytest.raises(ValueError, match=r"empty parameter list.*model\.parameters\(\) can be used only once"):
        Muon(make())


def test_one_group_of_everything_is_sorted_like_bare_parameters():
    one, bare = network(), network()
    grouped = Muon([{"params": one.parameters(), "weight_decay": 0.1, "note": "all"}], lr=0.02)
    assert [group["role"] for group in grouped.param_groups] == ["matrix", "vector"]
    assert [group["weight_decay"] for group in grouped.param_groups] == [0.1, 0.1]
    assert [group["note"] for group in grouped.param_groups] == ["all", "all"]
    plain = Muon(bare.parameters(), lr=0.02)
    plain.param_groups[0]["weight_decay"] = plain.param_groups[1]["weight_decay"] = 0.1
    for a, b in zip(train(one, grouped, range(3)), train(bare, plain, range(3)), strict=True):
        assert torch.equal(a, b)


def test_one_rate_for_a_mixed_group_is_that_of_its_matrices():
    optimizer = Muon([{"params": network().parameters(), "lr": 0.5}], lr=0.02)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.5, 0.05])
    optimizer = Muon([{"params": network().parameters(), "lr": 0.5}], lr=0.0, adam_lr=0.1)  # no ratio to keep
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]


def test_a_mixed_group_can_be_added_later_and_trains():
    model = network()
    optimizer = Muon(model[:5].parameters(), lr=0.02)
    optimizer.add_param_group({"params": model[5:].parameters(), "lr": 0.01})
    assert [group["role"] for group in optimizer.param_groups] == ["matrix", "vector"] * 2
    assert [group["name"] for group in optimizer.param_groups] == ["matrix", "vector", "matrix 2", "vector 2"]
    before = [p.detach().clone() for p in model.parameters()]
    after = train(model, optimizer, [0])
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_refused_group_leaves_the_optimizer_as_it_was():
    shared, other = weight(4, 4), weight(4)
    optimizer = Muon([shared])
    with pytest.raises(ValueError, match="appears twice"):
        optimizer.add_param_group({"params": [other, shared]})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(TypeError, match=r"param_group must be a dict with 'params', got \[Parameter"):
        optimizer.add_param_group([other])


def test_options_of_a_mixed_group_go_where_they_belong():
    options = {"betas": (0.8, 0.9), "eps": 1e-6, "scale": "none", "momentum": 0.7}
    optimizer = Muon([{"params": network().parameters(), **options}])
    matrix, vector = optimizer.param_groups
    assert matrix["norm"] == Spectral(scale="none")
    assert matrix["momentum"] == 0.7
    assert vector["norm"] == AdaInf(eps=1e-6)
    assert (vector["momentum"], vector["beta2"]) == (0.8, 0.9)


OWN = {
    "eps": (Adam, {"eps": 1e-5}, AdaInf(eps=1e-5)),
    "Ada2's eps": (MuonMax, {"eps": 1e-5, "role": "head"}, Ada2(eps=1e-5)),
    "scale": (Muon, {"scale": "match_rms_adamw"}, Spectral(scale="match_rms_adamw")),
    "coefficients": (Muon, {"coefficients": "jordan", "polar": "gram"}, Spectral(polar="gram", coefficients="jordan")),
    "dtype": (Muon, {"dtype": torch.float32}, Spectral(dtype=torch.float32)),
    "of the group's own norm": (Muon, {"norm": "ada_inf", "eps": 1e-5}, AdaInf(eps=1e-5)),
}


@pytest.mark.parametrize("case", OWN)
def test_a_group_sets_options_of_its_norm(case):
    make, options, norm = OWN[case]
    optimizer = make([{"params": [weight(4, 4)], **options}, {"params": [weight(4, 4)]}])
    assert optimizer.param_groups[0]["norm"] == norm
    assert optimizer.param_groups[1]["norm"] != norm
    stepped(optimizer)


def test_a_groups_own_option_changes_its_step():
    one, two = weight(4, 4), weight(4, 4)
    stepped(Adam([{"params": [one], "eps": 10.0}, {"params": [two]}], lr=0.1))
    assert (one - weight(4, 4)).abs().max() < (two - weight(4, 4)).abs().max() / 5


KEPT = {
    "timm": {"lr_scale": 0.5, "no_decay": True},
    "a list": {"layers": [1, 2, "head"], "note": None},
    "a mapping": {"tags": {"block": 3}},
    "switches that are off": {"foreach": None, "maximize": False, "fused": None, "capturable": False, "amsgrad": False},
    "schedulers": {"initial_lr": 0.3, "max_lr": 1.0, "swa_lr": 0.1},
    "multipliers": {"lr_mult": 2.0, "layer_name": "h.0", "decay_mult": 0.0},
    "words around an option's": {"weight_decay_mult": 2.0, "no_weight_decay": True, "bn_momentum": 0.1},
    "names that are close": {"type": "w", "names": ["a", "b"]},
    "a set": {"tags": {"a", "b"}, "more": [{1, 2}]},
    "a complex number": {"phase": 1j, "kind": torch.float16},
}


@pytest.mark.parametrize("case", KEPT)
def test_plain_keys_of_others_are_kept_and_come_back(case, tmp_path):
    optimizer = stepped(Adam([{"params": [weight(4, 4)], **KEPT[case]}]))
    assert KEPT[case].items() <= optimizer.param_groups[0].items()
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    other = Adam([weight(4, 4)])
    other.load_state_dict(saved)
    assert KEPT[case].items() <= other.param_groups[0].items()


def test_a_tensor_of_others_is_kept_and_comes_back(tmp_path):
    optimizer = stepped(Adam([{"params": [weight(4, 4)], "label": torch.arange(3), "marks": [torch.ones(2)]}]))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    other = Adam([weight(4, 4)])
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(other.param_groups[0]["label"], torch.arange(3))
    assert torch.equal(other.param_groups[0]["marks"][0], torch.ones(2))


def test_numbers_of_numpy_become_plain():
    group = {"params": [weight(4, 4)], "lr": np.float64(0.5), "weight_decay": np.float32(0.5), "lr_scale": np.int64(3)}
    kept = Muon([group], momentum=np.float32(0.5)).param_groups[0]
    for key, kind in (("lr", float), ("weight_decay", float), ("momentum", float), ("lr_scale", int)):
        assert type(kept[key]) is kind


REFUSED = {
    "typo": ({"momentun": 0.9}, ValueError, "Unknown option 'momentun': did you mean 'momentum'?"),
    "case": ({"LR": 0.9}, ValueError, "Unknown option 'LR': did you mean 'lr'?"),
    "hyphen": ({"weight-decay": 0.9}, ValueError, "Unknown option 'weight-decay': did you mean 'weight_decay'?"),
    "typo of a norm's": ({"epss": 1e-8}, ValueError, "Unknown option 'epss': did you mean 'eps'?"),
    "KellerJordan's": (
        {"use_muon": True},
        ValueError,
        "Unknown option 'use_muon' with the value True. Write role='mat",
    ),
    "KellerJordan's for the others": (
        {"use_muon": False},
        ValueError,
        "Unknown option 'use_muon' with the value False. Write role='mat",
    ),
    "KellerJordan's of nothing": ({"use_muon": None}, ValueError, "Unknown option 'use_muon' with the value None."),
    "dion's of nothing": ({"algorithm": None}, ValueError, "Unknown option 'algorithm' with the value None. Write rol"),
    "plural": ({"roles": "head"}, ValueError, "Unknown option 'roles': did you mean 'role'?"),
    "underlined": ({"lr_": 0.1}, ValueError, "Unknown option 'lr_': did you mean 'lr'?"),
    "a word less": ({"weightdecay": 0.1}, ValueError, "Unknown option 'weightdecay': did you mean 'weight_decay'?"),
    "a set of modules": ({"layers": {nn.ReLU()}}, TypeError, "'layers' is none of the options params, name,"),
    "dion's": ({"algorithm": "adamw"}, ValueError, "Unknown option 'algorithm' with the value 'adamw'. Write role="),
    "a switch that is on": ({"maximize": True}, ValueError, "Unknown option 'maximize' with the value True. Leave it"),
    "a module": ({"layer": nn.ReLU()}, TypeError, "'layer' is none of the options params, name,"),
    "a number as key": ({3: 1}, TypeError, "options must be named by text, got 3."),
    "an option of another norm": ({"eps": 1e-6}, ValueError, "eps=1e-06 is no option of the group's norm, spectral"),
    "a wrong value": ({"scale": "no"}, ValueError, "'no'"),
    "a wrong number": (
        {"norm": "ada_inf", "eps": -1},
        ValueError,
        "parameter group 0: AdaInf: eps must be finite and at least 0, got -1.",
    ),
    "no role": ({"role": ""}, ValueError, "Unknown role ''. Valid: embedding, head, matrix, vector."),
    "lr in a mixed group": ({"lr": "0.1"}, TypeError, "lr must be a number, got '0.1'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_keys_and_values_that_are_refused(case):
    options, error, message = REFUSED[case]
    with pytest.raises(error, match=re.escape(message)):
        Muon([{"params": [weight(4, 4)], **options}])


def test_adam_takes_three_dimensions_and_mixed_ranks():
    parameters = [weight(4, 3, 2), weight(1, 5, 4), weight(3), weight(), weight(2, 2, 2, 2, 2, 2)]
    for given in (parameters, [{"params": parameters}]):
        for make in (Adam, SignDescent):
            before = [p.detach().clone() for p in parameters]
            stepped(make(given, lr=0.1))
            assert not any(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))


def test_tables_of_a_vision_transformer_are_no_matrices():
    patch, position, token, gain, hidden = (
        weight(8, 3, 2, 2),
        weight(1, 17, 8),
        weight(1, 1, 8),
        weight(8),
        weight(8, 8),
    )
    with pytest.warns(UserWarning, match="Without the model"):
        optimizer = Muon(
            [{"params": [patch, position, token, hidden], "weight_decay": 0.1}, {"params": [gain], "weight_decay": 0.0}]
        )
    assert [group["role"] for group in optimizer.param_groups] == ["matrix", "vector", "vector"]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.0]
    stepped(optimizer)


ORDERLESS = {
    "a set": (
        lambda: {weight(2, 2)},
        "params must be in an order that is the same in every run, got a set; write a li",
    ),
    "a set in a group": (lambda: [{"params": {weight(2, 2)}}], "parameter group 0['params'] must be in an order"),
    "keys": (lambda: {"w": weight(2, 2)}, "write list(named.items())."),
    "one group": (lambda: {"params": [weight(2, 2)]}, "write [group] for one group."),
    "text": (lambda: "model", "params must be a module or an iterable of tensors, got 'model'."),
    "nothing": (lambda: None, "params must be a module or an iterable of tensors, got None."),
}


@pytest.mark.parametrize("case", ORDERLESS)
def test_parameters_need_an_order(case):
    make, message = ORDERLESS[case]
    with pytest.raises(TypeError, match=re.escape(message)):
        Muon(make())


# Names


def test_groups_are_named_after_their_role():
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4))
    assert [group["name"] for group in Muon(model).param_groups] == ["matrix", "head", "vector"]


def test_names_are_distinct_and_the_users_stay():
    groups = [
        {"params": [weight(2, 2)]},
        {"params": [weight(2, 2)], "name": "mine"},
        {"params": [weight(2, 2)]},
        {"params": [weight(2, 2)], "name": "matrix 2"},
        {"params": [weight(2)], "name": None},
    ]
    optimizer = Muon(groups)
    optimizer.add_param_group({"params": [weight(2, 2)]})
    names = [group["name"] for group in optimizer.param_groups]
    assert names == ["matrix", "mine", "matrix 3", "matrix 2", "vector", "matrix 4"]
    assert groups[4]["name"] is None


def test_names_of_roles_leave_the_product_norm_as_it_is():
    groups = [{"params": [weight(2, 2)]}, {"params": [weight(2, 2)]}, {"params": [weight(2, 2)], "name": "own"}]
    optimizer = SteepestDescent(groups, product=Max("matrix", "own"), step_size=None)
    assert [optimizer._combine.label(group) for group in optimizer.param_groups] == ["matrix", "matrix", "own"]


def test_a_state_saved_without_names_loads():
    saved = stepped(Muon([weight(2, 2), weight(2)])).state_dict()
    for group in saved["param_groups"]:
        group["name"] = None
    optimizer = Muon([weight(2, 2), weight(2)])
    optimizer.load_state_dict(saved)
    assert [group["name"] for group in optimizer.param_groups] == ["matrix", "vector"]


# Guesses


def decay_groups(model, decay=0.1):
    wide = [p for p in model.parameters() if p.ndim >= 2]
    flat = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": wide, "weight_decay": decay}, {"params": flat, "weight_decay": 0.0}]


DOUBTFUL = {
    "decay groups": lambda: decay_groups(nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 4), nn.Linear(4, 11))),
    "decay groups without decay": lambda: decay_groups(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 11)), decay=0.0),
    "decay groups, one empty": lambda: [
        {"params": [weight(4, 4), weight(4, 2)], "weight_decay": 0.1},
        {"params": [], "weight_decay": 0.0},
    ],
    "a table's name": lambda: nn.ModuleDict({"embed_tokens": nn.Embedding(11, 4)}).named_parameters(),
    "a table's name in a group": lambda: [{"params": [("transformer.wte.weight", weight(11, 4))]}],
    "a head's name": lambda: [("lm_head.weight", weight(11, 4)), ("up.weight", weight(4, 4))],
    "a table's shape": lambda: [weight(4000, 8)],
    "a head's shape": lambda: [{"params": [weight(8, 4000)]}],
}


@pytest.mark.parametrize("case", DOUBTFUL)
def test_a_doubtful_guess_is_told_at_the_users_line(case):
    with pytest.warns(UserWarning, match=r"taken for matrices.*Pass the model or.*role=") as seen:
        Muon(DOUBTFUL[case]())
    assert len(seen) == 1
    assert seen[0].filename == __file__


def test_a_doubtful_guess_is_told_when_it_is_added():
    optimizer = Muon([weight(4, 4)])
    with pytest.warns(UserWarning, match=r"'wte\.weight' of shape \(11, 4\)") as seen:
        optimizer.add_param_group({"params": [("wte.weight", weight(11, 4))]})
    assert seen[0].filename == __file__


SURE = {
    "one matrix": lambda: Muon([weight(4, 4)]),
    "a small net": lambda: Muon(network().parameters()),
    "one group of it": lambda: Muon([{"params": network().parameters(), "weight_decay": 0.1}]),
    "the model": lambda: Muon(nn.Sequential(nn.Embedding(4000, 8), nn.Linear(8, 8), nn.Linear(8, 4000))),
    "roles": lambda: Muon([{"params": [("wte", weight(4000, 8))], "role": "embedding", "weight_decay": 0.1}]),
    "a matrix by its role": lambda: Muon([{"params": [("head", weight(4000, 8))], "role": "matrix"}]),
    "no spectral norm": lambda: Adam(decay_groups(nn.Sequential(nn.Embedding(4000, 8), nn.Linear(8, 8)))),
    "a view": lambda: Muon([{"params": [weight(4, 3, 2)], "view": View(experts=True)}]),
    "another norm": lambda: Muon([{"params": [("wte", weight(4000, 8))], "norm": Sign()}]),
    "an empty group": lambda: Muon(
        [{"params": [weight(4, 4)], "weight_decay": 0.1}, {"params": [], "weight_decay": 0}]
    ),
}


@pytest.mark.parametrize("case", SURE)
def test_no_word_where_there_is_no_doubt(case):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SURE[case]()


# What a step cannot work on


FLOAT8 = [getattr(torch, name) for name in ("float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu") if hasattr(torch, name)]


@pytest.mark.parametrize("dtype", [*FLOAT8, torch.int32, torch.bool, torch.complex64], ids=str)
def test_a_type_that_a_step_cannot_work_on_is_refused_at_once(dtype):
    model = nn.Linear(2, 2)
    model.weight = nn.Parameter(torch.zeros(2, 2).to(dtype), requires_grad=dtype.is_floating_point or dtype.is_complex)
    for make in (Muon, Adam):
        with pytest.raises(TypeError, match=rf"'w' must be of .*got {re.escape(str(dtype))}"):
            make([("w", model.weight)])
    if model.weight.requires_grad:
        with pytest.raises(TypeError, match=rf"'weight' must be of .*got {re.escape(str(dtype))}"):
            Muon(model)
        model.weight.requires_grad_(False)
    assert [group["param_names"] for group in Muon(model).param_groups] == [["bias"]]


def test_a_quantised_tensor_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.quantize_per_tensor(torch.zeros(2, 2), 0.1, 0, torch.qint8)
    with pytest.raises(TypeError, match=r"'params\[0\]' must be of real floating point, got torch\.qint8"):
        Muon([quantised])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_every_other_floating_type_can_be_stepped(dtype):
    for make in (Muon, Adam):
        parameter = nn.Parameter(torch.ones(4, 4, dtype=dtype))
        parameter.grad = torch.eye(4, dtype=dtype)
        make([parameter], lr=0.5).step()
        assert parameter.isfinite().all()
        assert not torch.equal(parameter, torch.ones(4, 4, dtype=dtype))
