"""The steepest slope max <m, d> over a unit ball, by search: no dual norm and no steepest direction is used.

Two facts, true of every norm, make 1e-10 possible although the balls have corners. A linear function is largest at an
extreme point, and each ball, or a part of it with all extreme points, is the image of a smooth map, so that a
quasi-Newton method with several starts converges to the last digits. And a product norm grows with the norm of each
block, so that every block can be searched alone, and the radii after it. Balls and trees are written here a second
time, from their definition.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from steepest.geometry import (
    Ada2,
    AdaInf,
    ColNorm,
    Euclid,
    Frobenius,
    Max,
    Norm,
    Nuclear,
    Product,
    RowNorm,
    Scaled,
    Schatten,
    Sign,
    Spectral,
    Sum,
)

STARTS = 2  # each with its mirror image
SCALES: Mapping[str, Callable[[int, int], float]] = {
    "original": lambda m, n: max(1.0, m / n) ** 0.5,
    "match_rms_adamw": lambda m, n: 0.2 * max(m, n) ** 0.5,
    "spectral": lambda m, n: (m / n) ** 0.5,
    "none": lambda m, n: 1.0,
    "sqrt_fan_out": lambda m, n: m**0.5,
    "inverse_fan_in": lambda m, n: 1 / n,
    "sqrt_size": lambda m, n: (m * n) ** 0.5,
}


def ball_point(norm: Norm, free: Tensor, m: Tensor, v: Tensor) -> Tensor:
    """A point of the unit ball, shaped like m, smooth in the free (2, m, n)."""
    y, z = free
    match norm:
        case Scaled(norm=inner, by=rule):
            return SCALES[rule](*y.shape) * ball_point(inner, free, m, v)
        case Spectral(scale=rule):
            return SCALES[rule](*y.shape) * (orthonormal(y) if y.size(0) >= y.size(1) else orthonormal(y.T).T)
        case Frobenius():
            return y / y.square().sum().sqrt()
        case Sign():
            return y.sin()
        case RowNorm():
            return within_unit_length(y, dim=1)
        case ColNorm():
            return within_unit_length(y, dim=0)
        case AdaInf(eps=eps):
            return y.sin() * m.abs() / (v.sqrt() + eps)
        case Ada2(eps=eps):
            return y / (y.square() * (v.sqrt() + eps)).sum().sqrt()
        case Nuclear():
            return torch.outer(y[:, 0] / y[:, 0].norm(), z[0] / z[0].norm())
        case Schatten(p=p):
            return y / torch.linalg.svdvals(y).pow(p).sum() ** (1 / p)
    raise TypeError(f"The unit ball of {norm!r} is not written down here.")


def orthonormal(y: Tensor) -> Tensor:
    """Orthonormal columns; smooth because the triangular factor's diagonal is made positive."""
    q, r = torch.linalg.qr(y)
    return q * r.diagonal().sign()


def within_unit_length(y: Tensor, *, dim: int) -> Tensor:
    """Vectors of length at most one, |sin ‖y‖|."""
    length = y.norm(dim=dim, keepdim=True)
    return y / length * length.sin()


def radii(tree: Product, labels: Sequence[str], y: Tensor) -> tuple[Tensor, int]:
    """Radii (L,) of the blocks at a point of the tree's unit ball, smooth in y: (free,); and how many y it took."""
    children: list[Tensor] = []  # each (L,): the radii within the child if the child's own is one
    used = 0
    for child in tree.children:
        if isinstance(child, str):
            children += [torch.eye(len(labels)).to(y)[i] for i, label in enumerate(labels) if label == child]
        else:
            inner, more = radii(child, labels, y[used:])
            children.append(inner)
            used += more
    own, used = y[used : used + len(children)], used + len(children)
    match tree:
        case Max():
            sizes = own.sin().square()
        case Sum():
            sizes = own.square() / own.square().sum()
        case Euclid():
            sizes = own.abs() / own.norm()
        case _:
            raise TypeError(f"The unit ball of {tree!r} is not written down here.")
    return (sizes.unsqueeze(1) * torch.stack(children)).sum(0), used


def largest(function: Callable[[Tensor], Tensor], shape: Sequence[int], rng: torch.Generator) -> float:
    """Maximum of a smooth function of a tensor of this shape: the best of several searches."""

    def negative(flat: np.ndarray) -> tuple[float, np.ndarray]:
        y = torch.from_numpy(flat.copy()).reshape(*shape).requires_grad_()
        value = -function(y)
        (gradient,) = torch.autograd.grad(value, y)
        return value.item(), gradient.flatten().numpy()

    starts = torch.randn(STARTS, *shape, generator=rng, dtype=torch.float64)
    mirrored = starts.clone()
    mirrored[..., 0] *= -1  # orthogonal matrices have two halves, and no path between them
    points = torch.cat([starts, mirrored]).flatten(1).numpy()
    return -min(minimize(negative, x, jac=True, method="BFGS", options={"gtol": 1e-9}).fun for x in points)


def layer_slope(norm: Norm, m: Tensor, v: Tensor, rng: torch.Generator) -> float:
    """max <m, d> over the norm's unit ball, for one matrix m."""
    return largest(lambda y: (m * ball_point(norm, y, m, v)).sum(), (2, *m.shape), rng)


def product_slope(tree: Product, labels: Sequence[str], slopes: Sequence[float], rng: torch.Generator) -> float:
    """max <m, d> over the unit ball of the product norm, given the slope of each block."""
    a = torch.tensor(slopes, dtype=torch.float64)
    free = radii(tree, labels, torch.ones(4 * len(labels), dtype=torch.float64))[1]
    return largest(lambda y: (a * radii(tree, labels, y)[0]).sum(), (free,), rng)


def least(function: Callable[[float], float], high: float) -> float:
    """Minimum over [0, high] of a convex function with kinks and plateaus, by thirds."""
    low = 0.0
    for _ in range(150):
        third = (high - low) / 3
        if function(low + third) <= function(high - third):
            high -= third
        else:
            low += third
    return min(function(low), function(high))
