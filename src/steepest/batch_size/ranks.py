"""How large a matrix noise is in the nuclear norm, and the rank that leads there from the Frobenius norm.

Noise is measured by ν = tr(C^(1/2)), C = E[ξ ξᵀ] for the noise ξ (m, n) of one sample: then E‖mean of b samples‖_* <=
ν/√b. It follows from E‖ξ‖_* = E tr((ξ ξᵀ)^(1/2)) <= tr(C^(1/2)), as the square root is operator concave. The same holds
for E[ξᵀ ξ], and the two differ (iid noise on 16 x 64 has 128 and 256): either bounds, the smaller is the better.
"""

import math

import torch
from torch import Tensor

from steepest.checks import number, whole


def effective_rank(matrix: Tensor) -> Tensor:
    """(‖A‖_* / ‖A‖_F)²: how many equal singular values would have the same two norms.

    Not the stable rank ‖A‖_F² / ‖A‖_2², and not the entropy rank. From 1 to rank A; equal to the rank if all nonzero
    singular values are equal.

    Args:
        matrix: A (*batch, m, n), real floating point, any units.

    Returns:
        (*batch,), unitless, in float64; 0 for a zero matrix.
    """
    singular = torch.linalg.svdvals(matrix.double())
    largest = singular.amax(dim=-1, keepdim=True)
    relative = singular / torch.where(largest == 0, 1.0, largest)
    squares = relative.square().sum(-1)
    return relative.sum(-1).square() / torch.where(squares == 0, 1.0, squares)


def noise_of_covariance(covariance: Tensor) -> Tensor:
    """ν = tr(C^(1/2)).

    Args:
        covariance: C (*batch, m, m), symmetric and positive semidefinite up to rounding, squared loss per weight.

    Returns:
        (*batch,), loss per weight, in float64.

    Raises:
        ValueError: If an eigenvalue is more negative than rounding explains.
    """
    values = torch.linalg.eigvalsh(covariance.double())
    if values.numel() and bool((values[..., 0] < -1e-6 * values.abs().amax(-1)).any()):
        lowest = float(values.min())
        raise ValueError(f"noise_of_covariance takes a positive semidefinite matrix, got the eigenvalue {lowest:.3g}.")
    return values.clamp_min(0).sqrt().sum(-1)


def noise_of_variance(sigma: float, rank: float) -> float:
    """ν = √r σ, from the Frobenius norm of the noise.

    An upper bound if r is the rank of C or the short side; equal to ν if r is the effective rank of C^(1/2), because
    then tr(C^(1/2))² = r tr(C).

    Args:
        sigma: σ, root of E‖ξ‖_F² for one sample, loss per weight.
        rank: r, at least 1.

    Returns:
        ν, loss per weight.

    Raises:
        ValueError: If σ is negative or r below 1, or one is not finite.
    """
    sigma = number()("noise_of_variance: sigma", sigma)
    return math.sqrt(number(1)("noise_of_variance: rank", rank)) * sigma


def noise_of_entries(fan_out: int, fan_in: int, sigma: float) -> float:
    """ν of independent entries: σ min(m √n, n √m), from the covariance on the short side.

    Args:
        fan_out: m.
        fan_in: n.
        sigma: Standard deviation of each entry for one sample, loss per weight.

    Returns:
        ν, loss per weight.

    Raises:
        ValueError: If a side is below 1, or σ negative or not finite.
    """
    fan_out, fan_in = (
        whole(1)(f"noise_of_entries: {n}", side) for n, side in (("fan_out", fan_out), ("fan_in", fan_in))
    )
    sigma = number()("noise_of_entries: sigma", sigma)
    return sigma * min(fan_out, fan_in) * math.sqrt(max(fan_out, fan_in))
