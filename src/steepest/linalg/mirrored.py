"""Symmetric products by a kernel that computes one triangle and mirrors it: half of the operations of a whole product.

Nothing here comes with this library, and nothing is imported but on CUDA in half precision. A kernel that is found is
tried against `torch.matmul` first, with every number of rows, and not trusted again once it was wrong.
"""

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steepest.notices import warn

# kernel(A, B, C=C, alpha=alpha, beta=beta) is alpha · A B + beta · C for (B, k, l), (B, l, k) and (B, k, k), all of it,
# symmetric in exact arithmetic.
Kernel = Callable[..., Tensor]
NAME = "gemm_symmetric"
# torch's own copy, where a version of it has one, then the package quack-kernels.
MODULES = ("torch._vendor.quack.gemm_interface", "quack.gemm_interface")
SMALLEST = 256  # rows: a tile is no smaller, and of one tile nothing is saved
ALIGNED = 8  # entries of half precision in the 16 bytes that rows begin at
_TRIAL = 2, 320  # matrices and columns


@dataclass(frozen=True)
class Source:
    """A kernel, and where it is from."""

    module: str
    kernel: Kernel


def kernel_for(rows: int, dtype: torch.dtype, device: torch.device) -> Kernel | None:
    """What multiplies matrices with so many rows by halves; None: `torch.matmul` goes on.

    Args:
        rows: k.
        dtype: Of the products.
        device: Where they run; only on CUDA is anything looked for.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or rows < SMALLEST or rows % ALIGNED:
        return None
    trusted = (module for module in MODULES if module not in _refused)
    return next((one.kernel for module in trusted if (one := _tried(module, rows, dtype, device))), None)


def takes(x: Tensor) -> bool:
    """Whether a kernel can read a batch of matrices.

    Args:
        x: (B, k, l).
    """
    lines = x if x.stride(-1) == 1 else x.mT
    aligned = lines.size(-1) % ALIGNED == 0 and all(step % ALIGNED == 0 for step in lines.stride()[:-1])
    return lines.stride(-1) == 1 and aligned and x.data_ptr() % 16 == 0 and x.size(-1) % ALIGNED == 0


def gram(xs: Sequence[Tensor], kernel: Kernel) -> Tensor:
    """X Xᵀ of all matrices of several batches.

    Args:
        xs: (B, k, l) each, with one k.
        kernel: For those that it takes.

    Returns:
        (B, k, k).
    """
    found = [kernel(x, x.mT) if takes(x) else torch.bmm(x, x.mT) for x in xs]
    return found[0] if len(found) == 1 else torch.cat(found)


def product(a: Tensor, b: Tensor, kernel: Kernel, *, alpha: float, plus: Tensor | None, beta: float) -> Tensor:
    """alpha · A B + beta · C, for A and B that commute, so that it is symmetric.

    Args:
        a: (B, k, k), contiguous.
        b: Likewise.
        kernel: How.
        alpha: Factor of the product.
        plus: C, likewise; None for nothing.
        beta: Factor of C.
    """
    return kernel(a, b, C=plus, alpha=float(alpha), beta=float(beta) if plus is not None else 1.0)


@functools.cache
def _tried(module: str, rows: int, dtype: torch.dtype, device: torch.device) -> Source | None:
    """A kernel that is there, and right with so many rows."""
    if (source := _imported(module)) is None:
        return None
    try:
        wrong = _deviation(source.kernel, rows, dtype, device)
    except Exception as failure:  # noqa: BLE001 - whatever it raises, products go on without it
        wrong = f"it failed, {type(failure).__name__}: {next(iter(str(failure).splitlines()), '')}"
    if wrong is None:
        return source
    _refused.add(module)
    warn(
        f"{module}.{NAME} is not used: with {rows} rows in {dtype}, {wrong}. torch.matmul goes on in its place. "
        "Install another version of it, or take it out."
    )
    return None


_refused: set[str] = set()


@functools.cache
def _imported(module: str) -> Source | None:
    """A kernel by its module; None if that, or what it needs, is not installed."""
    try:
        found: Any = importlib.import_module(module)
    except ImportError:
        return None
    kernel = getattr(found, NAME, None)
    return None if kernel is None else Source(module, kernel)


def _deviation(kernel: Kernel, rows: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """How a kernel differs from products in float32 that are rounded once; None if it does not.

    Two calls: a Gram matrix, and a square of one with another added, as iterations need them.
    """
    count, columns = _TRIAL
    generator = torch.Generator(device="cpu").manual_seed(0)
    x = torch.randn(count, rows, columns, generator=generator, device="cpu") / columns**0.5
    x = x.to(device, dtype)
    first = torch.bmm(x.float(), x.float().mT)
    square = first.to(dtype)
    wide = square.float()
    calls = {
        "X Xᵀ": (kernel(x, x.mT), first),
        "α R R + β R": (
            product(square, square, kernel, alpha=0.5, plus=square, beta=2.0),
            0.5 * torch.bmm(wide, wide) + 2.0 * wide,
        ),
    }
    eps = torch.finfo(dtype).eps
    for what, (found, exact) in calls.items():
        if found.shape != exact.shape or found.dtype != dtype:
            return f"{what} has shape {tuple(found.shape)} and type {found.dtype}"
        scale = float(exact.square().mean().sqrt())
        if not torch.allclose(found.float(), exact, rtol=2 * eps, atol=2 * eps * scale):
            off = float((found.float() - exact).abs().max())
            return f"{what} is up to {off:.3g} off where entries are {scale:.3g} in the mean"
    return None
