"""How much of a gradient is noise, from gradients of micro-batches: tensors in, tensors out.

Notation: g_j (R of them) is the mean gradient of the b_j samples of micro-batch j, all at the same weights; B = Σ b_j;
ḡ = Σ (b_j / B) g_j. One sample's gradient has mean ∇L and covariance Σ. A noise scale is (noise / signal)² in the norm
dual to the one that steps are measured in, in samples:

    euclidean   tr Σ / ‖∇L‖²              signed averages estimate both, so that only averages should be divided
    l1          (Σ_i σ_i)² / ‖∇L‖_1²      σ_i² the diagonal of Σ: steps of sign descent, roughly Adam
    nuclear     tr(C^(1/2))² / ‖∇L‖_*²    C = E[(G - ∇L)(G - ∇L)ᵀ] on the short side: spectral steps, Muon

A common factor of all gradients cancels. With b_j = 1 the unit is a micro-batch.

The last two noises are roots of variances, and R micro-batches show no more of a variance than they span: where
gradients are of low rank or sparse, both are far too small until R is large. `Duals.half` tells.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from steepest.linalg import PolarMethod, polar

Direction = Callable[[Tensor], Tensor]


class Squares(NamedTuple):
    """Unbiased parts of the Euclidean scale, 0-d float64.

    Args:
        noise: S, estimates tr Σ.
        signal: G2, estimates ‖∇L‖²; negative where noise has it so.
    """

    noise: Tensor
    signal: Tensor


class Duals(NamedTuple):
    """Parts of a scale in a dual norm, float64, one number for each matrix or 0-d.

    Args:
        noise: Of one sample; too small if micro-batches are too few to show it.
        plug_in: ‖ḡ‖: noise makes it too large, and the scale too small.
        crossed: mean of <g_j, D_j> with D_j the best direction for the other micro-batches: never too large in the
            mean, so the scale is not too small unless `noise` is; may be negative.
        half: `noise` from half of the micro-batches, averaged over the two halves; if `noise` is more than it, more
            micro-batches would show still more. 0 if R < 4, where halves show no noise.
    """

    noise: Tensor
    plug_in: Tensor
    crossed: Tensor
    half: Tensor


def euclidean(gradients: Tensor, samples: Tensor) -> Squares:
    """S = Σ b_j |g_j - ḡ|² / (R - 1) and G2 = |ḡ|² - S / B.

    Unbiased: E Σ b_j |g_j - ḡ|² = R tr Σ - tr Σ, also where the b_j differ. For Gaussian gradients and equal b,
    Var S = 2 tr Σ² / (R - 1) and Var G2 = 4 ∇LᵀΣ∇L / B + 2 tr Σ² / B² · R / (R - 1).

    Args:
        gradients: g (R, ...), R >= 2.
        samples: b (R,), positive.

    Returns:
        Both parts, in squared units of the gradient.

    Raises:
        ValueError: If there are fewer than two gradients, or `samples` does not fit.

    Source:
        McCandlish et al., arXiv:1812.06162, appendix A.1, there with equal b.
    """
    mean, deviations = _centred(gradients, samples)
    noise = deviations.square().sum(dtype=torch.float64) / (len(gradients) - 1)
    return Squares(noise, mean.square().sum(dtype=torch.float64) - noise / samples.sum())


def l1(gradients: Tensor, samples: Tensor) -> Duals:
    """Sums over entries of standard deviations and of absolute values.

    The standard deviation of few values is too small in the mean; it is divided by what that makes of Gaussian ones,
    √(2 / (R-1)) Γ(R/2) / Γ((R-1)/2), 0.80 for two and 0.96 for eight. Sparse gradients lose far more: with entries that
    are zero in 99% of samples, R = 8 micro-batches of 8 samples find 70%; see `Duals.half`.

    Args:
        gradients: g (R, ...), R >= 2.
        samples: b (R,), positive.

    Returns:
        Four 0-d numbers, in units of the gradient.

    Raises:
        ValueError: As for `euclidean`.

    Source:
        Naganuma et al., ICML 2026 (the scale); the correction and the crossed signal are ours.
    """
    mean, deviations = _centred(gradients, samples)
    crossed = alignment(gradients, samples, torch.sign, (len(gradients) - 1,))[0]
    noise = _deviation(deviations)
    return Duals(
        noise, mean.abs().sum(dtype=torch.float64), crossed, _of_halves(_deviation, gradients, samples, like=noise)
    )


def nuclear(gradients: Tensor, samples: Tensor, *, method: PolarMethod = "svd") -> Duals:
    """tr(Ĉ^(1/2)) and nuclear norms, matrix by matrix, with Ĉ = Σ b_j (G_j - Ḡ)(G_j - Ḡ)ᵀ / (R - 1) unbiased.

    The covariance is taken on the short side: the two sides differ, tr(C^(1/2)) is m √n or n √m for m x n independent
    entries, and the smaller bounds the nuclear norm of the noise better and costs less.

    The square root of a covariance of few micro-batches is too small in the mean. Independent entries lose 1% with
    R = 8 in 16 x 32, and 15% in square matrices with R = 2. But R micro-batches whose noise has rank r span R r
    directions at most: unless these are several times the short side, most of the noise is missed. Of the noise of
    products u vᵀ, 64 x 64, one sample with R = 2 finds 17%; 256 x 256, 8 samples with R = 4 find 35%; see `Duals.half`.

    Args:
        gradients: G (R, *batch, m, n), R >= 2.
        samples: b (R,), positive.
        method: How the crossed signal's polar factors are found; "svd" is exact.

    Returns:
        Four tensors (*batch,), in units of the gradient.

    Raises:
        ValueError: As for `euclidean`, or if the gradients are no matrices.

    Source:
        Naganuma et al., ICML 2026 (the scale); the short side and the crossed signal are ours.
    """
    if gradients.ndim < 3:
        raise ValueError(f"nuclear takes matrices (R, *batch, m, n), got shape {tuple(gradients.shape)}. Try l1.")
    mean, deviations = _centred(gradients, samples)
    noise = _root(deviations)

    def direction(average: Tensor) -> Tensor:
        return polar(average, method=method, coefficients="cubic12")

    sums = partial_alignment(gradients, samples, direction, len(gradients) - 1, dims=(-2, -1))
    halves = _of_halves(_root, gradients, samples, like=noise)
    return Duals(noise, _root_trace(mean.double(), summed=False), sums, halves)


def nested_sizes(count: int) -> tuple[int, ...]:
    """Numbers of micro-batches at which `alignment` is looked at: powers of two up to R / 2, and all but one.

    Args:
        count: R, at least 2.

    Returns:
        Rising numbers.

    Examples:
        >>> nested_sizes(2), nested_sizes(4), nested_sizes(16)
        ((1,), (1, 2, 3), (1, 2, 4, 8, 15))
    """
    powers = [2**power for power in range(count.bit_length()) if 2**power <= count // 2]
    return tuple(sorted({*powers, count - 1}))


def alignment(gradients: Tensor, samples: Tensor, direction: Direction, sizes: Sequence[int]) -> Tensor:
    """A(b) = E<∇L, D(g_b)>, what a step of length one along D gains to first order with a batch of b samples.

    For each size k, the micro-batches are cut into groups of k; each group's mean chooses a direction, and the mean of
    all micro-batches outside of the group is what it is compared with. The two are independent, so the estimate has no
    bias, whatever D is: exact or approximate polar factors, signs, anything that does not look at the others.

    Args:
        gradients: g (R, ...), R >= 2.
        samples: b (R,), positive.
        direction: D, from means (groups, ...) to ascent directions of that shape: minus the lmo of a norm.
        sizes: Values of k, from 1 to R - 1; a rest of R / k stays out of the groups.

    Returns:
        (sizes,) in float64: estimates of A at batches of k times the mean of b.

    Raises:
        ValueError: As for `euclidean`, or if a size is not in its range.
    """
    dims = tuple(range(1, gradients.ndim))
    return torch.stack([partial_alignment(gradients, samples, direction, size, dims=dims) for size in sizes])


def partial_alignment(
    gradients: Tensor, samples: Tensor, direction: Direction, size: int, *, dims: Sequence[int]
) -> Tensor:
    """`alignment` of one size, with inner products over some dimensions only.

    Args:
        gradients: As for `alignment`.
        samples: As for `alignment`.
        direction: As for `alignment`.
        size: k.
        dims: Of `gradients`, over which products are summed; not the first.

    Returns:
        The shape of the other dimensions, in float64.

    Raises:
        ValueError: As for `alignment`.
    """
    check(gradients, samples)
    count = len(gradients)
    if not 1 <= size < count:
        raise ValueError(f"alignment of {count} micro-batches takes sizes from 1 to {count - 1}, got {size}.")
    starts = range(0, count - size + 1, size) if size <= count // 2 else range(count)
    # above R / 2 only one group would fit: take all R cyclic runs of k, each against the rest
    places = torch.tensor([[(start + i) % count for i in range(size)] for start in starts], device=gradients.device)
    weights = samples.to(gradients.dtype)
    weighted = gradients * weights.view(-1, *[1] * (gradients.ndim - 1))
    inside = torch.stack([weighted[group].sum(0) for group in places])
    held = weights[places].sum(1).view(-1, *[1] * (gradients.ndim - 1))
    outside = (weighted.sum(0) - inside) / (weights.sum() - held)
    gained = (direction(inside / held) * outside).sum(dim=tuple(dims), dtype=torch.float64)
    return gained.mean(0)


def check(gradients: Tensor, samples: Tensor) -> None:
    """Refuse what no noise can be read from.

    Args:
        gradients: g (R, ...).
        samples: b (R,).

    Raises:
        ValueError: If there are fewer than two gradients, or `samples` does not fit.
    """
    if gradients.ndim == 0 or len(gradients) < 2:
        raise ValueError(
            f"Noise is what differs between micro-batches: gradients (R, ...) with R >= 2 are needed, got shape "
            f"{tuple(gradients.shape)}. Split the batch into two or more."
        )
    if samples.shape != gradients.shape[:1] or not bool((samples > 0).all()):
        raise ValueError(
            f"samples takes one positive number for each of {len(gradients)} gradients, got {samples.tolist()}."
        )


def _centred(gradients: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
    """ḡ, and √b_j (g_j - ḡ)."""
    check(gradients, samples)
    weights = samples.to(gradients.dtype).view(-1, *[1] * (gradients.ndim - 1))
    mean = (gradients * (weights / weights.sum())).sum(0)
    return mean, (gradients - mean).mul_(weights.sqrt())


def _of_halves(noise: Callable[[Tensor], Tensor], gradients: Tensor, samples: Tensor, *, like: Tensor) -> Tensor:
    """Mean of the noise of the first and of the last half; zero if one of them has no noise to show."""
    half = len(gradients) // 2
    if half < 2:
        return torch.zeros_like(like)
    parts = (slice(half), slice(len(gradients) - half, None))
    return sum((noise(_centred(gradients[part], samples[part])[1]) for part in parts), torch.zeros_like(like)) / 2


def _deviation(deviations: Tensor) -> Tensor:
    """Sum of standard deviations, as if values were Gaussian."""
    free = len(deviations) - 1
    shrunk = math.sqrt(2 / free) * math.exp(math.lgamma((free + 1) / 2) - math.lgamma(free / 2))
    return (deviations.square().sum(0) / free).sqrt_().sum(dtype=torch.float64) / shrunk


def _root(deviations: Tensor) -> Tensor:
    """tr(Ĉ^(1/2))."""
    return _root_trace(deviations.double(), summed=True) / math.sqrt(len(deviations) - 1)


def _root_trace(matrices: Tensor, *, summed: bool) -> Tensor:
    """tr((X Xᵀ)^(1/2)) on the short side; X Xᵀ summed over the first dimension if `summed`."""
    wide = matrices if matrices.size(-2) <= matrices.size(-1) else matrices.mT
    if not summed and wide.size(-2) <= 512:
        return torch.linalg.svdvals(wide).sum(-1)
    gram = wide @ wide.mT
    return torch.linalg.eigvalsh(gram.sum(0) if summed else gram).clamp_min(0).sqrt().sum(-1)
