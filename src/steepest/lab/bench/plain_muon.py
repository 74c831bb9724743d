"""Muon as one would write it down, one matrix after the other: what a library has to be faster than."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

STEPS = ((3.4445, -4.7750, 2.0315),) * 5
EPS = 1e-7


class PlainMuon(torch.optim.Optimizer):
    """The update of `torch.optim.Muon` with products in the parameters' own dtype.

    Args:
        params: Matrices.
        lr: Learning rate.
        momentum: Weight of the past.
        weight_decay: Decoupled.

    Source:
        Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/
    """

    def __init__(self, params: Iterable[Tensor], lr: float, *, momentum: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update each matrix that has a gradient."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            lr, beta = group["lr"], group["momentum"]
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    if not state:
                        state["momentum"] = torch.zeros_like(p)
                    buffer = state["momentum"]
                    buffer.lerp_(p.grad, 1 - beta)
                    direction = newton_schulz(p.grad.lerp(buffer, beta))
                    p.mul_(1 - lr * group["weight_decay"])
                    p.add_(direction, alpha=-lr * math.sqrt(max(1.0, p.size(0) / p.size(1))))
        return loss


def newton_schulz(g: Tensor) -> Tensor:
    """Five quintics, applied to the singular values of g / ‖g‖_F; (m, n) -> (m, n)."""
    tall = g.size(0) > g.size(1)
    x = g.T if tall else g
    x = x / x.norm().clamp(min=EPS)
    for a, b, c in STEPS:
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
