"""Polar factor of a batch of matrices: tensors in, tensors out.

Notation: X = U diag(s) Vᵀ is the thin SVD; polar(X) = U Vᵀ over s > 0, the nearest (semi-)orthogonal matrix, and
-polar(G) is the steepest direction of <G, .> in the unit ball of the spectral norm. With k = min(m, n) and
l = max(m, n), all iterations work on the k side.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from steepest.linalg.coefficients import Coefficients, bears, get_coefficients
from steepest.linalg.plan import Iteration, Job, choose
from steepest.linalg.products import full_precision
from steepest.names import unknown_name

PolarMethod = Literal["auto", "newton-schulz", "gram", "svd"]
"""How a polar factor is computed; "auto" takes the cheaper of the two polynomial ways for each shape."""

MEMORY_CAP = 256 * 2**20
"""Bytes that the temporaries of one chunk of a batch stay below; larger batches are worked on chunk by chunk."""

SVD_COPIES = 7  # of a matrix in float64, at the same time, about


@torch.no_grad()
def polar(
    x: Tensor,
    *,
    method: PolarMethod = "auto",
    coefficients: str | Coefficients | Sequence[Sequence[float]] = "auto",
    dtype: torch.dtype | None = None,
    memory_cap: int = MEMORY_CAP,
) -> Tensor:
    """Polar factor of each matrix of a batch. No gradient flows through it.

    The result does not depend on the scale of a matrix: entries from 1e-30 to 1e30 are brought to size one first, in
    float32 or wider. A zero matrix gives zero, a matrix without entries gives itself; a non-finite entry spoils its
    own matrix only. For "svd", singular values that the rounding of the input can have made count as zero: those below
    8 eps s_max, with the eps of the input's dtype but of float32 at most. The polynomial methods send a singular value
    s to `coefficients(s / N)` with N the norm of X that belongs to the set, ‖X‖_F for most.

    Args:
        x: (*batch, m, n), real floating point, any units.
        method: "svd" is exact, in float64. "newton-schulz" multiplies X in every step, "gram" iterates on the k x k
            Gram matrix. "auto" takes whichever of the two needs fewer operations for what is worked on together.
        coefficients: For the two polynomial methods: a name, a `Coefficients`, or numbers; see `get_coefficients`.
        dtype: Type of the matrix products, whatever precision the process allows for its own. Default: float64 for
            float64 input, bfloat16 on CUDA if the coefficients bear it, and float32 else.
        memory_cap: Bytes that temporaries may take; a batch beyond it is split, one matrix is never split.

    Returns:
        (*batch, m, n), unitless, dtype and device of `x`, never sharing memory with it.

    Raises:
        ValueError: If `x` has fewer than two dimensions, an option is not known, `memory_cap` is not positive, or the
            coefficients need products in a wider type.
        TypeError: If `x` is not real floating point.

    Source:
        Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/ (iteration); arXiv:2505.16932 (coefficients).
    """
    return polars([x], method=method, coefficients=coefficients, dtype=dtype, memory_cap=memory_cap)[0]


@torch.no_grad()
def polars(
    xs: Sequence[Tensor],
    *,
    method: PolarMethod = "auto",
    coefficients: str | Coefficients | Sequence[Sequence[float]] = "auto",
    dtype: torch.dtype | None = None,
    memory_cap: int = MEMORY_CAP,
    times: Sequence[float] | None = None,
    company: Sequence[tuple[int, int, int]] | None = None,
) -> list[Tensor]:
    """Polar factors of several batches; those with the same short side are worked on together.

    Args:
        xs: (*batch, m, n) each, as for `polar`.
        method: As for `polar`.
        coefficients: As for `polar`.
        dtype: As for `polar`.
        memory_cap: As for `polar`.
        times: What each batch's factors are multiplied with; None for nothing.
        company: Shapes (B, m, n) by which "auto" chooses the form, where these are a part of more; None: of these.

    Returns:
        Like `xs`.

    Raises:
        ValueError: As `polar`.
        TypeError: As `polar`.
    """
    for x in xs:
        _check(x, method, memory_cap)
    results = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in xs]
    alike: dict[tuple[int, torch.dtype, torch.device], list[Job]] = {}
    for x, result, factor in zip(xs, results, [1.0] * len(xs) if times is None else times, strict=True):
        computed = torch.float64 if method == "svd" else dtype or compute_dtype(x, coefficients)
        get_coefficients(coefficients, computed)
        if x.numel() == 0:
            continue
        job = Job.of(x, result, factor)
        if method == "svd":
            count = max(1, memory_cap // (8 * SVD_COPIES * job.rows * job.columns))
            while len(job.source):
                part, job = job.cut(count)
                _svd(part)
        else:
            alike.setdefault((job.rows, computed, x.device), []).append(job)
    for (rows, computed, device), jobs in alike.items():
        chosen = get_coefficients(coefficients, computed)
        columns = [(len(job.source), job.columns) for job in jobs]
        if company is not None:
            columns = [(count, max(m, n)) for count, m, n in company if min(m, n) == rows and count]
        iteration = choose(method, chosen, rows, columns, computed, device)
        with full_precision(device):
            for together in packed(jobs, iteration, memory_cap):
                iteration.run(together)
    return results


def packed(jobs: Sequence[Job], iteration: Iteration, memory_cap: int) -> Iterator[list[Job]]:
    """Jobs that fit into the memory together; a matrix is not divided.

    Args:
        jobs: All with the iteration's k.
        iteration: What they are for.
        memory_cap: In bytes.
    """
    taken: list[Job] = []
    used = 0
    for job in jobs:
        size = iteration.bytes_per_matrix(job.columns)
        rest = job
        while len(rest.source):
            if taken and used + size > memory_cap:
                yield taken
                taken, used = [], 0
            fitting = max(1, (memory_cap - used) // size)
            part, rest = rest.cut(fitting)
            taken.append(part)
            used += len(part.source) * size
    if taken:
        yield taken


def flops(
    rows: int,
    columns: int,
    *,
    method: PolarMethod = "auto",
    coefficients: str | Coefficients | Sequence[Sequence[float]] = "auto",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> int:
    """Floating-point operations that `polar` spends on the products of one matrix, a multiply-add counted as two.

    Args:
        rows: m.
        columns: n.
        method: As for `polar`, but "svd".
        coefficients: As for `polar`.
        dtype: Of the products.
        device: Where they run.

    Returns:
        Operations as they are done: symmetric products that are computed by halves count as such. Elementwise work is
        not counted.

    Raises:
        ValueError: If the method is "svd", which has no count.
    """
    if method == "svd":
        raise ValueError("flops counts the polynomial methods, got method='svd'. Give 'newton-schulz', 'gram', 'auto'.")
    chosen, short, long = get_coefficients(coefficients, dtype), min(rows, columns), max(rows, columns)
    return choose(method, chosen, short, [(1, long)], dtype, torch.device(device)).flops(long)


def compute_dtype(x: Tensor, coefficients: str | Coefficients | Sequence[Sequence[float]] = "auto") -> torch.dtype:
    """Default type of the products: float64 for float64, on CUDA bfloat16 if the coefficients bear it, else float32.

    Args:
        x: The matrices.
        coefficients: As for `polar`.
    """
    if x.dtype == torch.float64:
        return torch.float64
    half = x.is_cuda and bears(get_coefficients(coefficients), torch.bfloat16)
    return torch.bfloat16 if half else torch.float32


def _check(x: Tensor, method: PolarMethod, memory_cap: int) -> None:
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


def _svd(job: Job) -> None:
    x = job.source
    eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
    finite = x.isfinite().all(dim=(-2, -1), keepdim=True)
    wide = torch.where(finite, x, 0.0).double()
    largest = wide.abs().amax(dim=(-2, -1), keepdim=True)
    u, s, vh = torch.linalg.svd(wide / torch.where(largest == 0, 1.0, largest), full_matrices=False)
    cutoff = s[..., :1] * max(8 * eps, max(x.shape[-2:]) * torch.finfo(s.dtype).eps)
    job.target.copy_(torch.where(finite, (u * (s > cutoff).unsqueeze(-2)) @ vh * job.times, torch.nan))
