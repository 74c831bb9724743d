"""Polar factor of a batch of matrices: tensors in, tensors out.

Notation: X = U diag(s) Vᵀ is the thin SVD; polar(X) = U Vᵀ over s > 0, the nearest (semi-)orthogonal matrix, and
-polar(G) is the steepest direction of <G, .> in the unit ball of the spectral norm. With k = min(m, n) and
l = max(m, n), all iterations work on the k side.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from steepest.linalg.coefficients import Coefficients, Triple, get_coefficients
from steepest.names import unknown_name

PolarMethod = Literal["auto", "newton-schulz", "gram", "svd"]

# One chunk of a batch keeps its temporaries below this; larger batches are worked on chunk by chunk.
MEMORY_CAP = 256 * 2**20
# Rounding leaves an error of about eps in the null space of the Gram matrix, and a step with slope a enlarges it by
# a². The Gram form starts anew from X before that passes this bound: near 1 the eigenvalues that rounding made negative
# grow faster still, and the iteration diverges.
LARGEST_NOISE = 0.1


def polar(
    x: Tensor,
    *,
    method: PolarMethod = "auto",
    coefficients: str | Coefficients | Sequence[Sequence[float]] = "polar_express",
    dtype: torch.dtype | None = None,
    memory_cap: int = MEMORY_CAP,
) -> Tensor:
    """Polar factor of each matrix of a batch.

    The result does not depend on the scale of a matrix: entries from 1e-30 to 1e30 are brought to size one first, in
    float32 or wider. A zero matrix gives zero, a matrix without entries gives itself; a non-finite entry spoils its
    own matrix only. For "svd", singular values that the rounding of the input can have made count as zero: those below
    8 eps s_max, with the eps of the input's dtype but of float32 at most. The polynomial methods send a singular value
    s to `coefficients(s / ‖X‖_F)`.

    Args:
        x: (*batch, m, n), real floating point, any units.
        method: "svd" is exact, in float64. "newton-schulz" multiplies X in every step, "gram" iterates on the k x k
            Gram matrix. "auto" takes whichever of the two needs fewer operations for this shape.
        coefficients: For the two polynomial methods: a name, a `Coefficients`, or (a, b, c) triples.
        dtype: Type of the matrix products. Default: float64 for float64 input, else bfloat16 on CUDA and float32
            elsewhere.
        memory_cap: Bytes that temporaries may take; a batch beyond it is split, one matrix is never split.

    Returns:
        (*batch, m, n), unitless, dtype and device of `x`, never sharing memory with it.

    Raises:
        ValueError: If `x` has fewer than two dimensions, an option is not known, or `memory_cap` is not positive.
        TypeError: If `x` is not real floating point.

    Source:
        Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/ (iteration); arXiv:2505.16932 (coefficients).
    """
    if x.ndim < 2:
        raise ValueError(
            f"polar takes (*batch, m, n), got shape {tuple(x.shape)}. Give vectors another norm than the spectral one."
        )
    if not x.is_floating_point():
        raise TypeError(f"polar takes a real floating-point tensor, got {x.dtype}.")
    if method not in get_args(PolarMethod):
        raise ValueError(unknown_name("polar method", method, get_args(PolarMethod)))
    if memory_cap <= 0:
        raise ValueError(f"polar takes a positive memory_cap in bytes, got {memory_cap}.")
    chosen = get_coefficients(coefficients)
    if x.numel() == 0:
        return x.clone()
    batch = x.reshape(-1, *x.shape[-2:])
    tall = batch.size(-2) > batch.size(-1)
    wide = batch.mT if tall else batch
    rows, columns = wide.shape[-2:]
    compute = torch.float64 if method == "svd" else dtype or _compute_dtype(x)
    iterate = _iteration(method, chosen, rows, columns, torch.finfo(_wide(x) if method == "svd" else compute).eps)
    # X, its next iterate, and three k x k matrices (Gram matrix, its polynomial, accumulated factor)
    per_matrix = (2 * rows * columns + 3 * rows * rows) * compute.itemsize
    chunks = wide.split(max(1, memory_cap // per_matrix))
    done = [iterate(_normalised(chunk, compute)).to(x.dtype) for chunk in chunks]
    result = done[0] if len(done) == 1 else torch.cat(done)
    return (result.mT if tall else result).reshape(x.shape)


def flops(
    method: Literal["newton-schulz", "gram"], rows: int, columns: int, steps: Sequence[Triple], *, eps: float
) -> int:
    """Floating-point operations of one matrix, a multiply-add counted as two.

    Args:
        method: Which form.
        rows: k, the short side.
        columns: l, the long side.
        steps: The quintics; the Gram form's restarts depend on their slopes.
        eps: Machine epsilon of the products' dtype.

    Returns:
        Operations of the matrix products; elementwise work is not counted.
    """
    product, cube = 2 * rows * rows * columns, 2 * rows**3
    if method == "newton-schulz":
        return len(steps) * (2 * product + cube)
    segments = len(_segments(steps, eps))
    # a segment: the Gram matrix and the factor times X on the long side; R² in every step, Q Z in all but its first,
    # Z R Z in all but its last
    return segments * 2 * product + (len(steps) + 3 * (len(steps) - segments)) * cube


def _compute_dtype(x: Tensor) -> torch.dtype:
    if x.dtype == torch.float64:
        return torch.float64
    return torch.bfloat16 if x.is_cuda else torch.float32


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _normalised(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Divide each matrix by its Frobenius norm, by way of its largest entry so that squares stay in range."""
    x = x.to(_wide(x))
    largest = x.abs().amax(dim=(-2, -1), keepdim=True)
    x = x / torch.where(largest == 0, 1.0, largest)
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    return (x / torch.where(norm == 0, 1.0, norm)).to(dtype)


def _iteration(
    method: PolarMethod, chosen: Coefficients, rows: int, columns: int, eps: float
) -> Callable[[Tensor], Tensor]:
    """The function from normalised (B, k, l) matrices to their polar factors."""
    if method == "svd":
        return partial(_svd, eps=eps)
    steps = chosen.steps
    if method == "auto":
        standard, gram = (flops(form, rows, columns, steps, eps=eps) for form in ("newton-schulz", "gram"))
        method = "gram" if gram < standard else "newton-schulz"
    if method == "gram":
        return partial(_gram, segments=_segments(steps, eps))
    return partial(_newton_schulz, steps=steps)


def _svd(x: Tensor, eps: float) -> Tensor:
    finite = x.isfinite().all(dim=(-2, -1), keepdim=True)
    u, s, vh = torch.linalg.svd(torch.where(finite, x, 0.0), full_matrices=False)
    cutoff = s[..., :1] * max(8 * eps, max(x.shape[-2:]) * torch.finfo(x.dtype).eps)
    return torch.where(finite, (u * (s > cutoff).unsqueeze(-2)) @ vh, torch.nan)


def _newton_schulz(x: Tensor, steps: Sequence[Triple]) -> Tensor:
    for a, b, c in steps:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _segments(steps: Sequence[Triple], eps: float) -> list[Sequence[Triple]]:
    """Runs of steps between two formations of the Gram matrix."""
    segments: list[list[Triple]] = []
    noise = math.inf
    for step in steps:
        if noise > LARGEST_NOISE:
            segments.append([])
            noise = eps
        segments[-1].append(step)
        noise *= step[0] ** 2
    return list(segments)


def _gram(x: Tensor, segments: Sequence[Sequence[Triple]]) -> Tensor:
    """Newton-Schulz in the Gram matrix R = X Xᵀ alone: with Z = a I + b R + c R², X -> Z X means R -> Z R Z."""
    for steps in segments:
        gram = x @ x.mT
        factor: Tensor | None = None
        for index, (a, b, c) in enumerate(steps, start=1):
            update = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            update.diagonal(dim1=-2, dim2=-1).add_(a)
            factor = update if factor is None else update @ factor
            if index < len(steps):
                gram = update @ gram @ update
        x = x if factor is None else factor @ x
    return x
