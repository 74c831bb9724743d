"""The least time that the matrix products of a step can take on this machine, by any form known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from steepest.lab.bench.shapes import Shape, short_and_long


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
