"""Symmetric matrices of which only the blocks on and above the diagonal are computed and kept.

A batch of symmetric m x m matrices is a tensor (p (p + 1) / 2, B, h, h): the blocks (0, 0), (0, 1), ..., (1, 1), ... of
a p x p grid, h = m / p, each a batch that a library multiplies at full speed. A product of two that commute is
symmetric again and takes (p + 1) / 2p of the operations of a whole product; with p = 1 it is a whole product.
"""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Products of smaller blocks run below the speed of larger ones, and eat up what they save (measured on CPUs with
# AVX-512: results/speed).
SMALLEST_BLOCK = {torch.float64: 128, torch.float32: 128, torch.bfloat16: 256, torch.float16: 256}
MOST_PARTS = 6


def parts_for(size: int, dtype: torch.dtype, device: torch.device) -> int:
    """Into how many rows of blocks matrices are divided; 1 on accelerators, where many small products do not pay.

    Args:
        size: m.
        dtype: Of the products.
        device: Where they run.
    """
    if device.type != "cpu":
        return 1
    return min(MOST_PARTS, max(1, size // SMALLEST_BLOCK[dtype]))


def work_share(parts: int) -> float:
    """Operations of a product in blocks, as a part of those of a whole product."""
    return (parts + 1) / (2 * parts)


def gram(xs: Sequence[Tensor], parts: int) -> Tensor:
    """X Xᵀ of all matrices of several batches, in one.

    Args:
        xs: (B, m, n) each, with one m, a multiple of `parts`; rows or columns contiguous.
        parts: p.

    Returns:
        Blocks.
    """
    places, size = _places(parts), xs[0].size(1) // parts
    blocks = xs[0].new_empty(len(places), sum(map(len, xs)), size, size)
    start = 0
    for x in xs:
        panels = x.unflatten(1, (parts, -1)).unbind(1)
        for block, (row, column) in zip(blocks[:, start : start + len(x)], places, strict=True):
            torch.bmm(panels[row], panels[column].mT, out=block)
        start += len(x)
    return blocks


def product(a: Tensor, b: Tensor, *, alpha: float = 1.0, plus: Tensor | None = None, beta: float = 1.0) -> Tensor:
    """alpha · A B + beta · C, for A and B that commute.

    Args:
        a: Blocks.
        b: Blocks.
        alpha: Factor of the product.
        plus: C, blocks; None for nothing.
        beta: Factor of C.

    Returns:
        Blocks.
    """
    parts = _parts(a)
    if parts == 1:
        first = torch.bmm(a[0], b[0]) if plus is None else torch.baddbmm(plus[0], a[0], b[0], beta=beta, alpha=alpha)
        return (first if plus is not None or alpha == 1 else first.mul_(alpha)).unsqueeze(0)
    places = _places(parts)
    out = torch.empty_like(a)
    for index, (row, column) in enumerate(places):
        target = out[index]
        for inner in range(parts):
            left, right = _block(a, row, inner), _block(b, inner, column)
            if inner:
                target.baddbmm_(left, right, alpha=alpha)
            elif plus is None:
                torch.baddbmm(target, left, right, beta=0, alpha=alpha, out=target)
            else:
                torch.baddbmm(plus[index], left, right, beta=beta, alpha=alpha, out=target)
    return out


def add_to_diagonal(a: Tensor, number: float) -> Tensor:
    """A + number · I, in place.

    Args:
        a: Blocks, written to.
        number: Any.
    """
    parts = _parts(a)
    for index in range(parts):
        a[_place(index, index, parts)].diagonal(dim1=-2, dim2=-1).add_(number)
    return a


def frobenius_norm(a: Tensor) -> Tensor:
    """Root of the sum of squares of all entries, in float32 or wider.

    Args:
        a: Blocks.

    Returns:
        (B,).
    """
    wide = torch.promote_types(a.dtype, torch.float32)
    of_block = torch.linalg.vector_norm(a, dim=(-2, -1), dtype=wide)  # (pairs, B)
    if len(a) == 1:
        return of_block[0]
    twice = [math.sqrt(1 + (row != column)) for row, column in _places(_parts(a))]  # what is below the diagonal
    return torch.linalg.vector_norm(of_block * of_block.new_tensor(twice).unsqueeze(-1), dim=0)


def whole(a: Tensor) -> Tensor:
    """All entries.

    Args:
        a: Blocks.

    Returns:
        (B, m, m); `a` itself if it is one block.
    """
    parts, size = _parts(a), a.size(-1)
    if parts == 1:
        return a[0]
    result = a.new_empty(a.size(1), parts * size, parts * size)
    for block, (row, column) in zip(a, _places(parts), strict=True):
        rows, columns = (slice(at * size, (at + 1) * size) for at in (row, column))
        result[:, rows, columns] = block
        if row != column:
            result[:, columns, rows] = block.mT
    return result


@functools.cache
def _places(parts: int) -> tuple[tuple[int, int], ...]:
    return tuple((row, column) for row in range(parts) for column in range(row, parts))


def _place(row: int, column: int, parts: int) -> int:
    return row * parts - row * (row - 1) // 2 + column - row


def _parts(a: Tensor) -> int:
    return math.isqrt(2 * a.size(0))


def _block(a: Tensor, row: int, column: int) -> Tensor:
    parts = _parts(a)
    if row <= column:
        return a[_place(row, column, parts)]
    return a[_place(column, row, parts)].mT
