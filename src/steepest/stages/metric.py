"""A diagonal metric on rows and columns, as IsoMuon has it: directions are shorter where gradients are noisy.

With positive vectors b (rows) and a (columns), B = diag(b), A = diag(a), the norm ‖B^½ W A^½‖ has the direction

    D = B^-½ lmo(B^-½ M A^-½) A^-½,    <M, D> = -dual(B^-½ M A^-½),

whatever the norm in the middle: <M, B^-½ O A^-½> = <B^-½ M A^-½, O>. The vectors come of the noise of the gradients g
around the average m that a direction is sought for. With v a moving average, column by column, of the mean over rows of
(g - m)∘(g - m), and r = (v / mean(v))^p cut off at the bounds,

    v <- β v + (1-β) mean over rows of (g - m)∘(g - m),     a = r / mean(r),

likewise for rows. D is scaled to the Frobenius norm of what the lmo found.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from steepest.anatomy import Load, PlanRow
from steepest.checks import check_fields, choice, flag, number, pair, refusal
from steepest.ranks import scalar_type
from steepest.stages.sizes import bounded, of_size
from steepest.stages.stage import Entry, Stage

Sides = Literal["both", "rows", "columns"]
Source = Literal["noise", "gradients"]

ROUNDING = 32  # units in the last place of a gradient that are no noise
METRIC_ROWS, METRIC_COLUMNS = "metric_rows", "metric_columns"
# Of each side: the dimension of a batch that it averages over, and what belongs to a matrix m x n.
SIDES: Mapping[str, tuple[int, Callable[[int, int], tuple[int, ...]]]] = {
    METRIC_ROWS: (-1, lambda m, n: (m,)),
    METRIC_COLUMNS: (-2, lambda m, n: (n,)),
}


def weights_of(average: Tensor, exponent: float, bounds: tuple[float, float]) -> Tensor:
    """The diagonal of a metric: powers of variances relative to their mean, cut off, with a mean of one.

    Args:
        average: (B, k), at least 0: of squares.
        exponent: p.
        bounds: Least and largest power, before the mean is divided out.

    Returns:
        (B, k), above 0; ones for a matrix of which nothing is known.
    """
    mean = average.mean(-1, keepdim=True)
    known = mean > 0
    ratios = (average / torch.where(known, mean, 1.0)).to(scalar_type(average.device))  # wide: the same in any batch
    powers = ratios.pow(exponent).to(average.dtype).clamp(*bounds)
    powers = torch.where(known, powers, 1.0)
    return powers / powers.mean(-1, keepdim=True)


def noise(gradient: Tensor, average: Tensor) -> Tensor:
    """What a gradient differs by from the average that holds it; zero where that is nothing but rounding.

    Args:
        gradient: (B, m, n).
        average: Likewise; the first one is the gradient itself.

    Returns:
        Likewise.
    """
    difference = gradient - average
    return torch.where(difference.abs() <= ROUNDING * torch.finfo(gradient.dtype).eps * gradient.abs(), 0.0, difference)


@dataclass(frozen=True)
class DiagonalMetric(Stage):
    """Steepest descent in the norm ‖B^½ W A^½‖, with diagonals of the noise of gradients in rows and columns.

    Directions do not leave the norm's ball much, but they do: weight decay keeps weights in none. Momo, regularised
    descent and product norms take the dual norm with the direction that is applied. Layers' inputs may tell of the
    columns instead: `sides="rows"` beside `InputMoment(structure="diagonal", exponents=(0.25, 0.25))`.

    Args:
        sides: Which diagonals there are; the other is the identity.
        source: "noise": squares of what the gradient differs by from the average that a direction is sought for;
            "gradients": of the gradient itself.
        exponent: p, at least 0, of variances; 1/2 makes the metric a standard deviation.
        bounds: Two numbers, the first in (0, 1], the second at least 1: where powers are cut off.
        beta2: β, weight of the old average, in [0, 1).
        keep_size: Whether a direction has the Frobenius norm of what the norm's lmo found.

    Raises:
        ValueError: If a number is out of range, or a name unknown.
        TypeError: If one is of the wrong type.

    Source:
        IsoMuon, of https://github.com/KellerJordan/modded-nanogpt, records/track_3_optimization: p = 1/2, bounds 1/2
        and 2. Size and average are ours.
    """

    sides: Sides = "both"
    source: Source = "noise"
    exponent: float = 0.5
    bounds: tuple[float, float] = (0.5, 2.0)
    beta2: float = 0.95
    keep_size: bool = True

    prefix = "metric_"
    kept = "variances of rows and columns"
    option = "stages=[DiagonalMetric()]"

    def __post_init__(self) -> None:
        check_fields(self, _CHECKS)
        if not 0 < self.bounds[0] <= 1 <= self.bounds[1]:
            raise ValueError(refusal("DiagonalMetric: bounds", _BOUNDS, self.bounds, " (0.5, 2.0) is IsoMuon's."))

    @property
    def linear(self) -> bool:
        """Yes: what directions are multiplied with does not depend on them."""
        return True

    @property
    def replays(self) -> bool:
        """Yes."""
        return True

    @property
    def _keys(self) -> tuple[str, ...]:
        keys = {"both": (METRIC_ROWS, METRIC_COLUMNS), "rows": (METRIC_ROWS,), "columns": (METRIC_COLUMNS,)}
        return keys[self.sides]

    def entries(self, row: PlanRow) -> Sequence[Entry]:
        """v: one number for each row and each column of each matrix, block after block.

        Args:
            row: Of the plan, with a view.
        """
        sizes = {key: sum(count * shape(m, n)[0] for count, m, n in row.blocks()) for key, (_, shape) in SIDES.items()}
        return tuple(Entry(key, torch.Size((sizes[key],)), least=0.0) for key in self._keys)

    def observe(
        self,
        load: Load,
        gradients: tuple[Tensor, ...],
        averages: tuple[Tensor, ...],
        states: Sequence[dict[str, Tensor]],
        accept: Tensor | None,
    ) -> None:
        """Average the squares.

        Args:
            load: Whose gradients these are.
            gradients: (B, m, n) each.
            averages: Likewise.
            states: With v; written to.
            accept: A 0-d boolean; where it is False, v does not change. None means True.
        """
        looked = gradients if self.source == "gradients" else map(noise, gradients, averages)
        squares = [bounded(one).square() for one in looked]
        for key in self._keys:
            new = load.rows_of_parameters([square.mean(SIDES[key][0]) for square in squares])
            for state, own in zip(states, new, strict=True):
                moved = torch.lerp(own, state[key], self.beta2)
                state[key].copy_(moved if accept is None else torch.where(accept, moved, state[key]))

    def before(
        self, load: Load, batches: tuple[Tensor, ...], states: Sequence[dict[str, Tensor]]
    ) -> tuple[Tensor, ...]:
        """B^-½ M A^-½.

        Args:
            load: Whose averages these are.
            batches: (B, m, n) each.
            states: With v.

        Returns:
            Likewise.
        """
        for key in self._keys:
            dimension, shape = SIDES[key]
            variances = load.parts_of_batches([state[key] for state in states], shape)
            batches = tuple(
                batch * weights_of(own, self.exponent, self.bounds).rsqrt().unsqueeze(dimension)
                for batch, own in zip(batches, variances, strict=True)
            )
        return batches

    def after(
        self, load: Load, directions: tuple[Tensor, ...], states: Sequence[dict[str, Tensor]], accept: Tensor | None
    ) -> tuple[Tensor, ...]:
        """B^-½ D A^-½, of the Frobenius norm of D.

        Args:
            load: Whose directions these are.
            directions: (B, m, n) each.
            states: With v.
            accept: Nothing changes.

        Returns:
            Likewise.
        """
        del accept
        found = self.before(load, directions, states)
        return tuple(map(of_size, found, directions)) if self.keep_size else found


_BOUNDS = "two numbers, the first in (0, 1], the second at least 1"
_CHECKS: Mapping[str, Any] = {
    "sides": choice(get_args(Sides)),
    "source": choice(get_args(Source)),
    "exponent": number(),
    "bounds": pair(number(above=True), _BOUNDS),
    "beta2": number(high=1.0),
    "keep_size": flag,
}
