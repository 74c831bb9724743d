"""How the polar factors of matrices with the same short side are computed: which form, in which way, in what memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steepest.linalg.coefficients import Coefficients, Normaliser
from steepest.linalg.iterations import Form, gram_form, newton_schulz, product_counts, segments
from steepest.linalg.products import OneByOne, Products, Together, X, products_for
from steepest.linalg.symmetric import work_share

# What a call for one of several long sides takes, in operations that could be done meanwhile: a few microseconds.
CALL = 10**6


@dataclass(frozen=True)
class Job:
    """Matrices, wide or square, and where their polar factors go.

    Args:
        source: (B, k, l), k <= l, any strides.
        target: Likewise, written to.
        times: Factor of the result.
    """

    source: Tensor
    target: Tensor
    times: float

    @classmethod
    def of(cls, x: Tensor, result: Tensor, times: float) -> Job:
        """Of tensors (*batch, m, n), by transposing tall ones; `result` is contiguous."""
        source, target = x.reshape(-1, *x.shape[-2:]), result.view(-1, *x.shape[-2:])
        tall = source.size(-2) > source.size(-1)
        return cls(source.mT, target.mT, times) if tall else cls(source, target, times)

    @property
    def rows(self) -> int:
        """k."""
        return self.source.size(-2)

    @property
    def columns(self) -> int:
        """l."""
        return self.source.size(-1)

    def cut(self, count: int) -> tuple[Job, Job]:
        """The first matrices, and the others."""
        return (
            Job(self.source[:count], self.target[:count], self.times),
            Job(self.source[count:], self.target[count:], self.times),
        )


@dataclass(frozen=True)
class Iteration:
    """How matrices with one short side are worked on.

    Args:
        form: Of the iteration.
        chosen: Its coefficients.
        rows: k, the short side.
        dtype: Of the products.
        products: How these are computed.
    """

    form: Form
    chosen: Coefficients
    rows: int
    dtype: torch.dtype
    products: OneByOne | Together

    def flops(self, columns: int) -> int:
        """Floating-point operations of the products of one matrix, a multiply-add counted as two, as they are done.

        Args:
            columns: l, the long side.
        """
        grams, applications, own = product_counts(self.form, self.chosen.steps, eps=self._eps)
        rows, share = self._padded, self.products.work_share
        product, cube = 2 * rows * rows * columns, 2 * rows**3
        return round(product * (grams * share + applications) + cube * own * share)

    @property
    def long_calls(self) -> int:
        """Products that are done for each long side by itself, where several are worked on together."""
        if isinstance(self.products, OneByOne):
            return 0
        return sum(product_counts(self.form, self.chosen.steps, eps=self._eps)[:2])

    def bytes_per_matrix(self, columns: int) -> int:
        """Of the temporaries.

        Args:
            columns: l, the long side.
        """
        # X and the next X; R, R², Z and what is between, of which the Gram form keeps two more; a whole Z
        kept = 5 if self.form == "gram" else 4
        squares = (kept * work_share(self._parts) + 1) * self._padded**2
        each = max(2 * self.dtype.itemsize, 4 + self.dtype.itemsize)  # X is brought to size in float32 or wider
        return round(each * self._padded * columns + squares * self.dtype.itemsize)

    def run(self, jobs: Sequence[Job]) -> None:
        """Compute polar factors.

        Args:
            jobs: All of the same k and type.
        """
        norm, products = self.chosen.norm, self.products
        if isinstance(products, OneByOne):
            for job in jobs:
                for source, target in zip(job.source, job.target, strict=True):
                    _copy(self._iterate(_sized(source, self.dtype, norm).contiguous(), products), target, job.times)
            return
        # nobody but the iteration holds what it starts from
        given = (_sized(_apart(job.source), self.dtype, norm) for job in jobs)
        found = self._iterate([self._padded_with_zeros(x) for x in given], products)
        for job, x in zip(jobs, found, strict=True):
            _copy(x[:, : self.rows], job.target, job.times)

    def _iterate(self, x: X, products: Products[X]) -> X:
        if self.form == "gram":
            return gram_form(x, self.chosen, segments(self.chosen.steps, self._eps), products)
        return newton_schulz(x, self.chosen, products)

    def _padded_with_zeros(self, x: Tensor) -> Tensor:
        missing = self._padded - self.rows
        return torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x

    @property
    def _eps(self) -> float:
        return torch.finfo(self.dtype).eps

    @property
    def _parts(self) -> int:
        return self.products.parts if isinstance(self.products, Together) else 1

    @property
    def _padded(self) -> int:
        """k with the rows of zeros that make blocks of one size; they stay zero in X, and do nothing."""
        return math.ceil(self.rows / self._parts) * self._parts


def choose(
    method: str,
    chosen: Coefficients,
    rows: int,
    columns: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    device: torch.device,
) -> Iteration:
    """The form asked for, or for "auto" the one with fewer operations, and with fewer calls for several shapes.

    Args:
        method: "auto" or a form.
        chosen: The coefficients.
        rows: k, the short side.
        columns: How many matrices have which long side.
        dtype: Of the products.
        device: Where they run.
    """
    products = products_for(rows, dtype, device)
    forms: tuple[Form, ...] = ("newton-schulz", "gram")
    found = [Iteration(form, chosen, rows, dtype, products) for form in forms if method in ("auto", form)]
    several = len(columns) > 1

    def price(one: Iteration) -> int:
        return sum(count * one.flops(long) + several * one.long_calls * CALL for count, long in columns)

    return min(found, key=price)


def _apart(x: Tensor) -> Tensor:
    """Matrices one after the other in memory: interleaved ones would be rounded in other ways than one alone."""
    if len(x) == 1 or x.stride(0) >= max(x.stride(1) * x.size(1), x.stride(2) * x.size(2)):
        return x
    return x.mT.contiguous().mT if x.stride(1) < x.stride(2) else x.contiguous()


def _sized(x: Tensor, dtype: torch.dtype, norm: Normaliser) -> Tensor:
    """Each matrix divided by its largest entry, so that products stay in range, or by its Frobenius norm if wanted."""
    wide = torch.promote_types(x.dtype, torch.float32)
    largest = x.abs().amax(dim=(-2, -1), keepdim=True).to(wide)  # several times as fast as a norm of order infinity
    x = x / torch.where(largest == 0, 1.0, largest)  # one over a subnormal number would be infinite
    if norm == "frobenius":
        size = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
        x.mul_(1 / torch.where(size == 0, 1.0, size))
    return x.to(dtype)


def _copy(result: Tensor, target: Tensor, times: float) -> None:
    if result.dtype == target.dtype and target.stride(-1) != 1:  # a plain transposed copy is the faster one
        target.mT.copy_((result if times == 1.0 else result.mul_(times)).mT)
    elif times == 1.0:
        target.copy_(result)
    elif result.dtype == target.dtype:
        torch.mul(result, times, out=target)
    else:
        target.copy_(result.to(torch.promote_types(target.dtype, torch.float32)).mul_(times))
