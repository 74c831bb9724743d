"""Powers of Shampoo's factors before the direction is sought (arXiv:1802.09568), for the lmo of any norm of matrices.

With L and R moving averages of G Gᵀ and Gᵀ G,

    L <- β L + (1-β) G Gᵀ,    R <- β R + (1-β) Gᵀ G,    D = lmo((L + γ I)^-p M (R + δ I)^-p).

Shampoo moves by the product itself, with p = 1/4; PMuon takes the polar factor of it, with p = 0.3. Or, split in two
halves, with T(M) = (L + γ I)^-p/2 M (R + δ I)^-p/2, a map that is its own transpose,

    D = T(lmo(T(M))),    <M, D> = <T(M), lmo(T(M))> = -dual(T(M)),

the direction of steepest descent in the norm of (L + γ I)^p/2 W (R + δ I)^p/2, scaled to the Frobenius norm of what the
lmo found. The ridges γ and δ are relative to the means of the eigenvalues, and grow where rounding hides the smallest.

L of few gradients is far from what it comes to, and of low rank. After t of them their mean eigenvalue is that of L
over 1 - βᵗ; an average that had begun with `prior` times that, in all directions, would be

    L + prior βᵗ / (1-βᵗ) (mean eigenvalue of L) I,

which takes the place of L, likewise for R.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steepest.anatomy import Load, PlanRow
from steepest.checks import check_fields, flag, number, whole
from steepest.linalg import damped_power
from steepest.stages.factors import SIDES, Factored, between
from steepest.stages.stage import Stage


@dataclass(frozen=True)
class ShampooPowers(Stage):
    """The average is multiplied with powers of both moments of gradients before the lmo.

    Without `split` a direction may go up along the average: such a matrix does not move in that step, and
    `diagnostics()["climbing_directions"]` counts it. It has norm one, so that weight decay keeps weights in a ball;
    with `split` it has not. Momo, regularised descent and product norms take the dual norm with the direction that is
    applied.

    A state of another exponent, or of whole powers, is gone on with: each of its powers counts until its next turn.

    It keeps 2 (m² + n²) numbers for a matrix of m x n, in float32 or wider, and renews its powers with some multiple of
    m³ + n³ operations, by eigenvalues; c blocks take 1/c of the numbers of their side and 1/c² of the operations. On
    several ranks all of that goes to the matrix' owner and back in each step.

    Args:
        exponent: p, in [0, 1].
        beta: β, weight of the old L and R, in [0, 1).
        every: Steps from one renewal of a parameter's powers to the next; parameters take turns.
        ridge: γ and δ, relative to the means of the eigenvalues.
        block_size: A longer side is cut into the fewest equal blocks of at most that, each with a power of its own.
        split: Whether half of the power stands before the lmo and half after it.
        prior: What L and R begin with, at least 0, in units of the mean eigenvalues of G Gᵀ and Gᵀ G; it fades as they
            fill.

    Raises:
        ValueError: If a number is out of range.
        TypeError: If one is of the wrong type.

    Source:
        Gupta, Koren and Singer, arXiv:1802.09568: the factors. PMuon, with p = 0.3:
        https://github.com/KellerJordan/modded-nanogpt, records/track_3_optimization. Averages, ridges and halves are
        ours.
    """

    exponent: float = 0.3
    beta: float = 0.95
    every: int = 10
    ridge: float = 1e-3
    block_size: int = 8192
    split: bool = False
    prior: float = 0.0

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

    def renewed(self, moments: Tensor, means: Tensor, counts: Tensor, old: Tensor, *, first: bool) -> Tensor:
        """Powers; the old ones where there are none."""
        del old, first
        ridge, wide = self.options.ridge * means, moments.device.type != "mps"
        if self.options.prior and self.options.beta:
            ages = counts * math.log(self.options.beta)
            ridge = ridge + self.options.prior * ages.exp() / -torch.expm1(ages) * means
        exponent = self.options.exponent / 2 if self.options.split else self.options.exponent
        found = damped_power(moments, ridge, exponent, wide=wide)
        return torch.where(found.ok[:, None, None], found.power, torch.nan)

    def before(
        self, load: Load, batches: tuple[Tensor, ...], states: Sequence[dict[str, Tensor]]
    ) -> tuple[Tensor, ...]:
        """(L + γ I)^-p M (R + δ I)^-p, or the first half of it.

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
    "split": flag,
    "prior": number(),
}
