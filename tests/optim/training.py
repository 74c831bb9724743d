"""A small network, a few optimizers for it, and a training loop."""

import torch
from torch import nn

from steepest import Adam, Frobenius, Muon, MuonAdam, MuonMax, PolarGrad, Sign, SteepestDescent

RECIPES = {
    "muon": lambda params, **options: Muon(params, lr=0.02, weight_decay=0.1, **options),
    "muon_adam": lambda params, **options: MuonAdam(params, lr=0.02, **options),
    "muon_max": lambda params, **options: MuonMax(params, lr=0.02, weight_decay=0.1, **options),
    "muon_max_stale": lambda params, **options: MuonMax(params, lr=0.02, dual="stale", **options),
    "polar_grad": lambda params, **options: PolarGrad(params, lr=0.05, **options),
    "adam": lambda params, **options: Adam(params, lr=1e-2, **options),
    "own": lambda params, **options: SteepestDescent(
        params, lr=0.01, norms={"matrix": Frobenius(), "vector": Sign(), "head": "sign"}, **options
    ),
}


def network(dtype=torch.float32):
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, groups=2),
        nn.GroupNorm(2, 6),
        nn.Flatten(),
        nn.Linear(24, 12),
        nn.ReLU(),
        nn.Linear(12, 4),
    )
    return model.to(dtype)


def batch(step, dtype=torch.float32, size=8):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(size, 2, 4, 4, generator=generator)
    return x.to(dtype), torch.randint(0, 4, (size,), generator=generator)


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
