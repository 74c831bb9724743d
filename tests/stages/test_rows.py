"""NorMuon: Muon whose directions have rows scaled by a moving root mean square of them."""

import copy
import io
import pickle

import pytest
import torch

from steepest import Decoupled, InputMoment, Momo, Muon, MuonMax, NewtonMuon, RowScaling, SteepestDescent
from steepest.testing import backward, network
from tests.reference.muon import normuon


def gradients(count, shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (6, 6), (1, 4)], ids=str)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("nesterov", [False, True])
def test_every_step_is_that_of_the_reference(shape, weight_decay, nesterov):
    weight = torch.nn.Parameter(gradients(1, shape, seed=1)[0])
    taken = gradients(6, shape)
    options = {"lr": 0.1, "momentum": 0.9, "nesterov": nesterov, "weight_decay": weight_decay}
    expected = normuon(weight.detach().clone(), taken, **options, beta2=0.8, eps=1e-8)
    stage = RowScaling(beta2=0.8)
    optimizer = Muon([weight], **options, scale="none", polar="svd", stages=[stage])
    for gradient, after in zip(taken, expected, strict=True):
        weight.grad = gradient
        optimizer.step()
        torch.testing.assert_close(weight.detach(), after, rtol=1e-9, atol=1e-11)


def test_rows_of_a_step_are_alike_and_their_length_is_that_of_the_polar_factor():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(16, 4, dtype=torch.float64))
    optimizer = Muon([weight], lr=1.0, nesterov=False, scale="none", polar="svd", stages=[RowScaling(beta2=0.0)])
    weight.grad = torch.randn(16, 4, dtype=torch.float64)
    optimizer.step()
    rows = torch.linalg.vector_norm(weight.detach(), dim=1)
    torch.testing.assert_close(rows, torch.full_like(rows, 0.5))  # of 16 rows, whose squares sum to 4


def test_views_and_buckets_have_their_own_rows():
    """Heads and convolutions, several parameters of one shape: each row as if its matrix were alone."""
    model = network(torch.float64)
    together = Muon(model, polar="svd", stages=[RowScaling(beta2=0.5)], lr=0.1)
    rows = [row for row in together.plan if row.role == "matrix"]
    alone = [copy.deepcopy(row.parameter) for row in rows]
    groups = [{"params": [p], "role": "matrix", "view": row.view} for p, row in zip(alone, rows, strict=True)]
    apart = Muon(groups, polar="svd", stages=[RowScaling(beta2=0.5)], lr=0.1)
    for step in range(3):
        backward(model, step, torch.float64)
        for copied, row in zip(alone, rows, strict=True):
            copied.grad = row.parameter.grad.clone()
        together.step()
        apart.step()
        together.zero_grad()
    for copied, row in zip(alone, rows, strict=True):
        torch.testing.assert_close(copied, row.parameter)
        expected = sum(count * m for count, m, _ in row.blocks())
        assert together.state[row.parameter]["row_moment"].shape == (expected,)


def test_momo_predicts_what_the_applied_direction_gains():
    """On a linear loss the model is exact, and so is its value after a step."""
    torch.manual_seed(0)
    slope = torch.randn(6, 4, dtype=torch.float64)
    weight = torch.nn.Parameter(torch.zeros(6, 4, dtype=torch.float64))
    optimizer = Muon([weight], lr=0.1, step_size=Momo(lower_bound=-100.0), stages=[RowScaling()])
    for _ in range(4):
        optimizer.zero_grad()
        loss = (slope * weight).sum()
        loss.backward()
        optimizer.step(loss=loss.detach())
        value = optimizer.state_dict()["param_groups"][0]["momo_value"]
        assert value == pytest.approx(float((slope * weight).detach().sum()), rel=1e-9)


@pytest.mark.parametrize(
    "make",
    [
        lambda model: Muon(model, stages=[RowScaling()]),
        lambda model: MuonMax(model, lr=0.05, stages=[RowScaling()]),
        lambda model: MuonMax(model, lr=0.05, dual="stale", step_size=Momo(0.5), stages=[RowScaling()]),
        lambda model: NewtonMuon(model, precondition=InputMoment(every=2, first=1), stages=[RowScaling()]),
        lambda model: SteepestDescent(model, regularized=True, product="euclid", lr=0.01, stages=[RowScaling()]),
    ],
    ids=["muon", "muon_max", "stale_momo", "newton_muon", "euclid"],
)
def test_training_goes_on_bit_for_bit_after_saving_copying_and_pickling(make):
    def train(model, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            loss = backward(model, step)
            optimizer.step(loss=loss.detach())

    model = network()
    optimizer = make(model)
    train(model, optimizer, range(3))
    stream = io.BytesIO()
    torch.save(optimizer.state_dict(), stream)
    stream.seek(0)
    again = copy.deepcopy(model)
    loaded = make(again)
    loaded.load_state_dict(torch.load(stream, weights_only=True))
    others = [(again, loaded), copy.deepcopy((model, optimizer))]
    if optimizer.stages[0].prefix == "row_":  # hooks stay with the original
        others.append(pickle.loads(pickle.dumps((model, optimizer))))
    else:
        others.pop()
    train(model, optimizer, range(3, 6))
    for other, own in others:
        train(other, own, range(3, 6))
        for one, expected in zip(other.parameters(), model.parameters(), strict=True):
            assert torch.equal(one, expected)


def test_state_of_rows_that_nobody_uses_is_dropped_with_a_word():
    weight = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = Muon([weight], stages=[RowScaling()])
    weight.grad = torch.ones(3, 2)
    optimizer.step()
    plain = Muon([weight])
    with pytest.warns(UserWarning, match=r"moments of rows, which .* Build it with stages=\[RowScaling\(\)\]"):
        plain.load_state_dict(optimizer.state_dict())
    assert "row_moment" not in plain.state[weight]


def test_a_state_from_before_begins_with_fresh_rows():
    weight = torch.nn.Parameter(torch.ones(3, 2))
    weight.grad = torch.ones(3, 2)
    plain = Muon([weight])
    plain.step()
    optimizer = Muon([weight], stages=[RowScaling()])
    optimizer.load_state_dict(plain.state_dict())
    optimizer.step()
    assert optimizer.state[weight]["row_moment"].shape == (3,)
    assert int(optimizer.state[weight]["step"]) == 2


def test_a_moment_that_cannot_be_is_refused():
    weight = torch.nn.Parameter(torch.ones(3, 2))
    weight.grad = torch.ones(3, 2)
    optimizer = Muon([weight], stages=[RowScaling()])
    optimizer.step()
    state = optimizer.state_dict()
    for moment, text in (
        (torch.ones(2), "shape"),
        (-torch.ones(3), "below 0"),
        (torch.full((3,), torch.nan), "finite"),
    ):
        state["state"][0]["row_moment"] = moment
        with pytest.raises(ValueError, match=text):
            optimizer.load_state_dict(state)


def test_no_ball_is_promised():
    model = network()
    optimizer = Muon(model, weight_decay=Decoupled(0.1), stages=[RowScaling()])
    backward(model, 0)
    optimizer.step()
    numbers = optimizer.diagnostics(weights=True)
    assert any(name.endswith("/spectral_norm") for name in numbers)
    assert not any(name.endswith(("/ball_radius", "/frank_wolfe_gap")) for name in numbers)
    assert numbers["matrix/orthogonality_error"] < 1  # of what the norm found


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"beta2": 1.0}, ValueError, "RowScaling: beta2"),
        ({"eps": -1e-8}, ValueError, "RowScaling: eps"),
        ({"beta2": "0.9"}, TypeError, "RowScaling: beta2"),
    ],
)
def test_options_are_checked(options, error, message):
    with pytest.raises(error, match=message):
        RowScaling(**options)


def test_two_stages_with_the_same_state_are_refused():
    with pytest.raises(ValueError, match="begin with 'row_' and 'row_'"):
        Muon(network(), stages=[RowScaling(), RowScaling()])
    with pytest.raises(ValueError, match="begin with 'input_' and 'input_'"):
        NewtonMuon(network(), stages=[InputMoment(structure="full")])
