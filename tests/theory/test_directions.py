"""Directions of a real model: gradients, moments and curvature against direct computation."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from steepest.linalg import polar
from steepest.theory import directions, linear_layers, muon_direction, score_directions

NAMES = ["gradient", "sign", "muon", "muon-ns5", "newton-muon-half", "whitened-muon", "newton-muon"]


class Attentive(nn.Module):
    """Attention, a layer that is called twice, and one that is not called."""

    def __init__(self):
        super().__init__()
        self.query, self.value, self.unused = (nn.Linear(4, 4) for _ in range(3))
        self.frozen = nn.Linear(4, 4)
        self.frozen.weight.requires_grad_(False)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        v = self.value(self.value(x))
        return self.head(self.frozen(F.scaled_dot_product_attention(self.query(x), x, v, is_causal=True)))


def example(rng):
    """A model, inputs (5, 7, 4) and the loss on them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = Attentive()
    x = torch.randn(5, 7, 4, generator=rng, dtype=torch.float64)
    y = torch.randint(3, (35,), generator=rng)
    return model, x, lambda model: F.cross_entropy(model(x).flatten(0, 1), y)


def test_scores_are_those_of_the_whole_hessian(rng):
    model, x, loss = example(rng)
    (found,) = score_directions(model, loss, ["query"], ridge=0.2)
    exact = Attentive().double()
    exact.load_state_dict(model.state_dict())
    weight = exact.query.weight.detach().clone()

    def of_weight(w):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return torch.func.functional_call(exact, {"query.weight": w}, (x,))

    labels = torch.Generator().manual_seed(20260101)
    torch.randn(5, 7, 4, generator=labels, dtype=torch.float64)
    y = torch.randint(3, (35,), generator=labels)
    value = lambda w: F.cross_entropy(of_weight(w).flatten(0, 1), y)  # noqa: E731 - as autograd.functional takes it
    hessian = torch.autograd.functional.hessian(value, weight).reshape(16, 16)
    gradient = torch.autograd.functional.jacobian(value, weight)
    z = x.reshape(-1, 4)
    k = z.mT @ z / 35
    assert list(found.scores) == NAMES
    assert found.condition == pytest.approx(torch.linalg.cond(k).item(), rel=1e-8)
    expected = {
        "gradient": gradient,
        "sign": gradient.sign(),
        "muon": polar(gradient, method="svd"),
        "muon-ns5": polar(gradient, method="newton-schulz", coefficients="jordan"),
        "newton-muon-half": muon_direction(gradient, k, inner=0.5, ridge=0.2),
        "whitened-muon": muon_direction(gradient, k, inner=0.5, outer=0.5, ridge=0.2),
        "newton-muon": muon_direction(gradient, k, inner=1.0, ridge=0.2),
    }
    for name, q in expected.items():
        q = q.flatten() / q.norm()
        assert found.scores[name].curvature == pytest.approx((q @ hessian @ q).item(), rel=1e-8), name
        assert found.scores[name].alignment == pytest.approx((q @ gradient.flatten() / gradient.norm()).item()), name


def test_inputs_of_all_calls_are_averaged(rng):
    model, x, loss = example(rng)
    (found,) = score_directions(model, loss, ["value"])
    layer = model.value.double()
    with torch.no_grad():
        z = torch.cat([x, layer(x)]).reshape(-1, 4)
    assert found.condition == pytest.approx(torch.linalg.cond(z.mT @ z).item(), rel=1e-8)


def test_the_model_is_left_as_it_was(rng):
    model, _, loss = example(rng)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    layers = score_directions(model, loss, ["query", "frozen", "head"])
    assert [layer.layer for layer in layers] == ["query", "frozen", "head"]
    assert [layer.shape for layer in layers] == [(4, 4), (4, 4), (3, 4)]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.dtype == torch.float32 for parameter in model.parameters())
    assert not model.frozen.weight.requires_grad
    assert not model.query._forward_pre_hooks


def test_adams_direction_divides_by_its_second_moment(rng):
    model, _, loss = example(rng)
    second = torch.rand(4, 4, generator=rng)
    with_adam, without = score_directions(model, loss, ["query", "value"], second_moments={"query": second})
    assert list(with_adam.scores)[1] == "adam"
    assert list(without.scores)[1] == "sign"
    gradient = torch.randn(3, 4, generator=rng, dtype=torch.float64)
    second = torch.rand(3, 4, generator=rng)
    found = directions(gradient, torch.eye(4, dtype=torch.float64), second_moment=second)
    torch.testing.assert_close(found["adam"], gradient / (second.double().sqrt() + 1e-8))
    one = directions(gradient, torch.eye(4, dtype=torch.float64), second_moment=gradient.square())
    torch.testing.assert_close(one["adam"], gradient.sign(), rtol=0, atol=1e-4)


def test_a_dead_input_needs_a_ridge_and_says_so(rng):
    model = nn.Linear(3, 2)
    x = torch.randn(20, 3, generator=rng, dtype=torch.float64) * torch.tensor([1.0, 1.0, 0.0])
    layers = {ridge: score_directions(nn.Sequential(model), lambda m: m(x).square().mean(), ["0"], ridge=ridge)[0]
              for ridge in (0.0, 1e-6, 0.2)}  # fmt: skip
    assert layers[0.0].condition == layers[0.2].condition == math.inf
    assert layers[0.0].raised > 0
    assert layers[1e-6].raised == layers[0.2].raised == 0
    assert all(score.status == "positive" for score in layers[0.2].scores.values())


def test_a_layer_that_does_not_change_the_loss_has_zero_directions(rng):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    nn.init.zeros_(model[1].weight)
    x = torch.randn(10, 3, generator=rng, dtype=torch.float64)
    (found,) = score_directions(model, lambda m: m(x).square().mean(), ["0"])
    assert {score.status for score in found.scores.values()} == {"zero direction"}


def test_patterns_choose_layers():
    model = Attentive()
    assert linear_layers(model) == ["query", "value", "unused", "frozen", "head"]
    assert linear_layers(model, ["head", "q*"]) == ["query", "head"]
    with pytest.raises(ValueError, match="Unknown linear layer 'haed': did you mean 'head'"):
        linear_layers(model, ["query", "haed"])


def test_wrong_input_is_refused(rng):
    model, x, loss = example(rng)
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    cases = [
        (model, loss, ["qery"], {}, "Unknown linear layer 'qery': did you mean 'query'"),
        (model, loss, ["query"], {"ridge": -0.1}, "ridge must be a finite number of at least 0, got -0.1"),
        (model, loss, ["unused"], {}, "The layer 'unused' was not called"),
        (tied, lambda m: m(x).square().mean(), ["0"], {}, r"The weight of '0' is shared by 0.weight, 1.weight"),
        (model, lambda m: m(0 * x).sum(), ["query"], {}, "The inputs of 'query' are zero or not finite"),
        (model, lambda m: m(x).sum() * math.inf, ["query"], {}, r"The \w+ \(4, 4\) is not finite"),
        (
            model,
            loss,
            ["query"],
            {"second_moments": {"query": torch.ones(2)}},
            r"The second moment of 'query' has shape",
        ),
    ]
    for target, function, layers, options, message in cases:
        with pytest.raises(ValueError, match=message):
            score_directions(target, function, layers, **options)
