"""Going on with a peer's averages is going on with the peer."""

import copy
import itertools
import math

import pytest
import pytorch_optimizer
import torch
from torch import nn

import steepest
from steepest import RowScaling
from steepest.integrations.peers import SOURCES, import_state
from tests.cases import cases
from tests.reference import peers

MATRICES = ["0.weight", "2.weight", "4.weight"]
REST = ["6.weight", "0.bias", "2.bias", "4.bias", "6.bias"]
ADAM = {"betas": (0.9, 0.95), "eps": 1e-8, "lr": 1e-2}


def made(dtype=torch.float64):
    """Three matrices of two shapes, of which the smaller comes first, a head, and biases."""
    torch.manual_seed(7)
    sizes = (6, 5, 10, 5, 3)
    layers = [layer for m, n in itertools.pairwise(sizes) for layer in (nn.Linear(m, n), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).to(dtype)


def backward(model, step):
    dtype = next(model.parameters()).dtype
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step)).to(dtype)
    model.zero_grad()
    loss = (model(x) - x[:, :3].sin()).square().mean()
    loss.backward()
    return loss


def train(model, optimizers, steps):
    for step in steps:
        backward(model, step)
        for optimizer in optimizers:
            optimizer.step()


def named(model, names):
    found = dict(model.named_parameters())
    return [found[name] for name in names]


def muon(model, **options):
    options = {"lr": 0.02, "adam_lr": 1e-2, "betas": ADAM["betas"], "eps": ADAM["eps"], "polar": "svd", **options}
    return steepest.Muon(model, **options)


def goes_on(model, old, new, saved, source, names, tolerance=1e-10, **options):
    """Ten more steps of both, from the same weights; returns what was reported."""
    theirs, ours = model, copy.deepcopy(model)
    optimizer = new(ours)
    report = import_state(optimizer, saved, source, names, **options)
    before = [p.detach().clone() for p in model.parameters()]
    train(theirs, old, range(10, 20))
    train(ours, [optimizer], range(10, 20))
    for there, here, start in zip(theirs.parameters(), ours.parameters(), before, strict=True):
        assert (there - here).norm() <= tolerance * (there - start).norm()
    return report


def keller_jordan(model, momentum=0.95, **options):
    groups = [
        {"params": named(model, REST), "use_muon": False, "weight_decay": 0.0, **ADAM},
        {"params": named(model, MATRICES), "use_muon": True, "lr": 0.02, "momentum": momentum, "weight_decay": 0.1},
    ]
    return peers.KellerJordan(groups, **options)


def decayed(model, **options):
    """Ours with the decay of the matrices alone."""
    optimizer = muon(model, **options)
    next(group for group in optimizer.param_groups if group["role"] == "matrix")["weight_decay"] = 0.1
    return optimizer


@cases("nesterov, decay", [(True, 0.0), (False, 0.1), (True, 0.1)])
def test_torch_muon_and_adamw_side_by_side(nesterov, decay, monkeypatch):
    """The real ones; directions are exact, as torch's own are bfloat16's."""
    monkeypatch.setattr(torch.optim._muon, "_zeropower_via_newtonschulz", lambda g, *_: peers.polar(g))
    model = made()
    old = [
        torch.optim.Muon(named(model, MATRICES), lr=0.02, nesterov=nesterov, weight_decay=decay),
        torch.optim.AdamW(named(model, REST), weight_decay=0.0, **ADAM),
    ]
    train(model, old, range(10))

    def new(model):
        optimizer = muon(model, nesterov=nesterov)
        next(group for group in optimizer.param_groups if group["role"] == "matrix")["weight_decay"] = decay
        return optimizer

    saved, source = [one.state_dict() for one in old], ["torch.optim.Muon", "torch.optim.AdamW"]
    report = goes_on(model, old, new, saved, source, [MATRICES, REST], steps=10)
    assert sorted(report.taken) == sorted(MATRICES + REST)
    assert report.missing == report.unused == report.notes == ()
    assert {row.steps for row in report.rows} == {10}


def test_torch_muon_in_its_own_precision():
    """Its directions are bfloat16's, as are ours here. Averages of a wrong size would be off by 16% and more."""
    model = made(torch.float32)
    old = torch.optim.Muon(named(model, MATRICES), lr=0.02, weight_decay=0.0)
    rest = torch.optim.AdamW(named(model, REST), weight_decay=0.0, **ADAM)
    train(model, [old, rest], range(10))

    def new(model):
        return muon(model, polar="newton-schulz", coefficients="jordan", dtype=torch.bfloat16)

    saved = [old.state_dict(), rest.state_dict()]
    source = ["torch.optim.Muon", "torch.optim.AdamW"]
    goes_on(model, [old, rest], new, saved, source, [MATRICES, REST], tolerance=0.05, steps=10)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
def test_adamw(kind):
    model = made()
    old = kind(model.parameters(), lr=1e-2, betas=(0.9, 0.999), weight_decay=0.0)
    train(model, [old], range(10))
    names = [name for name, _ in model.named_parameters()]
    new = lambda model: steepest.Adam(model, lr=1e-2)  # noqa: E731
    goes_on(model, [old], new, old.state_dict(), f"torch.optim.{kind.__name__}", names)


def test_parameters_have_counts_of_their_own():
    model = made()
    old = torch.optim.AdamW(model.named_parameters(), lr=1e-2, weight_decay=0.0)
    model[6].requires_grad_(False)
    train(model, [old], range(7))
    model[6].requires_grad_(True)
    train(model, [old], range(7, 10))
    new = lambda model: steepest.Adam(model, lr=1e-2)  # noqa: E731
    report = goes_on(model, [old], new, old.state_dict(), "torch.optim.AdamW", None)  # the state has names
    assert {row.name: row.steps for row in report.rows if row.name.startswith(("4", "6"))} == {
        "4.weight": 10,
        "4.bias": 10,
        "6.weight": 3,
        "6.bias": 3,
    }


@pytest.mark.parametrize("nesterov", [True, False])
def test_pytorch_optimizer(nesterov, monkeypatch):
    module = pytorch_optimizer.optimizer.muon.base
    monkeypatch.setattr(module, "zero_power_via_newton_schulz_5", lambda g, **_: peers.orthogonalized(g, None))
    model = made()
    groups = [
        {"params": named(model, MATRICES), "use_muon": True, "lr": 0.02, "weight_decay": 0.1},
        {"params": named(model, REST), "use_muon": False, "weight_decay": 0.0, **ADAM},
    ]
    old = pytorch_optimizer.Muon(groups, nesterov=nesterov)
    train(model, [old], range(10))
    new = lambda model: decayed(model, nesterov=nesterov)  # noqa: E731
    report = goes_on(model, [old], new, old.state_dict(), "pytorch_optimizer", [MATRICES, REST])
    assert report.missing == report.unused == ()


def test_pytorch_optimizer_muon_clip_sums_its_gradients():
    model = made()
    old = pytorch_optimizer.MuonClip([{"params": named(model, MATRICES), "use_muon": True, "lr": 0.02}])
    backward(model, 0)
    gradient = model[2].weight.grad.clone()
    for _ in range(3):
        model[2].weight.grad = gradient.clone()
        old.step()
    optimizer = muon(model)
    import_state(optimizer, old.state_dict(), "pytorch_optimizer", MATRICES)
    kept = optimizer.state[model[2].weight]["momentum_buffer"]
    torch.testing.assert_close(kept, gradient * (1 - 0.95**3))


@pytest.mark.parametrize("sorts", [False, True])
def test_keller_jordan(sorts):
    model = made()
    old = keller_jordan(model, sorts=sorts)
    train(model, [old], range(10))
    report = goes_on(model, [old], decayed, old.state_dict(), "KellerJordan", [REST, MATRICES], steps=10)
    assert report.missing == ()


def test_keller_jordan_on_many_ranks():
    model = made()
    old = keller_jordan(model, sorts=True)
    train(model, [old], range(10))
    saved = [old.state_of_rank(rank, 2) for rank in range(2)]
    assert saved[0]["state"].keys() != saved[1]["state"].keys()
    report = goes_on(model, [old], decayed, saved, "KellerJordan", [[REST, MATRICES]] * 2, steps=10)
    assert report.missing == ()


def test_one_rank_of_many_may_not_say_whose_average_it_has():
    """If it sorted by shape, the second matrix of the group is 0.weight, else 1.weight."""
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 9), nn.Linear(9, 3))
    names = ["0.weight", "1.weight", "2.weight"]
    group = {"params": named(model, names), "use_muon": True, "lr": 0.02, "momentum": 0.9, "weight_decay": 0.0}
    saved = peers.KellerJordan([group]).state_dict()
    optimizer = muon(model)
    saved["state"] = {1: {"momentum_buffer": torch.ones(5, 5)}}
    with pytest.raises(ValueError, match=r"may be '1\.weight' or '0\.weight'.*Pass the states of all ranks"):
        import_state(optimizer, saved, "KellerJordan", names, steps=1)
    other = {**saved, "state": {0: {"momentum_buffer": torch.ones(9, 5)}}}  # it did sort
    assert import_state(optimizer, other, "KellerJordan", names, steps=1).taken == ("2.weight",)
    taken = import_state(optimizer, [saved, other], "KellerJordan", [names, names], steps=1).taken
    assert taken == ("0.weight", "2.weight")


@cases("nesterov, scale", [(False, "spectral_norm"), (True, "rms_norm"), (True, None)])
def test_dion(nesterov, scale):
    model = made()
    groups = [
        {"params": named(model, MATRICES)},
        {"params": named(model, REST), "algorithm": "adamw", "lr": 1e-2, "weight_decay": 0.0},
    ]
    old = peers.Dion(groups, lr=0.02, nesterov=nesterov, adjust_lr=scale, weight_decay=0.1)
    train(model, [old], range(10))
    ours = {"spectral_norm": "spectral", "rms_norm": "match_rms_adamw", None: "none"}[scale]
    new = lambda model: decayed(model, nesterov=nesterov, scale=ours)  # noqa: E731
    report = goes_on(model, [old], new, old.state_dict(), "dion", [MATRICES, REST])
    assert report.missing == report.unused == ()
    assert "a sum of gradients, times 1-b" in str(report)


def test_dion_nor_muon():
    model = made()
    old = peers.Dion(
        [
            {"params": named(model, MATRICES)},
            {"params": named(model, REST), "algorithm": "adamw", "lr": 1e-2, "weight_decay": 0.0},
        ],
        lr=0.02,
        norm=True,
        muon_beta2=0.9,
        weight_decay=0.1,
    )
    train(model, [old], range(10))
    stages = [RowScaling(beta2=0.9, eps=1e-10)]
    new = lambda model: decayed(model, nesterov=False, scale="spectral", stages=stages)  # noqa: E731
    report = goes_on(model, [old], new, old.state_dict(), "dion", [MATRICES, REST])
    assert report.rows[0].taken == ("momentum_buffer", "row_moment")
    without = import_state(muon(made()), old.state_dict(), "dion", [MATRICES, REST])
    assert ("0.weight (average of squares of rows)", "only RowScaling() keeps one") in without.unused


def test_dion2_keeps_no_average():
    model = made()
    old = peers.Dion2([{"params": named(model, MATRICES)}], lr=0.02)
    train(model, [old], range(3))
    optimizer = muon(model)
    with pytest.raises(ValueError, match=r"Nothing could be taken[\s\S]*error feedback"):
        import_state(optimizer, old.state_dict(), "dion", MATRICES)


@pytest.mark.parametrize("nesterov", [True, False])
def test_emerging_optimizers(nesterov):
    model = made()
    old = peers.EmergingOptimizers(named(model, MATRICES), lr=0.01, nesterov=nesterov)
    rest = torch.optim.AdamW(named(model, REST), weight_decay=0.0, **ADAM)
    train(model, [old, rest], range(10))

    def new(model):
        optimizer = muon(model, lr=0.05, scale="match_rms_adamw", nesterov=nesterov, adam_lr=1e-2)
        next(group for group in optimizer.param_groups if group["role"] == "matrix")["weight_decay"] = 0.01 / 5
        return optimizer

    saved, source = [old.state_dict(), rest.state_dict()], ["emerging_optimizers", "torch.optim.AdamW"]
    goes_on(model, [old, rest], new, saved, source, [MATRICES, REST], steps=10)


def test_timm():
    """Its states are those of KellerJordan's, with a count for Adam's alone."""
    model = made()
    old = keller_jordan(model)
    train(model, [old], range(10))
    saved = old.state_dict()
    for group in saved["param_groups"]:
        for index in group["params"]:
            saved["state"][index]["use_muon"] = group["use_muon"]
    assert goes_on(model, [old], decayed, saved, "timm", [REST, MATRICES], steps=10).missing == ()


@cases("ours, theirs", [(0.9, 0.95), (0.99, 0.9), (0.9, 0.0)])
@cases("source", ["KellerJordan", "dion"])
def test_with_another_momentum_the_plain_average_stays(ours, theirs, source):
    """Dual norms, and so Momo and regularised steps, are of the average whose weights sum to one."""
    torch.manual_seed(1)
    parameter = nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
    gradients = torch.randn(6, 4, 3, dtype=torch.float64)
    group = {"params": [parameter], "lr": 0.0, "weight_decay": 0.0}
    if source == "dion":
        old = peers.Dion([group], mu=theirs)
    else:
        old = peers.KellerJordan([{**group, "use_muon": True, "momentum": theirs}])
    for gradient in gradients:
        parameter.grad = gradient.clone()
        old.step()
    weights = theirs ** torch.arange(5, -1, -1, dtype=torch.float64)
    average = (weights[:, None, None] * gradients).sum(0) / weights.sum()
    new = steepest.PolarGrad([("w", parameter)], lr=1.0, momentum=ours, polar="svd")
    import_state(new, old.state_dict(), source, ["w"], steps=6)
    state = new.state[parameter]
    torch.testing.assert_close(state["momentum_buffer"] / (1 - ours**6), average)
    before = parameter.detach().clone()
    parameter.grad = average.clone()  # so that the average stays what it is
    new.step()
    length = torch.linalg.matrix_norm(average, ord="nuc")
    torch.testing.assert_close(before - parameter, length * peers.polar(average))


def test_momo_begins_its_model_of_the_loss_anew():
    model = made()
    old = keller_jordan(model)
    train(model, [old], range(10))
    optimizer = steepest.MuonMax(model, lr=0.05, step_size=steepest.Momo(), polar="svd")
    report = import_state(optimizer, old.state_dict(), "KellerJordan", [REST, MATRICES], steps=10)
    assert report.missing == ()
    loss = backward(model, 10).detach()
    optimizer.step(loss=loss)
    assert optimizer.diagnostics()["gap"] == pytest.approx(float(loss), rel=1e-9)
    assert 0 < optimizer.diagnostics()["t"] <= 1


def test_adamw_for_everything_becomes_muon():
    """The head and vectors go on as they are; of matrices, the average of squares is left behind, and said so."""
    model = made()
    old = torch.optim.AdamW(model.named_parameters(), weight_decay=0.0, **ADAM)
    train(model, [old], range(10))
    optimizer = muon(model)
    report = import_state(optimizer, old.state_dict(), "torch.optim.AdamW")
    assert report.missing == ()
    assert {name.split(" ")[0] for name, _ in report.unused} == set(MATRICES)
    state = old.state[model[0].weight]
    ratio = (1 - 0.95**10) / (1 - 0.9**10)
    torch.testing.assert_close(optimizer.state[model[0].weight]["momentum_buffer"], state["exp_avg"] * ratio)
    assert torch.equal(optimizer.state[model[6].weight]["second_moment"], old.state[model[6].weight]["exp_avg_sq"])


def test_what_has_no_average_of_squares_begins_anew_where_the_norm_needs_one():
    model = made()
    old = torch.optim.Muon([p for p in model.parameters() if p.ndim == 2])
    train(model, [old], range(2))
    names = [name for name, p in model.named_parameters() if p.ndim == 2]
    report = import_state(muon(model), old.state_dict(), "torch.optim.Muon", names, steps=2)
    assert report.taken == tuple(MATRICES)
    assert set(report.missing) == set(REST)
    reasons = {row.name: row.reason for row in report.rows}
    assert "needs an average of squares, and torch.optim.Muon kept none" in reasons["6.weight"]
    assert reasons["6.bias"] == "the state has no average of it"
    assert "taken for 3 of 8 parameters" in str(report)


def test_layers_that_are_one_parameter_here_and_three_there():
    model = nn.Sequential(nn.Linear(4, 12, bias=False), nn.Linear(12, 4, bias=False))
    pieces = [nn.Parameter(part.clone()) for part in model[0].weight.detach().split((6, 3, 3))]
    old = torch.optim.AdamW(pieces)
    for piece in pieces:
        piece.grad = torch.randn_like(piece)
    old.step()
    fused = {"0.weight": ["q", "k", "v"]}
    here = steepest.Adam(model)
    import_state(here, old.state_dict(), "torch.optim.AdamW", ["q", "k", "v"], fused=fused)
    both = [(here.state[model[0].weight], [old.state[piece] for piece in pieces])]
    back = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    back.step()
    apart = steepest.Adam([*zip("qkv", pieces, strict=True), ("1.weight", model[1].weight)])
    import_state(apart, back.state_dict(), "torch.optim.AdamW", ["0.weight", "1.weight"], fused=fused)
    both.append((back.state[model[0].weight], [apart.state[piece] for piece in pieces]))
    for one, parts in both:
        for ours, theirs in (("momentum_buffer", "exp_avg"), ("second_moment", "exp_avg_sq")):
            joined = torch.cat([part[ours if ours in part else theirs] for part in parts])
            torch.testing.assert_close(joined, one[ours if ours in one else theirs])


def test_names_of_wrapped_models_are_known():
    model = made()
    wrapped = nn.ModuleDict({"module": model})
    old = torch.optim.AdamW([(f"_orig_mod.{name}", p) for name, p in wrapped.named_parameters()])
    train(model, [old], range(1))
    assert import_state(steepest.Adam(model), old.state_dict(), "torch.optim.AdamW").missing == ()


def test_a_state_that_has_names_in_place_of_numbers_needs_no_others():
    """As torch's distributed checkpoints have them."""
    model = made()
    old = torch.optim.AdamW(model.parameters())
    train(model, [old], range(1))
    names = [name for name, _ in model.named_parameters()]
    saved = old.state_dict()
    saved["state"] = {names[index]: state for index, state in saved["state"].items()}
    saved["param_groups"][0]["params"] = names
    assert import_state(steepest.Adam(model), saved, "torch.optim.AdamW").missing == ()


@cases(
    "group, note",
    [
        ({"maximize": True}, "Pass the negated loss"),
        ({"amsgrad": True}, "largest second moment"),
        ({"weight_decay": 0.1}, "weight decay as part of the gradient"),
    ],
)
def test_what_averages_have_in_them_is_said(group, note):
    model = made()
    old = torch.optim.Adam(model.parameters(), **group)
    train(model, [old], range(1))
    names = [name for name, _ in model.named_parameters()]
    report = import_state(steepest.Adam(model), old.state_dict(), "torch.optim.Adam", names)
    assert note in str(report)
    assert len(report.notes) == 1


def adamw_state():
    model = made()
    old = torch.optim.AdamW(model.parameters())
    train(model, [old], range(2))
    return model, old.state_dict(), [name for name, _ in model.named_parameters()]


def put(saved, key, value):
    saved["state"][0][key] = value


@cases(
    "spoil, error, told",
    [
        (lambda s: s.pop("state"), ValueError, "the whole checkpoint"),
        (lambda s: put(s, "step", -1), ValueError, "step must be at least 0"),
        (lambda s: put(s, "step", torch.tensor([1.0, 2.0])), ValueError, "one whole number"),
        (lambda s: put(s, "step", 1.5), TypeError, "whole number"),
        (lambda s: put(s, "exp_avg", "text"), TypeError, "floating point"),
        (lambda s: put(s, "exp_avg", torch.zeros(5, 6, dtype=torch.int64)), TypeError, "floating point"),
        (lambda s: put(s, "exp_avg", torch.zeros(5, 6, device="meta")), TypeError, "with numbers"),
        (lambda s: put(s, "exp_avg", torch.full((5, 6), math.nan)), ValueError, "not finite"),
        (lambda s: put(s, "exp_avg_sq", torch.full((5, 6), math.inf)), ValueError, "not finite"),
        (lambda s: put(s, "exp_avg_sq", torch.full((5, 6), -1.0)), ValueError, "cannot be below 0"),
        (lambda s: put(s, "exp_avg", torch.zeros(6, 5)), ValueError, "has shape"),
        (lambda s: put(s, "exp_avg_sq", torch.zeros(6, 5)), ValueError, "has shape"),
        (lambda s: s["state"][0].pop("exp_avg"), ValueError, "'exp_avg' is needed"),
        (lambda s: s["state"].update({99: {}}), ValueError, "in no parameter group"),
        (lambda s: s["state"].update({0: [1]}), TypeError, "a dictionary with named entries"),
        (lambda s: s["param_groups"][0].update(betas=0.9), TypeError, "betas must be two numbers"),
        (lambda s: s["param_groups"][0].update(betas=(1.0, 0.9)), ValueError, r"in \[0, 1\)"),
        (lambda s: s["param_groups"][0].pop("betas"), ValueError, "has no 'betas'"),
        (lambda s: s["param_groups"][0].update(params=[0] * 8), ValueError, "no name of one alone"),
        (lambda s: s.update(param_groups=[7]), TypeError, "a parameter group must be"),
    ],
)
def test_a_damaged_state_is_refused_and_nothing_changes(spoil, error, told):
    model, saved, names = adamw_state()
    optimizer = steepest.Adam(model)
    train(model, [optimizer], range(1))
    before = copy.deepcopy(optimizer.state_dict())
    spoil(saved)
    with pytest.raises(error, match=told):
        import_state(optimizer, saved, "torch.optim.AdamW", names)
    after = optimizer.state_dict()
    assert str(after["param_groups"]) == str(before["param_groups"])
    for index, state in before["state"].items():
        assert all(torch.equal(value, after["state"][index][key]) for key, value in state.items())


@cases(
    "source, names, options, error, told",
    [
        ("torch.optim.Muno", None, {}, ValueError, "did you mean 'torch.optim.Muon'"),
        ("torch.optim.AdamW", None, {}, ValueError, "has no names of its 8 parameters"),
        ("torch.optim.AdamW", ["0.weight"], {}, ValueError, "1 names for the 8 parameters"),
        ("torch.optim.AdamW", [["0.weight"], ["0.bias"]], {}, ValueError, r"lists of \[1, 1\] names for groups"),
        ("torch.optim.AdamW", "0.weight", {}, TypeError, "names must be"),
        ("torch.optim.AdamW", ["0.weight"] * 8, {}, ValueError, "stands there twice"),
        ("torch.optim.Muon", "all", {}, ValueError, "'momentum_buffer' is needed. Is source= right"),
        ("torch.optim.AdamW", "reversed", {}, ValueError, "Give names= in the order"),
        ("torch.optim.AdamW", "misspelt", {}, ValueError, "Did you mean '0.weight'"),
        ("torch.optim.AdamW", "all", {"steps": -1}, ValueError, "steps must be"),
        ("torch.optim.AdamW", "all", {"fused": {"a": ["b"]}}, ValueError, "must be a parameter here and b averages"),
        ("torch.optim.AdamW", "all", {"fused": {"a": ["b", "b"]}}, ValueError, "stands there twice"),
        ("torch.optim.AdamW", "all", {"fused": ["a"]}, TypeError, "fused must be a mapping"),
        (["torch.optim.AdamW"] * 2, "all", {}, ValueError, "source: 2 for 1 states"),
    ],
)
def test_what_does_not_fit_is_refused(source, names, options, error, told):
    model, saved, known = adamw_state()
    changed = {"all": known, "reversed": known[::-1], "misspelt": ["0.wieght", *known[1:]]}
    names = changed.get(names, names) if isinstance(names, str) else names
    with pytest.raises(error, match=told):
        import_state(steepest.Adam(model), saved, source, names, **options)


def test_a_whole_without_rows_is_refused():
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    entry = {"step": 1, "exp_avg": torch.tensor(1.0), "exp_avg_sq": torch.tensor(1.0)}
    saved = {"state": {0: entry}, "param_groups": [{"params": [0], "betas": (0.9, 0.95)}]}
    with pytest.raises(ValueError, match=r"fused: 'whole' has the shape \(\), which is not that of 0\.weight"):
        import_state(steepest.Adam(model), saved, "torch.optim.AdamW", ["whole"], fused={"whole": ["0.weight"]})


def test_states_that_contradict_each_other_are_refused():
    model, saved, names = adamw_state()
    optimizer = steepest.Adam(model)
    assert import_state(optimizer, [saved, saved], "torch.optim.AdamW", [names, names]).missing == ()
    other = copy.deepcopy(saved)
    other["state"][0]["exp_avg"] += 1
    with pytest.raises(ValueError, match=r"different averages of '0\.weight'"):
        import_state(optimizer, [saved, other], "torch.optim.AdamW", [names, names])
    with pytest.raises(ValueError, match="names: 1 for 2 states"):
        import_state(optimizer, [saved, other], "torch.optim.AdamW", [names])


def test_a_count_that_is_missing_is_asked_for():
    model = made()
    old = torch.optim.Muon(named(model, MATRICES))
    train(model, [old], range(1))
    with pytest.raises(ValueError, match=r"does not say how many gradients it averages. Give steps="):
        import_state(muon(model), old.state_dict(), "torch.optim.Muon", MATRICES)


def test_every_source_was_tried():
    tried = {"torch.optim.Muon", "torch.optim.AdamW", "torch.optim.Adam", "KellerJordan", "dion", "timm"}
    assert {*SOURCES} == tried | {"emerging_optimizers", "pytorch_optimizer"}


def test_half_precision_is_widened_and_the_given_tensors_stay_as_they_are():
    _, saved, names = adamw_state()
    half = copy.deepcopy(saved)
    for state in half["state"].values():
        state.update({key: state[key].bfloat16() for key in ("exp_avg", "exp_avg_sq")})
    kept = copy.deepcopy(half)
    small = made(torch.bfloat16)
    optimizer = steepest.Adam(small)
    import_state(optimizer, half, "torch.optim.AdamW", names)
    train(small, [optimizer], range(2))
    assert optimizer.state[small[0].weight]["momentum_buffer"].dtype == torch.float32
    assert torch.equal(half["state"][0]["exp_avg"], kept["state"][0]["exp_avg"])


@pytest.mark.parametrize("taken", [0, 2])
def test_averages_of_sixteen_bits_and_kept_bits_of_weights(taken):
    _, saved, names = adamw_state()
    model = made(torch.bfloat16)
    optimizer = steepest.Adam(model, rounding="kept", momentum_dtype=torch.bfloat16)
    train(model, [optimizer], range(taken))
    low = {p: optimizer.state[p]["weight_low_bits"].clone() for p in model.parameters() if taken}
    import_state(optimizer, saved, "torch.optim.AdamW", names)
    for parameter, state in zip(model.parameters(), saved["state"].values(), strict=True):
        assert torch.equal(optimizer.state[parameter]["momentum_buffer"], state["exp_avg"].bfloat16())
        if taken:  # they are of the weights, not of the averages
            assert torch.equal(optimizer.state[parameter]["weight_low_bits"], low[parameter])
    train(model, [optimizer], range(2))
    assert all(p.isfinite().all() for p in model.parameters())


def test_dual_norms_of_the_averages_before_are_forgotten():
    model = made()
    old = keller_jordan(model)
    train(model, [old], range(2))
    optimizer = steepest.MuonMax(model, lr=0.01, dual="stale")
    train(model, [optimizer], range(1))
    assert "dual_norm" in optimizer.state[model[0].weight]
    import_state(optimizer, old.state_dict(), "KellerJordan", [REST, MATRICES], steps=2)
    assert "dual_norm" not in optimizer.state[model[0].weight]
