"""One loop in many forms: whole, accumulated, on several ranks; the micro-batches are the same."""

import torch
from torch import nn

from steepest.batch_size.noise import NoiseScale

MICRO, PER, STEPS = 4, 3, 4
ALL = ("euclidean", "l1", "nuclear", "alignment")


class Net(nn.Module):
    """A tied table, a matrix, a gain, and a branch that only some micro-batches use."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(12, 8)
        self.up = nn.Linear(8, 10)
        self.sometimes = nn.Linear(10, 10, bias=False)
        self.down = nn.Linear(10, 8, bias=False)
        self.gain = nn.Parameter(torch.ones(8))
        self.frozen = nn.Parameter(torch.ones(8), requires_grad=False)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x):
        h = torch.tanh(self.up(self.table(x)))
        if x[0] % 2 == 0:
            h = h + self.sometimes(h)
        return self.head(self.down(h) * self.gain * self.frozen)


def network():
    torch.manual_seed(5)
    return Net().double()


def micro_batch(step, index):
    rng = torch.Generator().manual_seed(100 * step + index)
    return torch.randint(12, (PER,), generator=rng), torch.randint(12, (PER,), generator=rng)


def loss_of(model, step, index):
    x, y = micro_batch(step, index)
    return nn.functional.cross_entropy(model(x), y)


def mean_gradients(model, step, count=MICRO):
    """Gradients of micro-batches by torch.autograd.grad: the definition. Name to (R, ...)."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows = []
    for index in range(count):
        found = torch.autograd.grad(loss_of(model, step, index), parameters.values(), allow_unused=True)
        rows.append([torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters.values(), strict=True)])
    return {name: torch.stack(part) for name, part in zip(parameters, zip(*rows, strict=True), strict=True)}


def sgd(model, lr=0.05):
    return torch.optim.SGD(model.parameters(), lr=lr)


def train(model, optimizer, *, steps=STEPS, divide=MICRO, after=lambda: None, to_none=True, factor=1.0):
    for step in range(steps):
        for index in range(MICRO):
            (loss_of(model, step, index) * factor / divide).backward()
        after()
        optimizer.step()
        optimizer.zero_grad(set_to_none=to_none)


def train_step(model, optimizer, step):
    for index in range(MICRO):
        (loss_of(model, step, index) / MICRO).backward()
    optimizer.step()
    optimizer.zero_grad()


def values(noise):
    return torch.stack([record.values for record in noise._records])


def measured(**options):
    model = network()
    optimizer = sgd(model)
    loop = {key: options.pop(key) for key in ("divide", "after", "to_none", "factor") if key in options}
    noise = NoiseScale(model, optimizer, **{"every": 1, "samples": PER, "kinds": ALL, **options})
    train(model, optimizer, **loop)
    return noise
