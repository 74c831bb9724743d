"""The published algorithm, written down twice: numpy's own and the library's agree step for step."""

import numpy as np
import pytest
import torch
from torch import nn

from steepest import InputMoment, NewtonMuon
from tests.reference import newton_muon as reference

EVERY = 4
BLOCKS = {"0.weight": 1, "2.weight": 3}  # the second reads three times as many features as it writes


def two_layers():
    torch.manual_seed(11)
    layers = [nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 4), nn.Tanh(), nn.Linear(4, 3)]  # the last is the head
    return nn.Sequential(*layers).double()


def inputs_and_gradients(model, step):
    """Of a batch of sequences, at the present weights."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(4, 5, 5, generator=generator, dtype=torch.float64)
    y = torch.randn(4, 5, 3, generator=generator, dtype=torch.float64)
    hidden = model[1](model[0](x)).detach()
    model.zero_grad()
    (model(x) - y).square().mean().backward()
    return {"0.weight": x.flatten(0, 1).T.numpy(), "2.weight": hidden.flatten(0, 1).T.numpy()}


@pytest.mark.parametrize("form", ["heavy-ball", "ema"])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("preset", ["paper_record4", "paper_record28"])
def test_the_library_replays_algorithm_1(preset, nesterov, form):
    model = two_layers()
    options = InputMoment.preset(preset, every=EVERY)
    settings = {"momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.1}
    optimizer = NewtonMuon(model, 0.05, **settings, polar="svd", precondition=options)
    weights = {name: p for name, p in model.named_parameters() if name in BLOCKS}
    ridge = {"decay": options.decay, "ridge": options.ridge, "floor": options.ridge_floor}
    layers = {
        name: reference.NewtonMuon(w.detach().numpy(), blocks=BLOCKS[name], every=EVERY, **ridge)
        for name, w in weights.items()
    }
    for step in range(3 * EVERY + 5):
        inputs = inputs_and_gradients(model, step)
        gradients = {name: w.grad.numpy().copy() for name, w in weights.items()}
        optimizer.step()
        for name, layer in layers.items():
            layer.step(gradients[name], inputs[name], lr=0.05, mu=0.9, form=form, nesterov=nesterov, wd=0.1)
            state = optimizer.state[weights[name]]
            same(state["input_moment"], layer.k)
            same(state["input_powers"][0], layer.inverse)
            same(weights[name].detach(), layer.w)
    assert all(np.ptp(np.linalg.eigvalsh(layer.inverse[0])) > 0.5 for layer in layers.values())  # far from Muon's


def same(actual, expected):
    expected = torch.from_numpy(np.stack(expected) if isinstance(expected, list) else expected)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
