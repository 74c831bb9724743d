"""The few operations that polar iterations consist of, in the ways in which a machine does them fastest.

`Together` works on a batch at once, symmetric matrices in blocks of which only half are computed; on CUDA `Mirrored`
has a kernel for that, if one is installed. `OneByOne` works on one matrix with oneDNN's products, which on CPUs with
AVX-512 run float32 at up to twice the speed of torch.matmul's, and keeps it in the cache. All do the same in another
order of sums.
"""

import functools
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from steepest.linalg import mirrored, symmetric

X = TypeVar("X")
# Below, a call takes longer than a batched product takes per matrix.
SMALLEST_ONE_BY_ONE = 160


class Products(Protocol[X]):
    """Operations on X, one matrix or many with the same number of rows, and on symmetric matrices that commute."""

    def gram(self, x: X) -> Tensor:
        """X Xᵀ."""
        ...

    def product(
        self, a: Tensor, b: Tensor, *, alpha: float = 1.0, plus: Tensor | None = None, beta: float = 1.0
    ) -> Tensor:
        """alpha · A B + beta · C; C is `plus`, None for nothing."""
        ...

    def apply(self, a: Tensor, x: X, *, plus: float = 0.0) -> X:
        """(A + plus · I) X."""
        ...

    def add_to_diagonal(self, a: Tensor, number: float) -> Tensor:
        """A + number · I, in place."""
        ...

    def frobenius_norm(self, a: Tensor) -> Tensor:
        """Root of the sum of squares, in float32 or wider."""
        ...

    def multiply(self, a: Tensor, numbers: Tensor) -> Tensor:
        """A times the number of each matrix, in place."""
        ...


@dataclass(frozen=True)
class Together:
    """Batches (B, k, l) with one k; symmetric matrices are those of all batches, in blocks, see `symmetric`.

    Args:
        parts: Rows of blocks; k is a multiple.
    """

    parts: int

    @property
    def work_share(self) -> float:
        """Operations of a product of symmetric matrices, as a part of those of a whole product."""
        return symmetric.work_share(self.parts)

    def gram(self, x: Sequence[Tensor]) -> Tensor:
        """X Xᵀ."""
        return symmetric.gram(x, self.parts)

    def product(
        self, a: Tensor, b: Tensor, *, alpha: float = 1.0, plus: Tensor | None = None, beta: float = 1.0
    ) -> Tensor:
        """alpha · A B + beta · C."""
        return symmetric.product(a, b, alpha=alpha, plus=plus, beta=beta)

    def apply(self, a: Tensor, x: Sequence[Tensor], *, plus: float = 0.0) -> Sequence[Tensor]:
        """(A + plus · I) X, laid out in memory as X is: products of transposed results would each be copied."""
        factors = symmetric.whole(a).split([len(one) for one in x])
        return [
            torch.baddbmm(one.mT, one.mT, factor, beta=plus).mT
            if one.stride(-1) != 1
            else torch.baddbmm(one, factor, one, beta=plus)
            for factor, one in zip(factors, x, strict=True)
        ]

    def add_to_diagonal(self, a: Tensor, number: float) -> Tensor:
        """A + number · I, in place."""
        return symmetric.add_to_diagonal(a, number)

    def frobenius_norm(self, a: Tensor) -> Tensor:
        """(B,)."""
        return symmetric.frobenius_norm(a)

    def multiply(self, a: Tensor, numbers: Tensor) -> Tensor:
        """Each matrix times its number, in place."""
        return a.mul_(numbers.view(1, -1, 1, 1))


@dataclass(frozen=True)
class Mirrored(Together):
    """Batches (B, k, l) with one k; symmetric matrices are whole, made by a kernel that computes one half of them.

    Args:
        parts: 1.
        kernel: See `mirrored`.
    """

    kernel: mirrored.Kernel

    @property
    def work_share(self) -> float:
        """One half."""
        return 0.5

    def gram(self, x: Sequence[Tensor]) -> Tensor:
        """X Xᵀ."""
        return mirrored.gram(x, self.kernel).unsqueeze(0)

    def product(
        self, a: Tensor, b: Tensor, *, alpha: float = 1.0, plus: Tensor | None = None, beta: float = 1.0
    ) -> Tensor:
        """alpha · A B + beta · C."""
        other = None if plus is None else plus[0]
        return mirrored.product(a[0], b[0], self.kernel, alpha=alpha, plus=other, beta=beta).unsqueeze(0)


@dataclass(frozen=True)
class OneByOne:
    """One matrix (k, l), contiguous, float32 on a CPU."""

    @property
    def work_share(self) -> float:
        """A product is whole."""
        return 1.0

    def gram(self, x: Tensor) -> Tensor:
        """X Xᵀ."""
        return _onednn(x, x)

    def product(
        self, a: Tensor, b: Tensor, *, alpha: float = 1.0, plus: Tensor | None = None, beta: float = 1.0
    ) -> Tensor:
        """alpha · A B + beta · C."""
        result = _onednn(a, b)  # b is symmetric
        if alpha != 1:
            result.mul_(alpha)
        return result if plus is None else result.add_(plus, alpha=beta)

    def apply(self, a: Tensor, x: Tensor, *, plus: float = 0.0) -> Tensor:
        """(A + plus · I) X."""
        result = _onednn(a, x.mT)
        return result.add_(x, alpha=plus) if plus else result

    def add_to_diagonal(self, a: Tensor, number: float) -> Tensor:
        """A + number · I, in place."""
        a.diagonal().add_(number)
        return a

    def frobenius_norm(self, a: Tensor) -> Tensor:
        """0-d."""
        flat = a.view(-1)
        return torch.dot(flat, flat).sqrt()

    def multiply(self, a: Tensor, numbers: Tensor) -> Tensor:
        """A times the number, in place."""
        return a.mul_(numbers)


def products_for(rows: int, dtype: torch.dtype, device: torch.device) -> OneByOne | Together:
    """The faster way for matrices of a size: a rule, not a measurement, so that a run repeats bit by bit.

    Args:
        rows: k, the short side.
        dtype: Of the products.
        device: Where they run.
    """
    if device.type == "cpu" and dtype == torch.float32 and rows >= SMALLEST_ONE_BY_ONE and has_onednn():
        return OneByOne()
    if (kernel := mirrored.kernel_for(rows, dtype, device)) is not None:
        return Mirrored(1, kernel)
    return Together(symmetric.parts_for(rows, dtype, device))


@functools.cache
def has_onednn() -> bool:
    """Whether oneDNN's float32 product is here, is expected to be fast, and agrees with torch.matmul."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return False
    generator = torch.Generator(device="cpu").manual_seed(0)
    a, b = (torch.randn(size, 192, generator=generator, device="cpu") for size in (160, 224))
    try:
        found = _onednn(a, b)
    except (AttributeError, RuntimeError, TypeError):  # a build of torch without it, or with another signature
        return False
    return found.shape == (160, 224) and torch.allclose(found.double(), a.double() @ b.double().mT, rtol=0, atol=1e-3)


def _onednn(a: Tensor, b: Tensor) -> Tensor:
    """A Bᵀ, for A with contiguous rows and B with contiguous rows or columns."""
    return torch.ops.mkldnn._linear_pointwise.default(a, b, None, "none", [], "")


@contextmanager
def full_precision(device: torch.device) -> Generator[None]:
    """float32 products in float32, whatever the process allows for its own, autocast included: precision is an option.

    Args:
        device: Where the products run.
    """
    # torch's stubs do not know all of these
    backends: Any = torch.backends
    backend, parent = (
        (backends.cuda.matmul, backends) if device.type == "cuda" else (backends.mkldnn.matmul, backends.mkldnn)
    )
    allowed: str = backend.fp32_precision
    if allowed != "ieee":
        backend.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type if torch.amp.is_autocast_available(device.type) else "cpu", enabled=False):
            yield
    finally:  # what was inherited is inherited again; what was set to the same as its parent looks no different
        if allowed != "ieee":
            backend.fp32_precision = "none" if allowed in ("none", parent.fp32_precision) else allowed
