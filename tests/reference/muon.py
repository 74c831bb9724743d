"""Muon and Adam in float64, straight from their formulas: what the library must equal step for step."""

import torch
from torch import Tensor


def polar(m: Tensor) -> Tensor:
    u, s, vh = torch.linalg.svd(m, full_matrices=False)
    return u[:, s > 1e-13 * s.max()] @ vh[s > 1e-13 * s.max()]


def muon(
    w: Tensor, gradients: list[Tensor], *, lr: float, momentum: float, nesterov: bool, weight_decay: float, scale: float
) -> list[Tensor]:
    """Weights after each step. Heavy-ball form: its direction equals the average's, with and without Nesterov."""
    buffer = torch.zeros_like(w)
    trajectory = []
    for g in gradients:
        buffer = momentum * buffer + g
        ahead = g + momentum * buffer if nesterov else buffer
        w = (1 - lr * weight_decay) * w - lr * scale * polar(ahead)
        trajectory.append(w)
    return trajectory


def adam(
    w: Tensor, gradients: list[Tensor], *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> list[Tensor]:
    """Weights after each step: Kingma and Ba's Algorithm 1 with decoupled decay."""
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    trajectory = []
    for t, g in enumerate(gradients, start=1):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        w = (1 - lr * weight_decay) * w
        w = w - lr * (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
        trajectory.append(w)
    return trajectory


# Scion as its authors define it, in float64: one parameter's trajectory, straight from the formulas.


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


# NorMuon in float64, after Algorithm 1 of arXiv:2510.05491: what the library must equal step for step.


def normuon(
    w: Tensor,
    gradients: list[Tensor],
    *,
    lr: float,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    beta2: float,
    eps: float,
) -> list[Tensor]:
    """Weights after each step; a step has the Frobenius norm of the polar factor, where the paper has 0.2 sqrt(m n)."""
    m, v = torch.zeros_like(w), torch.zeros(len(w), dtype=w.dtype)
    trajectory = []
    for g in gradients:
        m = momentum * m + (1 - momentum) * g
        o = polar((1 - momentum) * g + momentum * m if nesterov else m)
        v = beta2 * v + (1 - beta2) * (o * o).sum(1) / o.size(1)
        scaled = o / (v.sqrt() + eps)[:, None]
        scaled = scaled * (o * o).sum().sqrt() / (scaled * scaled).sum().sqrt()
        w = (1 - lr * weight_decay) * w - lr * scaled
        trajectory.append(w)
    return trajectory
