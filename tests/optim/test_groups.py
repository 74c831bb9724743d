"""Groups as hosts make them: empty, mixed, with keys of others; each has a name, and guesses are told."""

import copy
import enum
import io
import pickle
import re
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR

from steepest import (
    Ada2,
    AdaInf,
    Adam,
    Frobenius,
    InputMoment,
    Max,
    Momo,
    Muon,
    MuonAdam,
    MuonMax,
    NewtonMuon,
    Scaled,
    Sign,
    SignDescent,
    Spectral,
    SteepestDescent,
    View,
)
from steepest.optim.combine import Combine
from steepest.optim.momo import Losses
from tests.optim.training import RECIPES, assert_same, backward, network, train


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
    product = Max("matrix", "own")
    optimizer = SteepestDescent(groups, product=product)
    combine = Combine(product, Losses(None), regularized=False, dual="cached")
    assert [combine.label(group) for group in optimizer.param_groups] == ["matrix", "matrix", "own"]


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


# A scheduler that gives all groups one rate, where they were built with different ones, is told how to keep them.

LR = {"matrix": 0.1, "vector": 0.01, "embedding": 0.01, "head": 0.01, "norm": 0.01}
METHODS = {
    "muon_adam": lambda params, lr, **o: MuonAdam(params, lr=lr, **o),
    "muon_max": lambda params, lr, **o: MuonMax(params, lr=lr, **o),
    "descent": lambda params, lr, **o: SteepestDescent(params, lr=lr, **o),
    "momo": lambda params, lr, **o: MuonAdam(params, lr=lr, step_size=Momo(), **o),
}


def groups_of(model):
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    return [
        {"params": matrices, "role": "matrix", "lr": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "role": "vector", "lr": 0.01},
    ]


def build(method="muon_adam", **options):
    model = network()
    return model, METHODS[method](groups_of(model), 1.0, **options)


def step(model, optimizer, index=0, scheduler=None):
    optimizer.zero_grad()
    optimizer.step(loss=backward(model, index))
    if scheduler is not None:
        scheduler.step()


def by_hand(optimizer):
    for group in optimizer.param_groups:
        group["lr"] = 0.05


FLATTENING = {
    "one_cycle": (lambda o: schedulers.OneCycleLR(o, max_lr=0.1, total_steps=10), r"max_lr=\[0\.1, 0\.01\]"),
    "cyclic": (lambda o: schedulers.CyclicLR(o, base_lr=0.02, max_lr=0.1), r"=\[0\.02, 0\.002\]"),
    "swa": (lambda o: SWALR(o, swa_lr=0.05), r"swa_lr=\[0\.05, 0\.005\]"),
    "by_hand": (by_hand, r"=\[0\.05, 0\.005\]"),
}


@pytest.mark.parametrize("way", FLATTENING)
@pytest.mark.parametrize("method", METHODS)
def test_one_number_for_all_groups_is_told_what_to_write(method, way):
    flatten, remedy = FLATTENING[way]
    model, optimizer = build(method)
    flatten(optimizer)
    with pytest.warns(UserWarning, match=rf"built with .*differ: matrix 0\.1, vector 0\.01\..*{remedy}") as told:
        step(model, optimizer)
    assert told[0].filename == __file__
    step(model, optimizer, 1)  # no second warning


@pytest.mark.parametrize("way", FLATTENING)
def test_it_is_told_whenever_it_happens(way):
    model, optimizer = build()
    step(model, optimizer)
    FLATTENING[way][0](optimizer)
    with pytest.warns(UserWarning, match="ratio is lost"):
        step(model, optimizer)


def test_a_copy_remembers():
    model, optimizer = copy.deepcopy(build())
    by_hand(optimizer)
    with pytest.warns(UserWarning, match="ratio is lost"):
        step(model, optimizer)


def test_rates_as_tensors_are_read_here():
    model = network()
    first, second = groups_of(model)
    optimizer = MuonAdam([{**first, "lr": torch.tensor(0.1)}, {**second, "lr": torch.tensor(0.01)}])
    for group in optimizer.param_groups:
        group["lr"].fill_(0.05)
    with pytest.warns(UserWarning, match="ratio is lost"):
        step(model, optimizer)


KEEPING = {
    "one_cycle": lambda o: schedulers.OneCycleLR(o, max_lr=[0.1, 0.01], total_steps=12),
    "cyclic": lambda o: schedulers.CyclicLR(o, base_lr=[0.02, 0.002], max_lr=[0.1, 0.01], step_size_up=3),
    "swa": lambda o: SWALR(o, swa_lr=[0.05, 0.005], anneal_epochs=3),
    "cosine": lambda o: schedulers.CosineAnnealingLR(o, 8, eta_min=1e-4),  # one floor for all is torch's only one
    "warm_up": lambda o: schedulers.LambdaLR(o, lambda step: min(1.0, step / 3)),  # 0 at first
    "linear": lambda o: schedulers.LinearLR(o, total_iters=4),
    "plateau": lambda o: None,
}


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", KEEPING)
@pytest.mark.parametrize("method", METHODS)
def test_what_keeps_the_ratio_is_not_told(method, scheduler):
    model, optimizer = build(method)
    made = KEEPING[scheduler](optimizer)
    for index in range(10):
        step(model, optimizer, index, made)


def test_groups_that_were_built_alike_may_stay_alike():
    model = network()
    optimizer = SteepestDescent(model, lr=0.1)
    scheduler = schedulers.OneCycleLR(optimizer, max_lr=0.1, total_steps=12)
    for index in range(3):
        step(model, optimizer, index, scheduler)


def test_loaded_rates_are_meant():
    _, optimizer = build()
    by_hand(optimizer)
    other, resumed = build()
    resumed.load_state_dict(optimizer.state_dict())
    step(other, resumed)


def test_a_step_that_only_makes_the_state_is_not_told():
    model, optimizer = build()
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()


@pytest.mark.parametrize("method", METHODS)
def test_momentum_may_be_cycled(method):
    model, optimizer = build(method)
    made = schedulers.OneCycleLR(optimizer, max_lr=[0.1, 0.01], total_steps=12, base_momentum=0.5, max_momentum=0.9)
    seen = set()
    for index in range(10):
        step(model, optimizer, index, made)
        seen.add(float(optimizer.param_groups[0]["momentum"]))
        assert all(p.isfinite().all() for p in model.parameters())
    assert min(seen) < 0.6
    assert max(seen) > 0.85


# What stands in a group can be saved by anyone and read by torch's strict loader; the rest is refused there.

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


@pytest.mark.filterwarnings("ignore:the gradient of .* is not finite:RuntimeWarning")
def test_numbers_in_groups_are_those_of_now():
    """Who reads groups between checkpoints finds what a checkpoint would hold, but for the sum over all weights."""
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
    options = {"precondition": InputMoment(structure="full"), "step_size": Momo()}
    optimizer = NewtonMuon(model, **options)
    for spoil in (False, False, True):
        optimizer.zero_grad()
        loss = model(torch.randn(3, 6)).square().mean()
        loss.backward()
        if spoil:
            model[0].weight.grad[0, 0] = torch.nan
        optimizer.step(loss=loss)
        read = [
            {k: v for k, v in group.items() if k not in ("params", "momo_weights")} for group in optimizer.param_groups
        ]
        saved = [{k: v for k, v in group.items() if k in read[0]} for group in optimizer.state_dict()["param_groups"]]
        assert read == saved
    assert (read[0]["steps_taken"], read[0]["skipped_steps"], read[0]["momo_steps"]) == (2, 1, 2.0)
    assert read[0]["input_steps"] == 3
