"""How fast this machine multiplies matrices of the shapes in question."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from steepest.lab.bench.shapes import Shape, short_and_long
from steepest.lab.bench.timing import clocked
from steepest.linalg.products import has_onednn

MOST_BYTES = 64 * 2**20  # of the long operand
PUBLIC = ("bmm", "mm")
FASTEST = (*PUBLIC, "onednn")


def product_flops(rows: int, columns: int) -> int:
    """Of an m x m by m x n product, a multiply-add counted as two."""
    return 2 * rows * rows * columns


def gemm_works(
    shapes: Sequence[Shape], dtypes: Sequence[torch.dtype], *, device: str, seed: int
) -> dict[str, Callable[[], float]]:
    """Products (B, m, m) @ (B, m, n) of all distinct sides, at once and one by one, to be timed in turns.

    For float32 on a CPU where it is to be had, also one by one with oneDNN's product, which torch has no public name
    for.

    Args:
        shapes: Of the parameters; B is how many share their sides, as far as they fit into `MOST_BYTES`.
        dtypes: Of the products.
        device: Where.
        seed: Of the operands.

    Returns:
        By `key`: multiply, and return the seconds per product.
    """
    works: dict[str, Callable[[], float]] = {}
    generator = torch.Generator(device="cpu").manual_seed(seed)
    for (rows, columns), count in Counter(map(short_and_long, shapes)).items():
        for dtype in dtypes:
            size = max(1, min(count, MOST_BYTES // (rows * columns * dtype.itemsize)))
            left, right = (
                torch.randn(size, rows, side, generator=generator, device="cpu").to(device, dtype)
                for side in (rows, columns)
            )
            works[key("bmm", rows, columns, dtype)] = _together(left, right, device)
            works[key("mm", rows, columns, dtype)] = _one_by_one(torch.mm, left, right, device)
            if dtype == torch.float32 and device == "cpu" and has_onednn():
                works[key("onednn", rows, columns, dtype)] = _one_by_one(_onednn, left, right, device)
    return works


def key(form: str, rows: int, columns: int, dtype: torch.dtype) -> str:
    """Name of one measurement."""
    return f"{form} {rows}x{columns} {str(dtype).removeprefix('torch.')}"


def rates(
    times: Mapping[str, Sequence[float]],
    shapes: Sequence[Shape],
    dtype: torch.dtype,
    *,
    forms: Sequence[str] = PUBLIC,
) -> dict[tuple[int, int], float]:
    """Operations per second by sides: of the fastest form, in the median of its rounds.

    Args:
        times: Seconds per product, by `key`.
        shapes: Of the parameters.
        dtype: Of the products.
        forms: Which count, as far as they were measured.
    """
    found: dict[tuple[int, int], float] = {}
    for rows, columns in dict.fromkeys(map(short_and_long, shapes)):
        measured = [times[name] for form in forms if (name := key(form, rows, columns, dtype)) in times]
        found[rows, columns] = product_flops(rows, columns) / min(map(statistics.median, measured))
    return found


def _together(left: Tensor, right: Tensor, device: str) -> Callable[[], float]:
    return lambda: clocked(lambda: torch.bmm(left, right), device=device) / len(left)


def _one_by_one(
    product: Callable[[Tensor, Tensor], Tensor], left: Tensor, right: Tensor, device: str
) -> Callable[[], float]:
    pairs = list(zip(left, right, strict=True))

    def multiply() -> None:
        for one, other in pairs:
            product(one, other)

    return lambda: clocked(multiply, device=device) / len(left)


def _onednn(left: Tensor, right: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(left, right.mT, None, "none", [], "")
