"""A quadratic of which everything is known, and Muon on many copies of it at once.

f(W) = tr((W - W*)ᵀ H (W - W*)) / 2 for W of 8 x 16 and H = diag(0.1, ..., 1): ‖H Δ‖_* <= tr(H) ‖Δ‖_2, so L_* = 4.4.
One sample's gradient has independent standard normal noise in every entry: ν = 8 √16 = 32, and the mean of b samples
has it divided by √b.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from steepest.batch_size.bounds import Problem
from steepest.batch_size.ranks import noise_of_entries
from steepest.linalg import polar

FAN_OUT, FAN_IN = 8, 16
CURVATURE = torch.linspace(0.1, 1, FAN_OUT, dtype=torch.float64).unsqueeze(-1)
# 0.2 times normal entries, so that W* is inside the ball of radius 2 and as far away as 60 steps of 0.02 lead.
TARGET = 0.2 * torch.randn(FAN_OUT, FAN_IN, generator=torch.Generator().manual_seed(6), dtype=torch.float64)


def gradient(weight: Tensor, target: Tensor = TARGET) -> Tensor:
    return CURVATURE * (weight - target)


def loss(weight: Tensor, target: Tensor = TARGET) -> Tensor:
    return (CURVATURE * (weight - target).square()).sum((-2, -1)) / 2


def problem(target: Tensor = TARGET) -> Problem:
    """From W_0 = 0."""
    start = torch.zeros_like(target)
    return Problem(
        smoothness=float(CURVATURE.sum()),
        noise=noise_of_entries(FAN_OUT, FAN_IN, 1.0),
        gap=float(loss(start, target)),
        gradient=float(torch.linalg.matrix_norm(gradient(start, target), ord="nuc")),
    )


@dataclass
class Muons:
    """Muon from W_0 = 0 on one copy per seed and batch size; exact polar factors, averages from zero.

    The noise of a seed and a step is the same for all batch sizes, up to its size.
    """

    batches: list[int]
    lr: float
    momentum: float
    nesterov: bool
    weight_decay: float = 0.0
    seeds: int = 5
    weight: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.weight = torch.zeros(self.seeds, len(self.batches), FAN_OUT, FAN_IN, dtype=torch.float64)
        self.average = torch.zeros_like(self.weight)
        self.deviation = torch.tensor(self.batches, dtype=torch.float64).rsqrt().view(1, -1, 1, 1)
        self._rng = torch.Generator().manual_seed(1)

    def step(self) -> None:
        shape = (self.seeds, 1, FAN_OUT, FAN_IN)
        noise = torch.randn(shape, generator=self._rng, dtype=torch.float64) * self.deviation
        seen = gradient(self.weight) + noise
        self.average.lerp_(seen, 1 - self.momentum)
        ahead = torch.lerp(seen, self.average, self.momentum) if self.nesterov else self.average
        self.weight.mul_(1 - self.lr * self.weight_decay).sub_(polar(ahead, method="svd"), alpha=self.lr)


def steps_to(target: float, muons: Muons, *, cap: int) -> Tensor:
    """Steps until the mean of ‖∇f‖_* over all steps so far is at the target, (seeds, batches); infinite beyond cap."""
    total = torch.zeros(muons.weight.shape[:2], dtype=torch.float64)
    found = torch.full_like(total, torch.inf)
    for step in range(1, cap + 1):
        total += torch.linalg.svdvals(gradient(muons.weight)).sum(-1)
        found[(total <= target * step) & found.isinf()] = step
        if found.isfinite().all():
            break
        muons.step()
    return found
