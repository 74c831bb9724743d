"""The least time that the matrix products of a step can take on this machine, by any form known.

Operations of the form that needs the fewest, at the rate at which this machine multiplies matrices of these shapes.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steepest.lab.bench.shapes import Shape, short_and_long
from steepest.lab.runs.device import clocked
from steepest.linalg.products import has_onednn

MOST_BYTES = 64 * 2**20  # of the long operand
PUBLIC = ("bmm", "mm")
FASTEST = (*PUBLIC, "onednn")


@dataclass(frozen=True)
class Form:
    """A way to the polar factor of an m x n matrix, m <= n, at `long` m² n + `cube` m³ operations.

    A full m x m by m x n product is 2 m² n. A product known to be symmetric is counted at half: nobody needs more.
    """

    name: str
    long: int
    cube: int

    def flops(self, rows: int, columns: int) -> int:
        """Operations for one matrix, whose short side is `rows`."""
        return self.long * rows**2 * columns + self.cube * rows**3


# A quintic on X: the Gram matrix m² n, its square m³, the product with X 2 m² n. A degree-nine step adds m³.
# A Gram form goes to m x m matrices once per start: Gram matrix and last product 3 m² n; the rest is m³.
# Sources: Jordan et al., 2024 (standard); arXiv:2512.04632 (four quintics); Dao et al. (Gram form).
FORMS = (
    Form("standard, 5 quintics", 15, 5),
    Form("standard, 4 quintics", 12, 4),
    Form("Gram, 5 quintics, one restart", 6, 14),
    Form("Gram, 5 quintics", 3, 17),
    Form("Gram, 4 quintics, one restart", 6, 10),
    Form("Gram, 4 quintics", 3, 13),
    Form("standard, 3 of degree nine", 9, 6),
    Form("Gram, 3 of degree nine", 3, 12),
)


@dataclass(frozen=True)
class Floor:
    """`seconds` for `flops`, with each matrix in the form in which it needs the fewest, named by sides."""

    seconds: float
    flops: int
    forms: Mapping[str, str]


def least(rows: int, columns: int) -> Form:
    """The form with the fewest operations for one matrix; of equals, the first."""
    return min(FORMS, key=lambda form: form.flops(rows, columns))


def find_floor(shapes: Sequence[Shape], rates: Mapping[tuple[int, int], float]) -> Floor:
    """Least operations of each matrix, at the rate at which products of its sides were measured.

    Args:
        shapes: Of all parameters.
        rates: Operations per second by (short, long) side.

    Returns:
        The floor of one step; nothing but matrix products is in it.
    """
    seconds, flops, forms = 0.0, 0, dict[str, str]()
    for (rows, columns), count in Counter(map(short_and_long, shapes)).items():
        form = least(rows, columns)
        own = count * form.flops(rows, columns)
        flops += own
        seconds += own / rates[rows, columns]
        forms[f"{rows}x{columns}"] = form.name
    return Floor(seconds, flops, forms)


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
