"""Scion as its authors define it, in float64: one parameter's trajectory, straight from the formulas."""

import torch
from torch import Tensor

from tests.reference.muon import polar


def direction(kind: str, m: Tensor) -> Tensor:
    """The ascent direction of norm one; weights as torch stores them, an embedding as (tokens, size)."""
    if kind == "matrix":
        return (m.shape[0] / m.shape[1]) ** 0.5 * polar(m)
    if kind == "embedding":  # the output for each one-hot input has root mean square one
        return m / m.square().mean(1, keepdim=True).sqrt()
    if kind == "head":
        return torch.sign(m) / m.shape[1]
    return m / m.square().mean().sqrt()


def scion(
    w: Tensor, gradients: list[Tensor], *, kind: str, lr: float, momentum: float, radius: float, constrained: bool
) -> list[Tensor]:
    """Weights after each step."""
    m = torch.zeros_like(w)
    trajectory = []
    for g in gradients:
        m = momentum * m + (1 - momentum) * g
        w = (1 - lr if constrained else 1) * w - lr * radius * direction(kind, m)
        trajectory.append(w)
    return trajectory
