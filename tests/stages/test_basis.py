"""SOAP's basis before the polar factor."""

import pytest
import torch

from steepest import Decoupled, Eigenbasis, Muon
from steepest.stages.basis import eigenvectors
from steepest.testing import backward, network
from tests.reference.around import eigenbasis
from tests.stages.around import WAYS, check_against_reference

KINDS = {
    "qr": {"every": 4},
    "eigh": {"every": 3, "method": "eigh", "beta": 0.8, "beta2": 0.5, "eps": 1e-3},
    "split, of blocks": {"block_size": 5, "every": 4, "split": True},
}


@pytest.mark.filterwarnings("ignore:The loss was below:UserWarning")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_fifty_steps_are_those_of_the_reference(kind, way):
    options = KINDS[kind]
    check_against_reference([Eigenbasis(**options)], lambda place: eigenbasis(place, **options), way, 1e-8)


def orthogonal(q):
    return (q.mT @ q - torch.eye(q.size(-1), dtype=q.dtype)).abs().max()


@pytest.mark.parametrize("method", ["qr", "eigh"])
def test_bases_come_to_the_eigenvectors_of_steady_gradients(method):
    """Of gradients with one covariance, the basis makes the moment diagonal."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(5, 8, dtype=torch.float64))
    optimizer = Muon([weight], stages=[Eigenbasis(beta=0.99, every=1, method=method)])
    turn = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64))[0]
    sizes = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5], dtype=torch.float64)[:, None]
    for _ in range(200):
        weight.grad = turn @ (sizes * torch.randn(5, 8, generator=generator, dtype=torch.float64))
        optimizer.step()
    state = optimizer.state[weight]
    q, moment = state["basis_left_vectors"].view(5, 5), state["basis_left"].view(5, 5)
    assert orthogonal(q) < 1e-12
    inside = q.T @ moment @ q
    assert (inside - inside.diagonal().diag()).abs().max() < 0.02 * inside.max()
    assert torch.equal(inside.diagonal().argsort(descending=True), torch.arange(5))


def test_what_is_left_to_rounding_is_not_left_to_chance():
    """The eigenvectors of a null space, and steps of gradients without full rank, do not depend on rounding."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(3, 9, 4, generator=generator, dtype=torch.float64)
    moments = root @ root.mT
    nearby = moments * (1 + 1e-15 * torch.randn(3, 9, 9, generator=generator, dtype=torch.float64))
    one, other = eigenvectors(moments), eigenvectors((nearby + nearby.mT) / 2)
    assert orthogonal(one) < 1e-14
    assert ((one * other).sum(-2).abs() - 1).abs().max() < 1e-11
    inside = one.mT @ moments @ one
    assert (inside - inside.diagonal(dim1=-2, dim2=-1).diag_embed()).abs().max() < 1e-12
    ends = []
    for size in (0.0, 1e-15):
        weight = torch.nn.Parameter(torch.zeros(9, 7, dtype=torch.float64))
        optimizer = Muon([weight], stages=[Eigenbasis(every=2)])
        generator.manual_seed(1)
        for _ in range(6):
            factors = [torch.randn(k, generator=generator, dtype=torch.float64) for k in ((9, 2), (2, 7), (9, 7))]
            weight.grad = factors[0] @ factors[1] * (1 + size * factors[2])
            optimizer.step()
        ends.append(weight.detach().clone())
    torch.testing.assert_close(*ends, rtol=0, atol=1e-9)


def test_a_direction_that_goes_up_does_not_move_its_matrix():
    generator = torch.Generator().manual_seed(3)
    weights = [torch.nn.Parameter(torch.zeros(3, 3, dtype=torch.float64)) for _ in range(50)]
    stage = Eigenbasis(beta=0.0, beta2=0.0, every=1)
    optimizer = Muon(weights, momentum=0.5, nesterov=False, polar="svd", stages=[stage])
    still = climbing = 0
    for _ in range(30):
        before = [w.detach().clone() for w in weights]
        for w in weights:
            w.grad = torch.randn(3, 3, generator=generator, dtype=torch.float64)
        optimizer.step()
        moved = [w.detach() - old for w, old in zip(weights, before, strict=True)]
        for w, d in zip(weights, moved, strict=True):
            assert float((optimizer.state[w]["momentum_buffer"] * d).sum()) <= 0
        still += sum(not d.any() for d in moved)
        climbing += optimizer.diagnostics()["climbing_directions"]
    assert still == climbing > 0


def test_split_directions_never_go_up_and_are_not_counted():
    generator = torch.Generator().manual_seed(3)
    weight = torch.nn.Parameter(torch.zeros(3, 3, dtype=torch.float64))
    optimizer = Muon([weight], nesterov=False, stages=[Eigenbasis(beta2=0.0, every=1, split=True)])
    for _ in range(100):
        before = weight.detach().clone()
        weight.grad = torch.randn(3, 3, generator=generator, dtype=torch.float64)
        optimizer.step()
        assert float((optimizer.state[weight]["momentum_buffer"] * (weight.detach() - before)).sum()) < 0
    assert "climbing_directions" not in optimizer.diagnostics()


def test_the_ball_is_promised_where_directions_stay_what_the_norm_found():
    for split in (False, True):
        model = network()
        optimizer = Muon(model, weight_decay=Decoupled(0.1), stages=[Eigenbasis(split=split)])
        backward(model, 0)
        optimizer.step()
        assert any(name.endswith("/ball_radius") for name in optimizer.diagnostics(weights=True)) is not split


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"beta": 1.0}, ValueError, "Eigenbasis: beta must"),
        ({"beta2": -0.1}, ValueError, "Eigenbasis: beta2"),
        ({"every": 0}, ValueError, "Eigenbasis: every"),
        ({"method": "svd"}, ValueError, "Eigenbasis: Unknown method"),
        ({"eps": -1.0}, ValueError, "Eigenbasis: eps"),
        ({"block_size": None}, TypeError, "Eigenbasis: block_size"),
        ({"split": 1}, TypeError, "Eigenbasis: split"),
    ],
)
def test_options_are_checked(options, error, message):
    with pytest.raises(error, match=message):
        Eigenbasis(**options)
