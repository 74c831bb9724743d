"""Nothing lands on torch's default device: each tensor that the library makes is where its use is.

"meta" stands for any default device that is not the parameters'.
"""

import ast
import copy
import io
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import steepest
from steepest import batch_size, theory
from steepest.linalg import COEFFICIENTS, get_coefficients, minimax
from tests.cases import cases
from tests.optim.training import RECIPES

SOURCE = Path(steepest.__file__).parent
MAKERS = {
    *("arange", "as_tensor", "cartesian_prod", "empty", "eye", "full", "linspace", "logspace", "normal", "ones"),
    *("rand", "randint", "randn", "randperm", "range", "scalar_tensor", "tensor", "tril_indices", "triu_indices"),
    *("vander", "zeros", "Generator"),
}


def made_without_device(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MAKERS:
            of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
            if of_torch and all(keyword.arg != "device" for keyword in node.keywords):
                yield f"{node.lineno}: {ast.unparse(node)}"


def test_no_tensor_is_made_without_a_device():
    found = {
        f"{path.relative_to(SOURCE)}:{call}"
        for path in SOURCE.rglob("*.py")
        for call in made_without_device(ast.parse(path.read_text()))
    }
    assert found == set()
    assert list(made_without_device(ast.parse("torch.eye(3) + torch.eye(3, device=d)"))) == ["1: torch.eye(3)"]


@pytest.fixture
def _elsewhere():
    for name, module in list(sys.modules.items()):
        if name.startswith("steepest."):
            for value in list(vars(module).values()):
                if hasattr(value, "cache_clear"):  # what was searched for once is searched for again
                    value.cache_clear()
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


LOOK = steepest.InputMoment(structure="full", every=2, first=0)
ALL = {
    **RECIPES,
    "scion": lambda params: steepest.Scion(params, lr=0.01),
    "pethick": lambda params: steepest.PethickScion(params, lr=0.01),
    "sign": lambda params: steepest.SignDescent(params, lr=0.01),
    "adam_momo": lambda params: steepest.Adam(params, momo=True),
    "muon_svd": lambda params: steepest.Muon(params, polar="svd"),
    "muon_tensor_rate": lambda params: steepest.Muon(params, lr=torch.tensor(0.02, device="cpu")),
    "newton_muon": lambda params: steepest.NewtonMuon(params, precondition=LOOK),
    "newton_muon_sampled": lambda params: steepest.NewtonMuon(
        params,
        precondition=steepest.InputMoment(structure="auto", every=1, tokens=3, exponents=(0.5, 0.5), solver="inverse"),
    ),
    "newton_muon_factor": lambda params: steepest.NewtonMuon(
        params, precondition=steepest.InputMoment(structure="full", every=1, solver="factor")
    ),
    "newton_muon_max": lambda params: steepest.NewtonMuonMax(params, precondition=LOOK, momo=True),
    **{
        f"norm_{norm}": lambda params, norm=norm: steepest.SteepestDescent(params, norms={"matrix": norm})
        for norm in ("nuclear", "schatten", "col", "row", "ada_2", "ada_inf", "frobenius", "sign")
    },
}


def model():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(6, 16, device="cpu"),
        nn.ReLU(),
        nn.Linear(16, 5, device="cpu"),
        nn.Unflatten(-1, (1, 5)),
        nn.Conv1d(1, 4, 3, device="cpu"),
        nn.Flatten(),
        nn.Linear(12, 3, device="cpu"),
    )


def train(net, optimizer, steps=3):
    for step in range(steps):
        optimizer.zero_grad()
        loss = net(torch.full((4, 6), 1.0 + step, device="cpu")).square().mean()
        loss.backward()
        optimizer.step(loss=float(loss.detach()))


@pytest.mark.slow
@cases("name", ALL)
@pytest.mark.usefixtures("_elsewhere")
def test_every_recipe_trains_saves_and_loads(name):
    net = model()
    optimizer = ALL[name](net)
    train(net, optimizer)
    assert all(value == value for value in optimizer.diagnostics(weights=True).values())
    str(optimizer.plan)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twin = copy.deepcopy(net)
    other = ALL[name](twin)
    other.load_state_dict(torch.load(file, weights_only=True))
    train(net, optimizer, 1)
    train(twin, other, 1)
    for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.device.type == "cpu"
    devices = {value.device.type for state in optimizer.state.values() for value in state.values()}
    assert devices == {"cpu"}


@pytest.mark.parametrize("recipe", ["muon", "adam"])
@pytest.mark.usefixtures("_elsewhere")
def test_noise_scales_are_measured(recipe):
    net = model()
    optimizer = ALL[recipe](net)
    kinds = ("euclidean", "l1", "nuclear", "alignment")
    with batch_size.NoiseScale(net, optimizer, every=1, samples=4, kinds=kinds) as noise:
        for step in range(2):
            optimizer.zero_grad()
            for part in range(4):
                (net(torch.full((4, 6), 1.0 + part + step, device="cpu")).square().mean() / 4).backward()
            optimizer.step()
        assert str(noise.read())


@pytest.mark.usefixtures("_elsewhere")
def test_polynomials_are_searched_for():
    assert minimax(0.01, 3)
    assert all(get_coefficients(name) for name in COEFFICIENTS)
    matrix = torch.diag(torch.tensor([1.0, 0.5, 0.1], device="cpu"))
    for method in ("auto", "svd"):
        assert steepest.polar(matrix, method=method).device.type == "cpu"


@pytest.mark.usefixtures("_elsewhere")
def test_theory_is_computed():
    net = nn.Sequential(nn.Linear(6, 4, device="cpu"), nn.Tanh(), nn.Linear(4, 3, device="cpu"))
    x = torch.randn(16, 6, device="cpu")
    (found,) = theory.score_directions(net, lambda own: own(x.double()).square().mean(), ["0"])
    assert found.scores
    case = next(iter(theory.CASES))
    scores = theory.simulate(case, simulations=1, size=8)
    assert {score.device.type for score in scores.values()} == {"cpu"}
    assert theory.path("gradient-descent", 4.0).bounds.device.type == "cpu"
