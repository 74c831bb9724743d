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
