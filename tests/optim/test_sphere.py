"""Weights that keep the norm they had at first, matrix by matrix, against the reference and its own laws."""

import copy
from itertools import product

import pytest
import torch
from torch import nn

from steepest import (
    Ada2,
    AdaInf,
    Decoupled,
    Euclid,
    Hybrid,
    Max,
    Momo,
    Muon,
    MuonMax,
    RowScaling,
    Sign,
    Spectral,
    Sphere,
    SteepestDescent,
    Sum,
    View,
)
from steepest.optim.guard import Guard
from steepest.testing import backward, check_recipe, network
from tests.cases import cases
from tests.optim.test_grid import LR, STEPS, Way, assert_equal_runs, others
from tests.optim.test_guard import stay_on_device
from tests.reference import grid
from tests.reference.regression import ROLES, blocks, oracle, parameter_groups

pytestmark = pytest.mark.filterwarnings("ignore:The loss was below:UserWarning")

TREES = {
    Max(): ("max", *ROLES),
    Sum(): ("sum", *ROLES),
    Euclid(): ("euclid", *ROLES),
    Hybrid(): ("euclid", ("max", "matrix"), "embedding", "head", "vector"),
}
WAYS = {
    "plain": Way(nesterov=True),
    "stale": Way(dual="stale"),
    "momo": Way(lower_bound=1.5),
    "momo, nesterov": Way(lower_bound=1.5, nesterov=True),
    "momo, nesterov, direct, stale": Way(lower_bound=1.45, nesterov=True, bookkeeping="direct", dual="stale"),
    "auto, stale": Way(lower_bound="auto", dual="stale"),
}
KINDS = {"kept": Sphere(), "relative": Sphere(relative=True)}
ON_SPHERES = ("matrix", "head")
KINDS_AND_NORMS = list(product(KINDS, [AdaInf(), Ada2(), Sign()]))
CELLS = [
    (*cell, *KINDS_AND_NORMS[(place + place // len(WAYS)) % len(KINDS_AND_NORMS)])
    for place, cell in enumerate(product(TREES, [False, True], WAYS))
]


@pytest.mark.slow
@cases("tree, regularized, way, kind, other", CELLS)
def test_fifty_steps_equal_the_reference(tree, regularized, way, kind, other):
    """Some roles stay on spheres, some decay; Momo's model is the weighted sum of all past ones at the real weights."""
    norms, way = others(other), WAYS[way]
    decay = {role: 0.0 if role in ON_SPHERES else 0.2 for role in ROLES}
    groups, parameters = parameter_groups()
    optimizer = SteepestDescent(
        groups,
        lr=LR,
        momentum=0.9,
        nesterov={role: way.nesterov and role == "matrix" for role in ROLES},
        weight_decay={role: KINDS[kind] if role in ON_SPHERES else decay[role] for role in ROLES},
        betas=(0.9, 0.95),
        norms=norms,
        product=tree,
        regularized=regularized,
        step_size=way.step_size,
        dual=way.dual,
    )
    options = {
        role: {
            "lr": LR[role],
            "weight_decay": decay[role],
            "nesterov": way.nesterov and role == "matrix",
            "sphere": kind if role in ON_SPHERES else "",
        }
        for role in ROLES
    }
    waits = way.lower_bound is not None or tree != (Euclid() if regularized else Max())
    method = grid.Method(
        TREES[tree], regularized=regularized, lower_bound=way.lower_bound, stale=way.dual == "stale" and waits
    )
    assert_equal_runs(optimizer, parameters, grid.descend(blocks(norms, options), oracle, STEPS, method))


def norms_of(model):
    return [float(torch.linalg.vector_norm(p.detach().double())) for p in model.parameters() if p.ndim > 1]


def test_a_step_is_that_of_the_source():
    """W' = Norm(W - lr Norm(u) r) r, with u the polar factor of the gradient."""
    generator = torch.Generator().manual_seed(0)
    start, gradient = (torch.randn(5, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    weight = nn.Parameter(start.clone())
    optimizer = Muon([weight], lr=0.1, weight_decay=Sphere(relative=True), nesterov=False, polar="svd")
    weight.grad = gradient
    optimizer.step()
    u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
    r = start.norm()
    moved = start - 0.1 * (u @ vh) / (u @ vh).norm() * r
    torch.testing.assert_close(weight.detach(), moved / moved.norm() * r)
    assert optimizer.state[weight]["radius"].tolist() == pytest.approx([float(r)])


VIEWS = {
    "heads": ((12, 5), View(heads=4)),
    "heads read": ((5, 12), View(heads=4, heads_dim="in")),
    "grouped queries": ((24, 5), View(split=(12, 6, 6), heads=(4, 2, 2))),
    "alternating": ((16, 5), View(split=(8, 8), interleave=4)),
    "experts": ((4, 5, 3), View(experts=True)),
}


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("name", VIEWS)
def test_each_matrix_of_a_view_keeps_its_own_norm(name, relative):
    shape, view = VIEWS[name]
    generator = torch.Generator().manual_seed(2)
    weight = nn.Parameter(torch.randn(shape, generator=generator))

    def sizes():
        return torch.cat([part.norm(dim=(1, 2)) for part in view.split_tensor(weight.detach())])

    first = sizes()
    group = {"params": [weight], "view": view, "role": "matrix"}
    optimizer = SteepestDescent([group], lr=0.3, weight_decay=Sphere(relative=relative))
    for _ in range(5):
        before = weight.detach().clone()
        weight.grad = torch.randn(shape, generator=generator)
        optimizer.step()
        assert float((weight.detach() - before).norm()) > 0.1
    torch.testing.assert_close(sizes(), first, rtol=1e-6, atol=0)
    torch.testing.assert_close(optimizer.state[weight]["radius"], first, rtol=1e-6, atol=0)


def test_for_norms_of_entries_a_parameter_is_one_matrix():
    weight = nn.Parameter(torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(1)))
    optimizer = SteepestDescent(
        [{"params": [weight], "role": "embedding", "norm": Sign()}], lr=0.1, weight_decay=Sphere()
    )
    first, parts = float(weight.detach().norm()), weight.detach().flatten(1).norm(dim=1)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert float(weight.detach().norm()) == pytest.approx(first, rel=1e-6)
    assert optimizer.state[weight]["radius"].shape == (1,)
    assert not torch.allclose(weight.detach().flatten(1).norm(dim=1), parts, rtol=1e-3)


@pytest.mark.parametrize("step_size", [None, Momo(-100.0), Momo(-100.0, bookkeeping="direct")])
@pytest.mark.parametrize("relative", [False, True])
def test_a_matrix_that_is_zero_at_first_moves_as_if_there_were_no_sphere(relative, step_size):
    def run(decay):
        weights = [nn.Parameter(start.clone()) for start in (torch.zeros(4, 3), torch.zeros(3, 4))]
        optimizer = SteepestDescent(weights, lr=0.1, weight_decay=decay, step_size=step_size)
        generator = torch.Generator().manual_seed(3)
        for _ in range(4):
            for weight in weights:
                weight.grad = torch.randn(weight.shape, generator=generator)
            optimizer.step(loss=1.0)
        return weights, optimizer

    expected, _ = run(0.0)
    weights, optimizer = run(Sphere(relative=relative))
    for one, other in zip(weights, expected, strict=True):
        assert torch.equal(one, other)
    assert all(optimizer.state[weight]["radius"].tolist() == [float("inf")] for weight in weights)


@pytest.mark.parametrize("bookkeeping", ["recurrent", "direct"])
@pytest.mark.parametrize("dual", ["cached", "stale"])
@pytest.mark.parametrize("relative", [False, True])
def test_momo_predicts_what_steps_gain_also_where_weights_were_moved_off(relative, dual, bookkeeping):
    """On a linear loss the model is exact, and so is its value after steps of any length on spheres."""
    generator = torch.Generator().manual_seed(1)
    slopes = [torch.randn(5, 3, generator=generator, dtype=torch.float64) for _ in range(3)]
    weights = [nn.Parameter(torch.randn(5, 3, generator=generator, dtype=torch.float64)) for _ in slopes]
    with torch.no_grad():
        weights[2].zero_()
    momo = Momo(-100.0, bookkeeping=bookkeeping)
    optimizer = SteepestDescent(
        weights,
        lr=0.7,
        norms={"matrix": Spectral(polar="svd")},
        weight_decay=Sphere(relative=relative),
        step_size=momo,
        dual=dual,
    )
    for step in range(4):
        optimizer.zero_grad()
        if step == 2:
            with torch.no_grad():
                weights[0].mul_(1.5)
        loss = sum((slope * weight).sum() for slope, weight in zip(slopes, weights, strict=True))
        loss.backward()
        if step == 2 and bookkeeping == "recurrent":
            with pytest.warns(UserWarning, match="Weights were changed"):
                optimizer.step(loss=loss.detach())
        else:
            optimizer.step(loss=loss.detach())
        value = optimizer.state_dict()["param_groups"][0]["momo_value"]
        now = sum(float((s * w.detach()).sum()) for s, w in zip(slopes, weights, strict=True))
        assert value == pytest.approx(now, rel=1e-9)
    sizes = [float(weight.detach().norm()) for weight in weights[:2]]
    assert sizes == pytest.approx([float(optimizer.state[weight]["radius"]) for weight in weights[:2]])


@pytest.mark.parametrize(("second", "tangent"), [(1.0, -3.22), (0.1, 11.8)])
def test_momo_does_not_step_where_nothing_is_gained_along_the_sphere(second, tangent):
    """Direction -1 for the momentum diag(1, 20): all that it gains may be radial, and more than that."""
    weight = nn.Parameter(torch.diag(torch.tensor([0.3, second], dtype=torch.float64)))
    optimizer = Muon([weight], lr=0.1, polar="svd", nesterov=False, weight_decay=Sphere(), step_size=Momo())
    before = weight.detach().clone()
    weight.grad = torch.diag(torch.tensor([1.0, 20.0], dtype=torch.float64))
    d, w = -torch.eye(2, dtype=torch.float64), before
    along = d - (d * w).sum() / (w * w).sum() * w
    assert -float((weight.grad * along).sum()) == pytest.approx(tangent, abs=0.01)
    optimizer.step(loss=1.0)
    assert optimizer.diagnostics()["t"] == pytest.approx(min(1 / (0.1 * tangent), 1) if tangent > 0 else 0, rel=1e-2)
    assert torch.equal(before, weight.detach()) is (tangent < 0)


@pytest.mark.parametrize("options", [{}, {"relative": True}])
def test_it_keeps_the_laws_of_recipes(options):
    def on_spheres(model, **given):
        return Muon(model, **{"weight_decay": Sphere(**options), **given})

    check_recipe(on_spheres)


def test_it_keeps_the_laws_of_recipes_with_norms_of_all_layers():
    def on_spheres(model, **given):
        return MuonMax(model, **{"weight_decay": Sphere(), "stages": [RowScaling()], **given})

    check_recipe(on_spheres)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kept"])
def test_norms_of_half_precision_do_not_drift(dtype, rounding):
    if dtype == torch.float16 and rounding != "nearest":
        pytest.skip("for bfloat16 only")
    model = network(dtype)
    optimizer = Muon(model, lr=0.05, weight_decay=Sphere(), rounding=rounding)
    first = norms_of(model)
    for step in range(30):
        optimizer.zero_grad()
        backward(model, step, dtype)
        optimizer.step()
    weights = [model[0].weight, model[2].weight, model[5].weight]
    assert all(optimizer.state[w]["radius"].dtype == torch.float32 for w in weights)
    assert norms_of(model)[:3] == pytest.approx(first[:3], rel=2e-3)


def test_steps_that_are_masked_write_no_radius(monkeypatch):
    monkeypatch.setattr(Guard, "admit", stay_on_device)
    weight = nn.Parameter(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
    first = weight.detach().clone()
    optimizer = Muon([weight], weight_decay=Sphere())
    weight.grad = torch.full((4, 3), torch.nan)
    optimizer.step()
    assert torch.equal(weight, first)
    assert optimizer.state[weight]["radius"].tolist() == [0.0]
    weight.grad = torch.ones(4, 3)
    optimizer.step()
    assert optimizer.state[weight]["radius"].tolist() == pytest.approx([float(first.norm())])


def test_what_does_not_move_keeps_its_bits():
    model = network()
    optimizer = Muon(model, lr=0.1, weight_decay=Sphere())
    for step in range(4):
        optimizer.zero_grad()
        backward(model, step)
        if step == 3:
            for group in optimizer.param_groups:
                group["lr"] = 0.0
            before = copy.deepcopy(model)
        optimizer.step()
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), before.parameters(), strict=True))


def test_a_state_of_another_kind_goes_on_with_radii_of_now_and_back():
    model = network()
    plain = Muon(model, weight_decay=0.1)
    backward(model, 0)
    plain.step()
    optimizer = Muon(model, weight_decay=Sphere())
    optimizer.load_state_dict(plain.state_dict())
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0] * len(optimizer.param_groups)
    first = norms_of(model)
    optimizer.step()
    assert norms_of(model) == pytest.approx(first, rel=1e-6)
    with pytest.warns(UserWarning, match=r"radii .* dropped. Build the optimizer with weight_decay=Sphere\(\)"):
        plain.load_state_dict(optimizer.state_dict())
    assert not any("radius" in state for state in plain.state.values())


def test_rates_are_refused():
    with pytest.raises(ValueError, match="Sphere: rate must be 0"):
        Sphere(rate=0.1)
    with pytest.raises(TypeError, match="Sphere: relative"):
        Sphere(relative=1)
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = Muon([weight], weight_decay=Sphere())
    weight.grad = torch.ones(2, 2)
    for rate in (0.1, torch.tensor(0.1)):
        optimizer.param_groups[0]["weight_decay"] = rate
        with pytest.raises(ValueError, match=r"parameter group 0: weight_decay is .*keep their radius do not decay"):
            optimizer.step()
    optimizer.param_groups[0]["weight_decay"] = Decoupled(0.1)
    optimizer.step()
    optimizer.param_groups[0]["weight_decay"] = Sphere()
    optimizer.step()
    assert optimizer.param_groups[0]["decay_kind"].startswith("Sphere(")
