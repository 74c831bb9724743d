"""Models to be watched, and second moments of what their layers read, from a plain run of a copy."""

import copy

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from steepest import InputMoment, NewtonMuon

SEEN = InputMoment(every=1, first=0, decay=0.0, structure="full")  # the moment is the mean of this step


class Net(nn.Module):
    """Three linear maps; the last is the head, which is not preconditioned."""

    def __init__(self, *, reentrant=None):
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.second = nn.Linear(6, 6)
        self.third = nn.Linear(6, 7)
        self.head = nn.Linear(7, 3)
        self.reentrant = reentrant

    def middle(self, x):
        return torch.relu(self.third(torch.tanh(self.second(x))))

    def forward(self, x):
        x = torch.relu(self.first(x))
        x = self.middle(x) if self.reentrant is None else checkpoint(self.middle, x, use_reentrant=self.reentrant)
        return self.head(x)


NAMES = ["first.weight", "second.weight", "third.weight"]


def net(dtype=torch.float64, **options):
    torch.manual_seed(7)
    return Net(**options).to(dtype)


def data(size=8, time=3, dtype=torch.float64, seed=1, width=5):
    return torch.randn(size, time, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def moments(model, batches, weights=None):
    """Parameter name to the (weighted) mean of z zᵀ over all tokens of all batches, from calls of linear maps."""
    plain = copy.deepcopy(model)
    if hasattr(plain, "reentrant"):
        plain.reentrant = None
    names = {id(p): name for name, p in plain.named_parameters()}
    calls = {}

    def keep(module, arguments):
        calls.setdefault(names[id(module.weight)], []).append(arguments[0].detach().double().clone())

    for module in plain.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(keep)
    result = {}
    for place, batch in enumerate(batches):
        calls.clear()
        with torch.no_grad():
            plain(batch)
        for name, inputs in calls.items():
            total, mass = result.get(name, (0.0, 0.0))
            for z in inputs:
                own = torch.ones(z.shape[:-1]) if weights is None else weights[place]
                own = own.double().reshape(own.shape + (1,) * (z.ndim - 1 - own.ndim)).expand(z.shape[:-1])
                total, mass = total + torch.einsum("...,...i,...j->ij", own, z, z), mass + own.sum()
            result[name] = (total, mass)
    return {name: total / mass for name, (total, mass) in result.items()}


def newton(model, options=SEEN, **others):
    return NewtonMuon(model, lr=0.01, precondition=options, **others)


def kept(model, optimizer):
    """Parameter name to its moment, for those that have one of their own."""
    found, seen = {}, set()
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        if state.get("input_mass", torch.zeros(1)).any() and state["input_moment"].data_ptr() not in seen:
            seen.add(state["input_moment"].data_ptr())  # those that share hold the same tensor
            found[name] = state["input_moment"][0]
    return found


def assert_kept(model, optimizer, expected, *, names=NAMES, rtol=1e-12, atol=1e-13):
    found = kept(model, optimizer)
    assert list(found) == list(names)
    for name in names:
        torch.testing.assert_close(
            found[name].double(), expected[name], rtol=rtol, atol=atol, msg=lambda t, n=name: n + t
        )


def backward(model, x):
    model(x).square().mean().backward()
