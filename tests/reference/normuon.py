"""NorMuon in float64, after Algorithm 1 of arXiv:2510.05491: what the library must equal step for step."""

import torch
from torch import Tensor

from tests.reference.muon import polar


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
