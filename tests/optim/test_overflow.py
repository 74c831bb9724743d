"""Nothing that is not finite reaches a weight or the state, whatever made it."""

import math

import pytest
import torch
from torch import nn

from steepest import (
    Ada2,
    AdaInf,
    Adam,
    ColNorm,
    Frobenius,
    Momo,
    Muon,
    MuonMax,
    NonFiniteError,
    PolarGrad,
    RowNorm,
    Scion,
    Sign,
    SignDescent,
    SteepestDescent,
)
from steepest.optim.guard import Guard
from tests.cases import cases

METHODS = {
    "muon": lambda m, **o: Muon(m, weight_decay=0.1, **o),
    "muon_momo": lambda m, **o: Muon(m, momo=True, weight_decay=0.1, **o),
    "momo_direct": lambda m, **o: Muon(m, step_size=Momo(bookkeeping="direct"), weight_decay=0.1, **o),
    "momo_auto": lambda m, **o: MuonMax(m, step_size=Momo("auto"), **o),
    "muon_max": MuonMax,
    "muon_max_stale": lambda m, **o: MuonMax(m, dual="stale", **o),
    "muon_max_momo_stale": lambda m, **o: MuonMax(m, dual="stale", momo=True, **o),
    "polar_grad": PolarGrad,
    "scion_momo": lambda m, **o: Scion(m, momo=True, **o),
    "adam": Adam,
    "sign_regularized": lambda m, **o: SignDescent(m, regularized=True, **o),
    "regularized": lambda m, **o: SteepestDescent(m, regularized=True, **o),
    "sum": lambda m, **o: SteepestDescent(m, product="sum", **o),
    "euclid": lambda m, **o: SteepestDescent(m, product="euclid", nesterov=True, **o),
    **{
        f"{norm}{'_regularized' * regularized}": lambda m, norm=norm, regularized=regularized, **o: SteepestDescent(
            m, norms=dict.fromkeys(("matrix", "head", "vector"), norm), regularized=regularized, **o
        )
        for norm in (Frobenius(), ColNorm(), RowNorm(), Ada2(), AdaInf(), Sign())
        for regularized in (False, True)
        if not norm.matrix
    },
}


def network(dtype):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 5)).to(dtype)


def give(model, size):
    for parameter in model.parameters():
        parameter.grad = (torch.randn(parameter.shape).double().clamp(-2, 2) * size).to(parameter.dtype)


def finite(model, optimizer):
    numbers = [*model.parameters(), *(t for state in optimizer.state.values() for t in state.values())]
    group = optimizer.state_dict()["param_groups"][0]
    return all(bool(t.isfinite().all()) for t in numbers) and (
        all(math.isfinite(number) for key, number in group.items() if key.startswith("momo_") and key != "momo_weights")
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@cases("masked", [False, True], ["", "masked"])
@cases("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@cases("method", METHODS)
def test_large_and_small_gradients_leave_everything_finite(method, dtype, masked, monkeypatch):
    if masked:
        monkeypatch.setattr(Guard, "admit", lambda *_: torch.tensor(True))
    largest = min(torch.finfo(dtype).max / 9, 1e308)
    for size in (1e-38, 1e36, largest):
        if size * 2 > torch.finfo(dtype).max / 4:
            continue
        model = network(dtype)
        optimizer = METHODS[method](model)
        for own in (size, 1.0, size, 1.0):
            give(model, own)
            optimizer.step(loss=1.0)
            assert finite(model, optimizer), (size, own)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@cases("masked", [False, True], ["", "masked"])
@cases("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@cases("rate", ["huge", "tensor", "decay"])
@cases("method", ["muon", "muon_max", "adam", "muon_momo", "Sign"])
def test_steps_too_long_for_the_type_are_not_made(method, rate, dtype, masked, monkeypatch):
    if masked:
        monkeypatch.setattr(Guard, "admit", lambda *_: torch.tensor(True))
    model = network(dtype)
    optimizer = METHODS[method.lower() if method != "Sign" else "sign"](model)
    for group in optimizer.param_groups:
        if rate == "decay":
            group["lr"], group["weight_decay"] = 1.0, torch.finfo(dtype).max / 10
        else:
            group["lr"] = torch.finfo(dtype).max * 0.9 if rate == "huge" else torch.tensor(1e300, dtype=torch.float64)
    for _ in range(4):
        give(model, 1.0)
        optimizer.step(loss=1.0)
        assert finite(model, optimizer)
    assert rate == "decay" or dtype == torch.float64 or optimizer.diagnostics()["skipped_steps"] > 0


def test_a_weight_at_the_edge_of_half_precision_stays_finite():
    weight = nn.Parameter(torch.full((2, 2), torch.finfo(torch.float16).max, dtype=torch.float16))
    optimizer = SteepestDescent([weight], lr=20.0, norms={"matrix": Sign()})
    weight.grad = -torch.ones(2, 2, dtype=torch.float16)
    with pytest.warns(RuntimeWarning, match=r"the step for 'params\[0\]' is not finite though the gradients are"):
        optimizer.step()
    assert weight.isfinite().all()
    assert optimizer.diagnostics()["skipped_steps"] == 1


class Broken(Frobenius):
    """A norm whose direction is no number."""

    def lmo(self, m, /, v=None):
        return m / 0


@pytest.mark.parametrize("options", [{}, {"product": "euclid"}, {"step_size": Momo()}], ids=str)
def test_a_direction_that_is_not_finite_is_not_taken_and_counted(options):
    model = network(torch.float32)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = SteepestDescent(model, norms={"matrix": Broken(), "head": Frobenius()}, **options)
    give(model, 1.0)
    with pytest.warns(RuntimeWarning, match=r"the step for '0\.weight'") as seen:
        optimizer.step(loss=1.0)
    assert seen[0].filename == __file__
    assert torch.equal(model[0].weight, before[0])
    # where directions are taken one after the other, the others are taken
    assert torch.equal(model[1].weight, before[2]) is bool(options)
    assert optimizer.diagnostics()["skipped_steps"] == 1
    assert optimizer.state_dict()["param_groups"][0]["skipped_steps"] == 1
    give(model, 1.0)
    optimizer.step(loss=1.0)
    assert finite(model, optimizer)


def test_raising_says_what_was_changed():
    model = network(torch.float32)
    optimizer = SteepestDescent(model, norms={"matrix": Broken(), "head": Broken()}, on_nonfinite="raise")
    give(model, 1.0)
    with pytest.raises(NonFiniteError, match="these weights were not changed, and averages hold the gradients"):
        optimizer.step()


def test_adam_takes_a_step_of_its_usual_length_for_a_huge_gradient():
    weight = nn.Parameter(torch.zeros(3))
    optimizer = Adam([weight], lr=0.1)
    weight.grad = torch.tensor([1e30, -8e37, 1.0])
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([-0.1, 0.1, -0.1]))


def test_a_gradient_too_large_to_average_is_named_as_that():
    weight = nn.Parameter(torch.zeros(2, 2))
    optimizer = Muon([weight])
    weight.grad = torch.full((2, 2), 3e38)
    with pytest.warns(RuntimeWarning, match=r"the gradient of 'params\[0\]' is above 8\.5e\+37, too large: this step"):
        optimizer.step()
    assert not weight.any()
