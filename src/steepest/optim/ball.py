"""Weights against the ball that weight decay keeps them in, for constrained descent in the spectral norm.

A step W <- (1 - lr λ) W + lr D with σ_max(D) <= κ c stays within σ_max(W) <= κ c / λ as long as lr λ <= 1: c is the
norm's scale for the shape, κ the largest singular value of the computed polar factor, 1 for an exact one. On this ball
the optimizer is a stochastic Frank-Wolfe method, and what goes to zero is the Frank-Wolfe gap, not the gradient
(arXiv:2506.15054; in the spirit of arXiv:2507.01598v5).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from steepest.anatomy import Bucket, PlanRow
from steepest.geometry import Norm
from steepest.geometry.norm import completed
from steepest.linalg import polar
from steepest.optim.decay import Decay
from steepest.optim.groups import averages_of
from steepest.optim.momentum import combined, debias
from steepest.optim.state import MOMENTUM, STEP, momenta
from steepest.ranks import whole
from steepest.stages.stage import state_dtype

ITERATIONS = 32
STARTS = 4  # vectors; one alone may be all but orthogonal to the singular vector that is looked for


def beyond_ball(group: Mapping[str, Any]) -> float | None:
    """lr · weight_decay of a group if it is above 1, else None.

    A learning rate that is a tensor on an accelerator is not read: that would wait for the device.
    """
    lr, decay = group["lr"], group["weight_decay"]
    if not decay or (isinstance(lr, Tensor) and lr.device.type != "cpu"):
        return None
    product = float(lr) * decay
    return product if product > 1 else None


def largest_singular_values(matrices: Tensor, *, iterations: int = ITERATIONS) -> Tensor:
    """σ_max by power iteration on W Wᵀ: from below, and within a percent where few singular values are the largest.

    Args:
        matrices: (B, m, n), real floating point.
        iterations: Products with W and Wᵀ each.

    Returns:
        (B,), in units of the weights, in float32 or wider.
    """
    wide = matrices.to(torch.promote_types(matrices.dtype, torch.float32))
    # the same start each time, so that numbers can be compared
    generator = torch.Generator(device="cpu").manual_seed(0)
    start = torch.randn(wide.size(-1), STARTS, generator=generator, dtype=torch.float64, device="cpu")
    vectors = start.to(wide).expand(len(wide), -1, -1)
    lengths = wide.new_zeros(len(wide), STARTS)
    for _ in range(iterations):
        vectors = vectors / torch.linalg.vector_norm(vectors, dim=-2, keepdim=True).clamp_min(1e-30)
        images = wide @ vectors
        lengths = torch.linalg.vector_norm(images, dim=-2)
        vectors = wide.mT @ images
    return lengths.amax(dim=-1)


def weight_numbers(
    groups: Iterable[tuple[Mapping[str, Any], Norm, Decay | None]],
    rows: Mapping[Tensor, PlanRow],
    states: Mapping[Tensor, Mapping[str, Tensor]],
) -> dict[str, float]:
    """Spectral norms, radii and Frank-Wolfe gaps, as `SteepestDescent.diagnostics(weights=True)` says.

    Sharded weights and averages are put together one after the other: all ranks that keep a part must call it together,
    and each has the numbers of all.

    Args:
        groups: All, their norms, and what decays their weights; None where directions are not of norm one.
        rows: Of the plan.
        states: Of the parameters, with momenta.
    """
    numbers: dict[str, float] = {}
    for group, norm, decay in groups:
        norm = completed(norm)
        for parameter in cast(Sequence[Tensor], group["params"]):
            if not parameter.numel():
                continue
            bucket = Bucket((parameter,), rows[parameter].view)
            scales = [norm.polar_scale(m, n) for _, m, n in bucket.blocks]
            lengths = [norm.overshoot(parameter) * scale for scale in scales if scale is not None]
            if len(lengths) < len(scales):
                break
            weights = bucket.matrices([whole(parameter.detach())])
            prefix = f"weights/{rows[parameter].name}"
            numbers[f"{prefix}/spectral_norm"] = max(float(largest_singular_values(w).max()) for w in weights)
            rate = group["weight_decay"]
            radius = decay.radius(rate) if decay and rate else None
            if radius is not None:
                numbers[f"{prefix}/ball_radius"] = max(lengths) * radius
            if decay and (radius is not None or not rate) and (state := states.get(parameter)) and int(state[STEP]):
                averages = bucket.matrices([_mean(state, group, state_dtype(parameter))])
                pulls = [1 / (length * radius) if radius else 0.0 for length in lengths]
                gaps = [_gap(m, w, pull) for m, w, pull in zip(averages, weights, pulls, strict=True)]
                numbers[f"{prefix}/frank_wolfe_gap"] = sum(gaps)
    return numbers


def _mean(state: Mapping[str, Tensor], group: Mapping[str, Any], dtype: torch.dtype) -> Tensor:
    """The averaged gradient of a parameter, whole; all ranks that keep a part take part."""
    averages = averages_of(group)
    if averages is not None:
        buffers = [[whole(state[key]).to(dtype)] for key in momenta(len(averages))]
        return combined(buffers, averages, group["momentum"], state[STEP].to(dtype).reshape(1))[0]
    average = whole(state[MOMENTUM]).to(dtype)
    mass = debias(group["momentum"], state[STEP].to(average.dtype))
    return average / torch.where(mass == 0, 1.0, mass)


def _gap(m: Tensor, w: Tensor, pull: float) -> float:
    """‖M‖_* + <M, W> / radius, summed over matrices; the nuclear norm by a closer polar factor than a step's."""
    factor = polar(m, method="newton-schulz", coefficients="cubic12", dtype=m.dtype)
    return float((m * factor).sum() + pull * (m * w.to(m.dtype)).sum())
