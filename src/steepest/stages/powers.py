"""Powers of Shampoo's factors before the direction is sought (arXiv:1802.09568), for the lmo of any norm of matrices.

With L and R moving averages of G Gᵀ and Gᵀ G,

    L <- β L + (1-β) G Gᵀ,    R <- β R + (1-β) Gᵀ G,    D = lmo((L + γ I)^-p M (R + δ I)^-p).

Shampoo moves by the product itself, with p = 1/4; PMuon takes the polar factor of it, with p = 0.3. The ridges γ and δ
are relative to the means of the eigenvalues, and grow where rounding hides the smallest.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steepest.anatomy import Load, PlanRow
from steepest.checks import check_fields, number, whole
from steepest.linalg import damped_power
from steepest.stages.factors import SIDES, Factored, between
from steepest.stages.stage import Stage


@dataclass(frozen=True)
class ShampooPowers(Stage):
    """The average is multiplied with powers of both moments of gradients before the lmo.

    A direction may go up along the average: such a matrix does not move in that step, and
    `diagnostics()["climbing_directions"]` counts it. It has norm one, so that weight decay keeps weights in a ball.
    Momo, regularised descent and product norms take the dual norm with the direction that is applied.

    It keeps 2 (m² + n²) numbers for a matrix of m x n, in float32 or wider, and renews its powers with some multiple of
    m³ + n³ operations, by eigenvalues; c blocks take 1/c of the numbers of their side and 1/c² of the operations. On
    several ranks all of that goes to the matrix' owner and back in each step.

    Args:
        exponent: p, in [0, 1].
        beta: β, weight of the old L and R, in [0, 1).
        every: Steps from one renewal of a parameter's powers to the next; parameters take turns.
        ridge: γ and δ, relative to the means of the eigenvalues.
        block_size: A longer side is cut into the fewest equal blocks of at most that, each with a power of its own.

    Raises:
        ValueError: If a number is out of range.
        TypeError: If one is of the wrong type.

    Source:
        Gupta, Koren and Singer, arXiv:1802.09568: the factors. PMuon, with p = 0.3:
        https://github.com/KellerJordan/modded-nanogpt, records/track_3_optimization. Averages and ridges are ours.
    """

    exponent: float = 0.3
    beta: float = 0.95
    every: int = 10
    ridge: float = 1e-3
    block_size: int = 8192

    prefix = "powers_"
    kept = "moments of gradients and their powers"
    option = "stages=[ShampooPowers()]"

    def __post_init__(self) -> None:
        check_fields(self, _CHECKS)

    def attach(self, rows: Sequence[PlanRow]) -> Stage:
        """Begin to work for one optimizer.

        Args:
            rows: Of the plan: the trainable matrices.

        Returns:
            What knows whose turn it is.
        """
        return Powers(self, rows)


class Powers(Factored):
    """Keeps powers of moments, for one optimizer."""

    prefix = ShampooPowers.prefix
    kept = ShampooPowers.kept
    option = ShampooPowers.option
    made = "power"
    options: ShampooPowers

    @property
    def keeps_ball(self) -> bool:
        """Yes: directions stay what they are."""
        return True

    @property
    def may_climb(self) -> bool:
        """Yes."""
        return True

    def renewed(self, moments: Tensor, means: Tensor, old: Tensor, *, first: bool) -> Tensor:
        """Powers; the old ones where there are none."""
        del old, first
        ridge, wide = self.options.ridge * means, moments.device.type != "mps"
        found = damped_power(moments, ridge, self.options.exponent, wide=wide)
        return torch.where(found.ok[:, None, None], found.power, torch.nan)

    def before(
        self, load: Load, batches: tuple[Tensor, ...], states: Sequence[dict[str, Tensor]]
    ) -> tuple[Tensor, ...]:
        """(L + γ I)^-p M (R + δ I)^-p.

        Args:
            load: Whose averages these are.
            batches: (B, m, n) each.
            states: Of the parameters.

        Returns:
            Likewise.
        """
        return between(batches, *(self.made_of(load, states, side) for side in SIDES))


_CHECKS: Mapping[str, Any] = {
    "exponent": number(high=1.0, up_to=True),
    "beta": number(high=1.0),
    "every": whole(1),
    "ridge": number(),
    "block_size": whole(1),
}
