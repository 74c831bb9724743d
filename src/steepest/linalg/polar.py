"""Polar factor of a batch of matrices: tensors in, tensors out.

Notation: X = U diag(s) Vᵀ is the thin SVD; polar(X) = U Vᵀ over s > 0, the nearest (semi-)orthogonal matrix, and
-polar(G) is the steepest direction of <G, .> in the unit ball of the spectral norm. With k = min(m, n) and
l = max(m, n), all iterations work on the k side.
"""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from steepest.linalg.coefficients import Coefficients, Normaliser, get_coefficients
from steepest.linalg.iterations import Form, gram_form, newton_schulz, product_counts, segments
from steepest.linalg.products import OneByOne, Products, Together, full_precision, products_for
from steepest.linalg.symmetric import work_share
from steepest.names import unknown_name

PolarMethod = Literal["auto", "newton-schulz", "gram", "svd"]

# One chunk of a batch keeps its temporaries below this; larger batches are worked on chunk by chunk.
MEMORY_CAP = 256 * 2**20


@torch.no_grad()
def polar(
    x: Tensor,
    *,
    method: PolarMethod = "auto",
    coefficients: str | Coefficients | Sequence[Sequence[float]] = "auto",
    dtype: torch.dtype | None = None,
    memory_cap: int = MEMORY_CAP,
    times: float = 1.0,
    out: Tensor | None = None,
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
            Gram matrix. "auto" takes whichever of the two needs fewer operations for this shape.
        coefficients: For the two polynomial methods: a name, a `Coefficients`, or numbers; see `get_coefficients`.
        dtype: Type of the matrix products, whatever precision the process allows for its own. Default: float64 for
            float64 input, else bfloat16 on CUDA and float32 elsewhere.
        memory_cap: Bytes that temporaries may take; a batch beyond it is split, one matrix is never split.
        times: What the result is multiplied with.
        out: Takes the result; of the shape, dtype and device of `x`, which it may be itself. None: a new tensor.

    Returns:
        (*batch, m, n), unitless, dtype and device of `x`; `out`, if that was given.

    Raises:
        ValueError: If `x` has fewer than two dimensions, an option is not known, `memory_cap` is not positive,
            `out` does not fit, or the coefficients need products in a wider type.
        TypeError: If `x` is not real floating point.

    Source:
        Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/ (iteration); arXiv:2505.16932 (coefficients).
    """
    _check(x, method, memory_cap, out)
    products = dtype or compute_dtype(x)
    chosen = get_coefficients(coefficients, torch.float64 if method == "svd" else products)
    result = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    if x.numel() == 0:
        return result
    batch, results = x.reshape(-1, *x.shape[-2:]), result.view(-1, *x.shape[-2:])
    tall = batch.size(-2) > batch.size(-1)
    if tall:
        batch, results = batch.mT, results.mT
    if method == "svd":
        _svd_into(results, batch, times)
        return result
    iteration = Iteration.choose(method, chosen, batch.size(-2), batch.size(-1), products, device=x.device)
    with full_precision(x.device):
        chunk = max(1, memory_cap // iteration.bytes_per_matrix)
        for source, target in zip(batch.split(chunk), results.split(chunk), strict=True):
            iteration.run(source, target, times)
    return result


class Iteration:
    """How the matrices of one shape are worked on.

    Args:
        form: Of the iteration.
        chosen: Its coefficients.
        rows: k, the short side.
        columns: l, the long side.
        dtype: Of the products.
        products: How these are computed.
    """

    def __init__(
        self, form: Form, chosen: Coefficients, rows: int, columns: int, *, dtype: torch.dtype, products: Products
    ) -> None:
        self.form: Form = form
        self.chosen = chosen
        self.rows, self.columns = rows, columns
        self.dtype = dtype
        self.products = products
        self.parts = products.parts if isinstance(products, Together) else 1
        self.segments = segments(chosen.steps, torch.finfo(dtype).eps)

    @classmethod
    def choose(
        cls,
        method: PolarMethod,
        chosen: Coefficients,
        rows: int,
        columns: int,
        dtype: torch.dtype,
        *,
        device: torch.device,
    ) -> "Iteration":
        """The form asked for, or for "auto" the one with fewer operations.

        Args:
            method: Not "svd".
            chosen: The coefficients.
            rows: k, the short side.
            columns: l, the long side.
            dtype: Of the products.
            device: Where they run.
        """
        products = products_for(rows, dtype, device)
        forms: list[Form] = ["newton-schulz", "gram"]
        found = [cls(form, chosen, rows, columns, dtype=dtype, products=products) for form in forms]
        named = [one for one in found if method in ("auto", one.form)]
        return min(named, key=lambda one: one.flops)

    @property
    def flops(self) -> int:
        """Floating-point operations of the products of one matrix, a multiply-add counted as two, as they are done."""
        grams, applications, own = product_counts(self.form, self.chosen.steps, eps=torch.finfo(self.dtype).eps)
        rows = self._padded
        product, cube, share = 2 * rows * rows * self.columns, 2 * rows**3, work_share(self.parts)
        return round(product * (grams * share + applications) + cube * own * share)

    @property
    def bytes_per_matrix(self) -> int:
        """Of the temporaries."""
        # X and the next X; R, R², Z and what is between, of which the Gram form keeps two more; a whole Z
        kept = 5 if self.form == "gram" else 4
        entries = 2 * self._padded * self.columns + (kept * work_share(self.parts) + 1) * self._padded**2
        return round(entries * self.dtype.itemsize)

    @property
    def _padded(self) -> int:
        """k with the rows of zeros that make blocks of one size; they stay zero in X, and do nothing."""
        return math.ceil(self.rows / self.parts) * self.parts

    def run(self, source: Tensor, target: Tensor, times: float) -> None:
        """Compute polar factors.

        Args:
            source: (B, k, l).
            target: Likewise, written to; may be `source`.
            times: Factor of the result.
        """
        if isinstance(self.products, OneByOne):
            for x, result in zip(source, target, strict=True):
                _copy(self._iterate(_sized(x, self.dtype, self.chosen.norm).contiguous()), result, times)
            return
        x = _sized(source, self.dtype, self.chosen.norm)
        if self._padded > self.rows:
            x = torch.nn.functional.pad(x, (0, 0, 0, self._padded - self.rows))
        _copy(self._iterate(x)[:, : self.rows], target, times)

    def _iterate(self, x: Tensor) -> Tensor:
        if self.form == "gram":
            return gram_form(x, self.chosen, self.segments, self.products)
        return newton_schulz(x, self.chosen, self.products)


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
        raise ValueError("flops counts the polynomial methods, got method='svd'.")
    chosen, short, long = get_coefficients(coefficients, dtype), min(rows, columns), max(rows, columns)
    return Iteration.choose(method, chosen, short, long, dtype, device=torch.device(device)).flops


def compute_dtype(x: Tensor) -> torch.dtype:
    """Default type of the products: float64 for float64, else bfloat16 on CUDA and float32 elsewhere."""
    if x.dtype == torch.float64:
        return torch.float64
    return torch.bfloat16 if x.is_cuda else torch.float32


def _check(x: Tensor, method: PolarMethod, memory_cap: int, out: Tensor | None) -> None:
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
    if out is not None and (out.shape, out.dtype, out.device) != (x.shape, x.dtype, x.device):
        raise ValueError(
            f"polar takes out like x, {x.dtype} of shape {tuple(x.shape)} on {x.device}, got {out.dtype} of shape "
            f"{tuple(out.shape)} on {out.device}."
        )


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _sized(x: Tensor, dtype: torch.dtype, norm: Normaliser) -> Tensor:
    """Each matrix divided by its largest entry, so that products stay in range, or by its Frobenius norm if wanted."""
    largest = x.abs().amax(dim=(-2, -1), keepdim=True).to(_wide(x))  # several times as fast as a norm of order infinity
    x = x * (1 / torch.where(largest == 0, 1.0, largest))
    if norm == "frobenius":
        size = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
        x.mul_(1 / torch.where(size == 0, 1.0, size))
    return x.to(dtype)


def _copy(result: Tensor, target: Tensor, times: float) -> None:
    if times == 1.0 or result.dtype != target.dtype:
        target.copy_(result if times == 1.0 else result.float().mul_(times))
    else:
        torch.mul(result, times, out=target)


def _svd_into(target: Tensor, x: Tensor, times: float) -> None:
    eps = torch.finfo(_wide(x)).eps
    finite = x.isfinite().all(dim=(-2, -1), keepdim=True)
    wide = torch.where(finite, x, 0.0).double()
    largest = wide.abs().amax(dim=(-2, -1), keepdim=True)
    u, s, vh = torch.linalg.svd(wide / torch.where(largest == 0, 1.0, largest), full_matrices=False)
    cutoff = s[..., :1] * max(8 * eps, max(x.shape[-2:]) * torch.finfo(s.dtype).eps)
    target.copy_(torch.where(finite, (u * (s > cutoff).unsqueeze(-2)) @ vh * times, torch.nan))
