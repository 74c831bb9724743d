"""A small network, a few optimizers for it, and a training loop."""

from functools import partial

import torch
from torch import nn

from steepest import Adam, Frobenius, Muon, MuonAdam, MuonMax, PolarGrad, Sign, SteepestDescent
from steepest.testing import batch, network

__all__ = ["RECIPES", "assert_same", "backward", "batch", "network", "snapshot", "train"]

RECIPES = {
    "muon": partial(Muon, lr=0.02, weight_decay=0.1),
    "muon_adam": partial(MuonAdam, lr=0.02),
    "muon_max": partial(MuonMax, lr=0.02, weight_decay=0.1),
    "muon_max_stale": partial(MuonMax, lr=0.02, dual="stale"),
    "polar_grad": partial(PolarGrad, lr=0.05),
    "adam": partial(Adam, lr=1e-2),
    "own": partial(SteepestDescent, lr=0.01, norms={"matrix": Frobenius(), "vector": Sign(), "head": "sign"}),
}


def backward(model, step, dtype=torch.float32):
    x, y = batch(step, dtype)
    loss = nn.functional.cross_entropy(model(x).float(), y)
    loss.backward()
    return loss


def train(model, optimizer, steps, dtype=torch.float32):
    for step in steps:
        optimizer.zero_grad()
        backward(model, step, dtype)
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def snapshot(model, optimizer):
    state = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in model.parameters() if p in optimizer.state]
    return [p.detach().clone() for p in model.parameters()], state


def assert_same(a, b):
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        if isinstance(one, dict):
            assert one.keys() == other.keys()
            assert_same(list(one.values()), list(other.values()))
        else:
            assert torch.equal(one, other)


def powers_of(optimizer, parameter):
    """Powers of the moment of what a layer reads, as the step uses them."""
    return optimizer.stages[0].powers_of(parameter)
