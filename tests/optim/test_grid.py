"""Every cell of the grid of arXiv:2510.09827 against a reference that uses definitions only, and what cells share."""

from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from steepest import (
    Ada2,
    AdaInf,
    Euclid,
    Fixed,
    Hybrid,
    Max,
    Momo,
    Muon,
    MuonAdam,
    MuonMax,
    PolarGrad,
    Scion,
    Sign,
    SignDescent,
    Spectral,
    SteepestDescent,
    Sum,
)
from tests.cases import cases
from tests.reference import grid, muon
from tests.reference.regression import ROLES, blocks, loss_of, oracle, parameter_groups, train

# Bounds above the loss are part of what is compared.
pytestmark = pytest.mark.filterwarnings("ignore:The loss was below:UserWarning")

STEPS = 50
SPECTRAL = Spectral(scale="none", polar="svd")
SHAPED = Spectral(scale="spectral", polar="svd")
HYBRID = ("euclid", ("max", "matrix"), "embedding", "head", "vector")
TREES = {Max(): ("max", *ROLES), Euclid(): ("euclid", *ROLES), Hybrid(): HYBRID}
MORE_TREES = {
    Sum(): ("sum", *ROLES),
    Max(Euclid("matrix", "head"), Sum("embedding", "vector")): (
        "max",
        ("euclid", "matrix", "head"),
        ("sum", "embedding", "vector"),
    ),
}


@dataclass(frozen=True)
class Way:
    """One way to run a cell."""

    nesterov: bool = False
    weight_decay: float = 0.0
    lower_bound: object = None  # None: no Momo
    bookkeeping: str = "recurrent"
    dual: str = "cached"

    @property
    def step_size(self):
        return Fixed() if self.lower_bound is None else Momo(self.lower_bound, bookkeeping=self.bookkeeping)


def sometimes(step):
    """A lower bound that binds on every third step only, counted from 0."""
    return 1.3 if step % 3 == 2 else 0.0


LR = {"matrix": 0.5, "embedding": 0.2, "head": 0.2, "vector": 0.2}
DECAYED = Way(weight_decay=0.3, nesterov=True)
WAYS = {
    "plain": Way(),
    "decay, nesterov, stale": replace(DECAYED, dual="stale"),
    "momo": Way(lower_bound=1.2),
    "momo, decay, nesterov": replace(DECAYED, lower_bound=sometimes),
    "momo, decay, nesterov, direct, stale": replace(DECAYED, lower_bound=1.45, bookkeeping="direct", dual="stale"),
    "auto, decay, stale": Way(weight_decay=0.3, lower_bound="auto", dual="stale"),
}
CELLS = [
    *product(TREES, [False, True], [Sign(), AdaInf(), Ada2()], WAYS),
    *product(MORE_TREES, [False, True], [Ada2()], list(WAYS)[3:5]),
]


def others(norm):
    return {"matrix": SPECTRAL, "embedding": norm, "head": norm, "vector": norm}


def expected_run(norms, tree, way, *, regularized, ahead, decayed):
    options = {
        role: {
            "lr": LR[role],
            "weight_decay": way.weight_decay if role in decayed else 0.0,
            "nesterov": way.nesterov and role in ahead,
        }
        for role in ROLES
    }
    # Without Momo these wait for no number of all layers, so that steps are exact whatever `dual` says.
    waits = way.lower_bound is not None or tree != (Euclid() if regularized else Max())
    method = grid.Method(
        tree={**TREES, **MORE_TREES}[tree],
        regularized=regularized,
        beta=0.9,
        beta2=0.95,
        lower_bound=way.lower_bound,
        stale=way.dual == "stale" and waits,
    )
    return grid.descend(blocks(norms, options), oracle, STEPS, method)


def assert_equal_runs(optimizer, parameters, expected):
    """Weights after each step, and what the diagnostics say of the last."""
    for ours, theirs in zip(train(optimizer, parameters, STEPS), expected, strict=True):
        np.testing.assert_allclose(ours, np.concatenate([w.ravel() for w in theirs.weights]), rtol=0, atol=1e-10)
    numbers = optimizer.diagnostics()
    momo = "momo_value" in optimizer.param_groups[0]
    assert ("t" in numbers) == momo
    if momo:
        assert numbers["t"] == pytest.approx(expected[-1].length, rel=1e-6)
        assert numbers["dual_norm"] == pytest.approx(expected[-1].total, rel=1e-6)
        assert any(step.length < 1 for step in expected)  # or Momo would not have been tested


def identity(value):
    return {False: "constrained", True: "regularized"}[value] if isinstance(value, bool) else str(value)


@pytest.mark.slow
@cases("tree, regularized, other, way", CELLS)
def test_every_cell_equals_the_reference(tree, regularized, other, way):
    norms, way = others(other), WAYS[way]
    groups, parameters = parameter_groups()
    optimizer = SteepestDescent(
        groups,
        lr=LR,
        momentum=0.9,
        nesterov={role: way.nesterov and role == "matrix" for role in ROLES},
        weight_decay=way.weight_decay,
        betas=(0.9, 0.95),
        norms=norms,
        product=tree,
        regularized=regularized,
        step_size=way.step_size,
        dual=way.dual,
    )
    expected = expected_run(norms, tree, way, regularized=regularized, ahead=["matrix"], decayed=ROLES)
    assert_equal_runs(optimizer, parameters, expected)


def same(norm):
    return dict.fromkeys(ROLES, norm)


ADAM, RATES = {"adam_lr": 0.2, "betas": (0.9, 0.95)}, {"lr": 0.5, "weight_decay": 0.3}
SPECTRAL_OPTIONS = {"momentum": 0.9, "polar": "svd", "scale": "spectral", **RATES}
RECIPES = {  # what builds it; what its product, mode and other norm are, and which roles look ahead
    Muon: ({**SPECTRAL_OPTIONS, **ADAM, "nesterov": True}, Max(), False, AdaInf(), ["matrix"]),
    MuonAdam: ({**SPECTRAL_OPTIONS, **ADAM}, Max(), False, AdaInf(), []),
    Scion: ({**SPECTRAL_OPTIONS, "other_lr": 0.2, "nesterov": True}, Max(), False, Sign(), ROLES),
    PolarGrad: ({**SPECTRAL_OPTIONS, **ADAM}, Euclid(), True, Ada2(), []),
    MuonMax: ({**SPECTRAL_OPTIONS, **ADAM}, Hybrid(), True, Ada2(), []),
}
RECIPE_WAYS = {
    "plain": Way(),
    "momo": Way(lower_bound=sometimes),
    "momo, direct, stale": Way(lower_bound=1.4, bookkeeping="direct", dual="stale"),
    "auto": Way(lower_bound="auto"),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", RECIPE_WAYS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_equals_the_reference(recipe, way):
    options, tree, regularized, other, ahead = RECIPES[recipe]
    norms = {**same(other), "matrix": SHAPED}
    way = replace(RECIPE_WAYS[way], nesterov=True, weight_decay=0.3)
    groups, parameters = parameter_groups()
    optimizer = recipe(groups, **options, step_size=way.step_size, dual=way.dual)
    expected = expected_run(norms, tree, way, regularized=regularized, ahead=ahead, decayed=ROLES[:3])
    assert_equal_runs(optimizer, parameters, expected)


@pytest.mark.parametrize("lower_bound", [None, 1.3])
@pytest.mark.parametrize("regularized", [False, True])
def test_sign_descent_equals_the_reference(regularized, lower_bound):
    way = replace(DECAYED, lower_bound=lower_bound)
    groups, parameters = parameter_groups()
    rates = {role: {"lr": 0.1} for role in ROLES}
    optimizer = SignDescent(
        groups, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.3, regularized=regularized, step_size=way.step_size
    )
    for role in ROLES:
        rates[role] |= {"nesterov": True, "weight_decay": 0.0 if role == "vector" else 0.3}
    method = grid.Method(("max", *ROLES), regularized=regularized, lower_bound=lower_bound)
    assert_equal_runs(optimizer, parameters, grid.descend(blocks(same(Sign()), rates), oracle, STEPS, method))


def test_the_reference_is_that_of_muon_and_adam_where_both_apply(rng):
    starts = [np.random.default_rng(1).normal(size=shape) for shape in [(4, 7), (5,)]]
    gradients = [[np.random.default_rng(step).normal(size=w.shape) for w in starts] for step in range(STEPS)]
    for nesterov in (False, True):
        found = grid.descend(
            [
                grid.Block(starts[0], "matrix", "spectral", 0.1, 0.3, nesterov, scale=1.7),
                grid.Block(starts[1], "vector", "ada_inf", 0.03, 0.2),
            ],
            lambda weights, step: (0.0, gradients[step]),
            STEPS,
            grid.Method(("max", "matrix", "vector")),
        )
        first, second = ([torch.from_numpy(g[i]) for g in gradients] for i in range(2))
        options = {"lr": 0.1, "momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.3, "scale": 1.7}
        matrix = muon.muon(torch.from_numpy(starts[0]), first, **options)
        vector = muon.adam(torch.from_numpy(starts[1]), second, lr=0.03, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.2)
        for step in range(STEPS):
            np.testing.assert_allclose(found[step].weights[0], matrix[step].numpy(), rtol=0, atol=1e-12)
            np.testing.assert_allclose(found[step].weights[1], vector[step].numpy(), rtol=0, atol=1e-12)


def run(norms, steps=STEPS, **options):
    """Train the regression; the optimizer, and all weights after each step."""
    groups, parameters = parameter_groups()
    options = {"lr": LR, "momentum": 0.9, "betas": (0.9, 0.95), **options}
    optimizer = SteepestDescent(groups, norms=norms, **options)
    return optimizer, train(optimizer, parameters, steps)


@given(
    exponent=st.floats(-4, 8),
    bound=st.one_of(st.floats(-10, 4), st.just("auto")),
    tree=st.sampled_from([*TREES, *MORE_TREES]),
    regularized=st.booleans(),
    other=st.sampled_from([Sign(), AdaInf(), Ada2()]),
    seed=st.integers(0, 100),
)
@settings(max_examples=25, deadline=None)
def test_t_stays_between_zero_and_one(exponent, bound, tree, regularized, other, seed):
    groups, parameters = parameter_groups()
    optimizer = SteepestDescent(
        groups,
        lr=10**exponent,
        momentum=0.9,
        betas=(0.9, 0.95),
        norms=others(other),
        product=tree,
        regularized=regularized,
        step_size=Momo(bound),
    )
    for step in range(seed, seed + 6):
        optimizer.zero_grad()
        loss = loss_of(parameters, step)
        loss.backward()
        optimizer.step(loss=loss)
        assert 0 <= optimizer.diagnostics()["t"] <= 1


@pytest.mark.slow
@pytest.mark.parametrize("bookkeeping", ["recurrent", "direct"])
@pytest.mark.parametrize("regularized", [False, True], ids=identity)
@pytest.mark.parametrize("tree", TREES, ids=str)
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_without_a_lower_bound_momo_is_the_base_method(weight_decay, tree, regularized, bookkeeping):
    """Bit for bit; but where the base method can decay and move in one pass, that rounds otherwise than two."""
    shared = {"product": tree, "regularized": regularized, "weight_decay": weight_decay}
    _, base = run(others(Ada2()), 10, **shared)
    _, momo = run(others(Ada2()), 10, step_size=Momo(-float("inf"), bookkeeping=bookkeeping), **shared)
    one_pass = weight_decay > 0 and not regularized and tree == Max()
    for a, b in zip(base, momo, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 if one_pass else 0)


@pytest.mark.parametrize("regularized", [False, True], ids=identity)
def test_a_bound_above_the_loss_leaves_only_the_decay(regularized):
    _, parameters = parameter_groups()
    start = torch.cat([p.detach().flatten() for p in parameters]).numpy()
    optimizer, weights = run(
        others(AdaInf()), 8, lr=0.5, regularized=regularized, weight_decay=0.1, step_size=Momo(1e3)
    )
    np.testing.assert_allclose(weights[-1], start * 0.95**8, rtol=1e-14)
    assert optimizer.diagnostics()["t"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("other", [Sign(), AdaInf(), Ada2()], ids=str)
@pytest.mark.parametrize("tree", [*TREES, *MORE_TREES], ids=str)
def test_at_a_huge_rate_constrained_and_regularized_momo_of_one_norm_coincide(tree, other):
    huge = {role: 1e6 * lr for role, lr in LR.items()}
    squared = {role: lr**2 for role, lr in huge.items()}  # the same norm: blocks are measured in lr, or in its root
    momo = Momo(0.9)  # below every loss, so that every step is a truncated one
    first, constrained = run(others(other), 20, lr=huge, product=tree, step_size=momo)
    second, regularized = run(others(other), 20, lr=squared, product=tree, regularized=True, step_size=momo)
    assert 0 < first.diagnostics()["t"] < 1e-3
    assert 0 < second.diagnostics()["t"] < 1e-3
    np.testing.assert_allclose(constrained, regularized, rtol=0, atol=1e-10)


def quadratic(shapes, seed=2):
    """Parameters, and a function that gives them the gradient of their distance to a target."""
    generator = torch.Generator().manual_seed(seed)
    parameters, targets = (
        [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes] for _ in range(2)
    )
    parameters = [nn.Parameter(p) for p in parameters]
    return parameters, lambda: sum((p - y).square().sum() for p, y in zip(parameters, targets, strict=True))


def descend(build, shapes, steps=20):
    parameters, loss_of_now = quadratic(shapes)
    optimizer = build(parameters)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of_now()
        loss.backward()
        optimizer.step(**({} if isinstance(optimizer, torch.optim.Adam) else {"loss": loss}))
    return torch.cat([p.detach().flatten() for p in parameters])


@pytest.mark.parametrize("recipe", [MuonMax, PolarGrad])
def test_without_matrices_these_are_adam(recipe):
    ours = descend(lambda p: recipe(p, adam_lr=0.03, momentum=0.8, betas=(0.8, 0.95)), [(5,), (3,)])
    adam = descend(lambda p: torch.optim.Adam(p, lr=0.03, betas=(0.8, 0.95)), [(5,), (3,)])
    torch.testing.assert_close(ours, adam, rtol=0, atol=1e-12)


@pytest.mark.parametrize("momo", [False, True])
def test_with_one_matrix_muon_max_is_polar_grad_and_with_several_it_steps_further(momo):
    options = {"lr": 0.03, "adam_lr": 0.02, "momo": momo, "polar": "svd"}
    one = [descend(lambda p, kind=kind: kind(p, **options), [(4, 3), (3,)]) for kind in (MuonMax, PolarGrad)]
    two = [descend(lambda p, kind=kind: kind(p, **options), [(4, 3), (2, 3)], 1) for kind in (MuonMax, PolarGrad)]
    torch.testing.assert_close(*one, rtol=0, atol=1e-12)
    assert not torch.allclose(*two, rtol=0, atol=1e-3)


def test_in_the_euclidean_norm_momo_is_polyaks_step():
    """f = |x|² from any x: the model's zero is half way, and the optimum is at a lower bound of 0."""
    parameters, _ = quadratic([(3,)])
    start = parameters[0].detach().clone()
    optimizer = SteepestDescent(
        parameters, lr=1.0, momentum=0.0, norms={"vector": "frobenius"}, regularized=True, step_size=Momo(0.0)
    )
    for step in range(1, 4):
        optimizer.zero_grad()
        loss = parameters[0].square().sum()
        loss.backward()
        optimizer.step(loss=loss)
        assert optimizer.diagnostics()["t"] == pytest.approx(0.25)
        torch.testing.assert_close(parameters[0].detach(), start * 0.5**step, rtol=1e-12, atol=0)
