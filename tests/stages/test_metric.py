"""IsoMuon: a diagonal metric on both sides of the polar factor."""

import copy
import io
import math
import pickle

import pytest
import torch

from steepest import (
    DiagonalMetric,
    InputMoment,
    Momo,
    Muon,
    MuonMax,
    NewtonMuon,
    RowScaling,
    Schatten,
    Spectral,
    SteepestDescent,
)
from steepest.stages.metric import weights_of
from steepest.testing import backward, network
from tests.reference.around import diagonal_metric
from tests.stages.around import WAYS, check_against_reference

NORMS = [Spectral(polar="svd"), Schatten(4.0)]
KINDS = {
    "default": {},
    "rows of gradients": {"sides": "rows", "source": "gradients", "exponent": 1.0, "bounds": (0.1, 5.0)},
    "columns, as long as they come": {"sides": "columns", "beta2": 0.5, "keep_size": False},
}


@pytest.mark.filterwarnings("ignore:The loss was below:UserWarning")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_fifty_steps_are_those_of_the_reference(kind, way):
    options = KINDS[kind]
    check_against_reference([DiagonalMetric(**options)], lambda place: diagonal_metric(**options), way)


def test_weights_have_a_mean_of_one_and_are_cut_off():
    variances = torch.tensor([[1.0, 1.0, 4.0, 10.0], [0.0, 0.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0]])
    found = weights_of(variances, 0.5, (0.5, 2.0))
    due = torch.tensor([0.5, 0.5, 1.0, math.sqrt(2.5)])
    torch.testing.assert_close(found[0], due / due.mean())
    assert torch.equal(found[1], torch.ones(4))
    torch.testing.assert_close(found[2], torch.ones(4))


def test_gradients_that_are_all_the_same_have_no_noise():
    weight = torch.nn.Parameter(torch.zeros(4, 6))
    optimizer = Muon([weight], stages=[DiagonalMetric()])
    gradient = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    for _ in range(40):
        weight.grad = gradient
        optimizer.step()
    assert not optimizer.state[weight]["metric_rows"].any()
    assert not optimizer.state[weight]["metric_columns"].any()


@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_it_is_steepest_descent_in_the_norm_of_the_metric(norm):
    """No weight of the direction's norm gains more, whatever the norm in the middle."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(5, 7, dtype=torch.float64))
    stage = DiagonalMetric(keep_size=False)
    optimizer = SteepestDescent([weight], lr=1.0, norms={"matrix": norm}, stages=[stage])
    for _ in range(4):
        weight.grad = torch.randn(5, 7, generator=generator, dtype=torch.float64) * torch.arange(1, 8)
        before = weight.detach().clone()
        optimizer.step()
    d, state = weight.detach() - before, optimizer.state[weight]
    b, a = (weights_of(state[key][None], 0.5, (0.5, 2.0))[0] for key in ("metric_rows", "metric_columns"))
    sized = lambda w: norm.primal(b.sqrt()[:, None] * w * a.sqrt())  # noqa: E731
    assert float(sized(d)) == pytest.approx(1, rel=1e-9)
    assert a.std() > 0.1
    for spread in (1e-3, 1e-1, 10.0):
        w = d + spread * torch.randn(200, 5, 7, generator=generator, dtype=torch.float64)
        assert (-(state["momentum_buffer"] * w).sum((-2, -1)) / sized(w)).max() < -(state["momentum_buffer"] * d).sum()


def test_a_step_is_as_large_as_that_of_the_norm():
    weight = torch.nn.Parameter(torch.zeros(4, 9))
    optimizer = Muon([weight], lr=1.0, scale="none", polar="svd", stages=[DiagonalMetric()])
    for step in range(3):
        weight.grad = torch.randn(4, 9, generator=torch.Generator().manual_seed(step)) * torch.arange(9)
        before = weight.detach().clone()
        optimizer.step()
        assert float(torch.linalg.vector_norm(weight.detach() - before)) == pytest.approx(2, rel=1e-5)


def test_beside_inputs_it_is_the_two_sided_form_of_newton_muon():
    """Rows from noise, columns from inputs: polar(B^-½ M K^-¼) K^-¼ B^-½, of the polar factor's size."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 4, bias=False)
    model = torch.nn.Sequential(layer, torch.nn.Linear(4, 2)).double()
    optimizer = NewtonMuon(
        model,
        lr=1.0,
        nesterov=False,
        scale="none",
        polar="svd",
        precondition=InputMoment(every=1, first=0, structure={"0.weight": "diagonal"}, exponents=(0.25, 0.25)),
        stages=[DiagonalMetric(sides="rows")],
    )
    for step in range(3):
        optimizer.zero_grad()
        x = torch.randn(16, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(step)) * torch.arange(1, 7)
        (layer(x) ** 2).mean().backward()
        before = layer.weight.detach().clone()
        optimizer.step()
    m, b = optimizer.state[layer.weight]["momentum_buffer"], optimizer.state[layer.weight]["metric_rows"]
    b = weights_of(b[None], 0.5, (0.5, 2.0))[0].rsqrt()[:, None]
    k = optimizer.stages[0].powers_of(layer.weight).flatten()
    u, _, vh = torch.linalg.svd(b * m * k, full_matrices=False)
    found = -(u @ vh)
    # The metric is inside: it keeps the size of what the norm found, then come the powers of inputs.
    inner = b * found
    inner = inner * torch.linalg.vector_norm(found) / torch.linalg.vector_norm(inner)
    torch.testing.assert_close(layer.weight.detach() - before, inner * k)


@pytest.mark.parametrize(
    "make",
    [
        lambda model: Muon(model, stages=[DiagonalMetric()]),
        lambda model: MuonMax(model, lr=0.05, dual="stale", step_size=Momo(0.5), stages=[DiagonalMetric()]),
        lambda model: Muon(model, stages=[RowScaling(), DiagonalMetric(source="gradients")], rounding="kept"),
    ],
    ids=["muon", "stale_momo", "with_rows"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_training_goes_on_bit_for_bit_after_saving_copying_and_pickling(make, dtype):
    def train(model, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            loss = backward(model, step, dtype)
            optimizer.step(loss=loss.detach())

    model = network(dtype)
    optimizer = make(model)
    train(model, optimizer, range(3))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    kept = [v for state in optimizer.state.values() for k, v in state.items() if k.startswith("metric_")]
    assert {v.dtype for v in kept} == {wide}
    assert all(float(v.max()) > 0 for v in kept)
    stream = io.BytesIO()
    torch.save(optimizer.state_dict(), stream)
    stream.seek(0)
    again = copy.deepcopy(model)
    loaded = make(again)
    loaded.load_state_dict(torch.load(stream, weights_only=True))
    others = [(again, loaded), copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    train(model, optimizer, range(3, 6))
    for other, own in others:
        train(other, own, range(3, 6))
        for one, expected in zip(other.parameters(), model.parameters(), strict=True):
            assert torch.equal(one, expected)


def test_gradients_that_are_not_finite_leave_no_trace_on_an_accelerator_either(monkeypatch):
    """There what is not finite is masked, not looked at."""
    model = network()
    optimizer = Muon(model, stages=[DiagonalMetric()])
    backward(model, 0)
    optimizer.step()
    kept = copy.deepcopy(optimizer.state_dict()["state"])
    weights = [p.detach().clone() for p in model.parameters()]
    monkeypatch.setattr(optimizer._guard, "admit", lambda *_: torch.tensor(False))
    optimizer.zero_grad()
    backward(model, 1)
    for p in model.parameters():
        p.grad[0] = torch.nan
    optimizer.step()
    for before, after in zip(kept.values(), optimizer.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(torch.equal(p, before) for p, before in zip(model.parameters(), weights, strict=True))


def test_gradients_are_exchanged_for_stages_that_look_only(monkeypatch):
    from steepest.optim.sharing import Portion

    gathered, plain = [], Portion.gather

    def counted(self, tensors):
        gathered.append(tensors)
        return plain(self, tensors)

    monkeypatch.setattr(Portion, "gather", counted)
    for stages, times in (([], 1), ([RowScaling()], 1), ([DiagonalMetric(), RowScaling()], 2)):
        weight = torch.nn.Parameter(torch.ones(3, 2))
        weight.grad = torch.ones(3, 2)
        gathered.clear()
        Muon([weight], stages=stages, nesterov=False).step()
        assert len(gathered) == times


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sides": "left"}, ValueError, "DiagonalMetric: Unknown sides"),
        ({"source": "inputs"}, ValueError, "DiagonalMetric: Unknown source"),
        ({"exponent": -1.0}, ValueError, "DiagonalMetric: exponent"),
        ({"bounds": (1.5, 2.0)}, ValueError, r"DiagonalMetric: bounds must be two numbers, the first in \(0, 1\]"),
        ({"bounds": (0.5, 0.9)}, ValueError, "the second at least 1"),
        ({"bounds": 2.0}, TypeError, "DiagonalMetric: bounds"),
        ({"beta2": 1.0}, ValueError, "DiagonalMetric: beta2"),
        ({"keep_size": 1}, TypeError, "DiagonalMetric: keep_size"),
    ],
)
def test_options_are_checked(options, error, message):
    with pytest.raises(error, match=message):
        DiagonalMetric(**options)
