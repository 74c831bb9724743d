"""A network, its micro-batches and its optimizers, for hosts that bring no model of their own."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import steepest
from steepest import InputMoment, Momo

BOUND = 0.5  # of Momo; losses are about 1.4


class Network(nn.Module):
    """Three matrices and their biases, in float64: what hosts add up in another order is far below all tolerances.

    Args:
        way: How it is run: "plain", "compiled", or with what follows the first "checkpointed", or "reentrant", which is
            so in the older way.
        dtype: Of the weights.
    """

    def __init__(self, way="plain", dtype=torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.middle, self.last = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator).to(dtype) / 4
        self.way = way
        if way == "compiled":
            torch._dynamo.reset()
            self.compile(backend="aot_eager")

    def forward(self, x):
        x = self.first(x).tanh()
        if self.way in ("checkpointed", "reentrant"):
            return checkpoint(self.rest, x, use_reentrant=self.way == "reentrant")
        return self.rest(x)

    def rest(self, x):
        return self.last(self.middle(x).tanh())


def batches(count=7, size=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 8, generator=generator, dtype=dtype), torch.randint(4, (size,), generator=generator))
        for _ in range(count)
    ]


def loss_of(model, batch):
    x, y = batch
    return nn.functional.cross_entropy(model(x), y)


METHODS = {
    "muon": lambda model: steepest.Muon(model, lr=0.1),
    "newton": lambda model: steepest.NewtonMuon(model, lr=0.1, precondition=InputMoment(structure="full", every=2)),
    "muonmax-momo": lambda model: steepest.MuonMax(model, lr=1.0, step_size=Momo(BOUND)),
    "newton-momo": lambda model: steepest.NewtonMuon(
        model, lr=0.5, precondition=InputMoment(structure="full", every=2), step_size=Momo(BOUND)
    ),
}
