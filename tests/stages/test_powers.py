"""PMuon: powers of Shampoo's factors before the polar factor."""

import pytest
import torch

from steepest import Decoupled, Muon, ShampooPowers, View
from steepest.testing import backward, network
from tests.reference.around import shampoo_powers
from tests.stages.around import WAYS, check_against_reference

KINDS = {
    "default": {"every": 4},
    "square roots of blocks": {"exponent": 0.5, "beta": 0.8, "every": 3, "ridge": 0.1, "block_size": 4},
    "halves": {"exponent": 0.5, "every": 4, "split": True},
    "halves with a prior": {"exponent": 0.7, "beta": 0.9, "every": 3, "split": True, "prior": 2.0},
}


@pytest.mark.filterwarnings("ignore:The loss was below:UserWarning")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_fifty_steps_are_those_of_the_reference(kind, way):
    options = KINDS[kind]
    check_against_reference([ShampooPowers(**options)], lambda place: shampoo_powers(place, **options), way)


def test_without_an_exponent_it_is_muon():
    weights = [torch.nn.Parameter(torch.ones(4, 3, dtype=torch.float64)) for _ in range(2)]
    optimizers = [Muon([weights[0]], stages=[ShampooPowers(exponent=0.0)]), Muon([weights[1]])]
    for step in range(3):
        gradient = torch.randn(4, 3, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        for weight, optimizer in zip(weights, optimizers, strict=True):
            weight.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(weights[0], weights[1])


def test_a_direction_that_goes_up_does_not_move_its_matrix():
    generator = torch.Generator().manual_seed(3)
    weights = [torch.nn.Parameter(torch.zeros(3, 3, dtype=torch.float64)) for _ in range(40)]
    stage = ShampooPowers(exponent=1.0, beta=0.0, every=1, ridge=1e-6)
    optimizer = Muon(weights, nesterov=False, polar="svd", stages=[stage])
    still = climbing = 0
    for _ in range(10):
        before = [w.detach().clone() for w in weights]
        for w in weights:
            w.grad = torch.randn(3, 3, generator=generator, dtype=torch.float64)
        optimizer.step()
        moved = [w.detach() - old for w, old in zip(weights, before, strict=True)]
        assert all(float((optimizer.state[w]["momentum_buffer"] * d).sum()) <= 0 for w, d in zip(weights, moved))  # noqa: B905
        still += sum(not d.any() for d in moved)
        climbing += optimizer.diagnostics()["climbing_directions"]
    assert still == climbing > 0


def test_split_directions_never_go_up_and_are_not_counted():
    generator = torch.Generator().manual_seed(3)
    weight = torch.nn.Parameter(torch.zeros(3, 3, dtype=torch.float64))
    stage = ShampooPowers(exponent=1.0, beta=0.0, every=1, ridge=1e-6, split=True)
    optimizer = Muon([weight], nesterov=False, stages=[stage])
    for _ in range(100):
        before = weight.detach().clone()
        weight.grad = torch.randn(3, 3, generator=generator, dtype=torch.float64)
        optimizer.step()
        assert float((optimizer.state[weight]["momentum_buffer"] * (weight.detach() - before)).sum()) < 0
    assert "climbing_directions" not in optimizer.diagnostics()


def test_halves_are_steepest_descent_in_the_norm_between_roots_of_powers():
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(4, 6, dtype=torch.float64))
    gradient = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    stage = ShampooPowers(exponent=1.0, ridge=0.3, split=True)
    optimizer = Muon([weight], 1.0, nesterov=False, scale="none", polar="svd", stages=[stage])
    weight.grad = gradient.clone()
    optimizer.step()
    roots = []
    for moment in (gradient @ gradient.mT, gradient.mT @ gradient):
        values, vectors = torch.linalg.eigh(moment)
        roots.append(vectors @ torch.diag((values + 0.3 * values.mean()) ** 0.5) @ vectors.mT)

    def norm(matrix):
        return torch.linalg.matrix_norm(roots[0] @ matrix @ roots[1], 2)

    found = weight.detach() / norm(weight.detach())
    for _ in range(1000):  # nothing else of that length goes down as far
        other = torch.randn(4, 6, generator=generator, dtype=torch.float64)
        assert (gradient * found).sum() <= (gradient * other / norm(other)).sum()
    root_inverses = [torch.linalg.inv(root) for root in roots]
    dual = torch.linalg.matrix_norm(root_inverses[0] @ gradient @ root_inverses[1], "nuc")
    torch.testing.assert_close((gradient * found).sum(), -dual)


def test_a_prior_fades_with_the_gradients_of_each_matrix():
    generator = torch.Generator().manual_seed(0)
    beta, prior, ridge = 0.9, 2.0, 1e-3
    stage = ShampooPowers(0.5, beta=beta, every=1, ridge=ridge, split=True, prior=prior)
    experts = torch.nn.Parameter(torch.zeros(2, 4, 3, dtype=torch.float64))
    optimizer = Muon([{"params": [experts], "role": "matrix", "view": View(experts=True)}], stages=[stage])
    gradients = torch.randn(6, 2, 4, 3, generator=generator, dtype=torch.float64)
    gradients[:3, 1] = 0  # the second begins later
    for gradient in gradients:
        experts.grad = gradient.clone()
        optimizer.step()
    found = optimizer.state[experts]["powers_left_power"].view(2, 4, 4)
    for expert, seen in enumerate((gradients[:, 0], gradients[3:, 1])):
        moment = sum((1 - beta) * beta ** (len(seen) - 1 - t) * g @ g.mT for t, g in enumerate(seen))
        moment = moment / moment.abs().max()
        mean, left = moment.diagonal().mean(), beta ** len(seen)
        values, vectors = torch.linalg.eigh(moment + (ridge + prior * left / (1 - left)) * mean * torch.eye(4))
        torch.testing.assert_close(found[expert], vectors @ torch.diag(values**-0.25) @ vectors.mT)


def test_without_an_average_a_prior_is_gone_at_once():
    weights = [torch.nn.Parameter(torch.ones(4, 3, dtype=torch.float64)) for _ in range(2)]
    priors = [ShampooPowers(beta=0.0, every=1, prior=prior) for prior in (0.0, 1.0)]
    for weight, stage in zip(weights, priors, strict=True):
        optimizer = Muon([weight], stages=[stage])
        weight.grad = torch.arange(12, dtype=torch.float64).view(4, 3).cos()
        optimizer.step()
    assert torch.equal(*weights)


def test_the_ball_is_promised_where_directions_stay_what_the_norm_found():
    for split in (False, True):
        model = network()
        optimizer = Muon(model, weight_decay=Decoupled(0.1), stages=[ShampooPowers(split=split)])
        backward(model, 0)
        optimizer.step()
        assert any(name.endswith("/ball_radius") for name in optimizer.diagnostics(weights=True)) is not split


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"exponent": 1.5}, ValueError, "ShampooPowers: exponent"),
        ({"beta": 1.0}, ValueError, "ShampooPowers: beta must"),
        ({"every": 1.5}, TypeError, "ShampooPowers: every"),
        ({"ridge": -1.0}, ValueError, "ShampooPowers: ridge"),
        ({"block_size": 0}, ValueError, "ShampooPowers: block_size"),
        ({"split": 1}, TypeError, "ShampooPowers: split"),
        ({"prior": -0.5}, ValueError, "ShampooPowers: prior"),
    ],
)
def test_options_are_checked(options, error, message):
    with pytest.raises(error, match=message):
        ShampooPowers(**options)
