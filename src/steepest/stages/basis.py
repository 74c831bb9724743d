"""SOAP's basis before the direction is sought (arXiv:2409.11321), for the lmo of any norm of matrices.

With L and R moving averages of G Gᵀ and Gᵀ G, and Q_r and Q_c orthogonal matrices near their eigenvectors, a gradient
is Q_rᵀ G Q_c in their basis, where V is a moving average of its squares, entry by entry:

    L <- β L + (1-β) G Gᵀ,    R <- β R + (1-β) Gᵀ G,    V <- β₂ V + (1-β₂) (Q_rᵀ G Q_c)²,
    X = Q_r [Q_rᵀ M Q_c / (√V + ε)] Q_cᵀ,               D = lmo(X),

V divided by the sum of its weights. SOAP moves by X itself, Adam's step in that basis. Or, split in two halves, with
T(M) = Q_r [Q_rᵀ M Q_c / (√V + ε)^½] Q_cᵀ, a map that is its own transpose,

    D = T(lmo(T(M))),    <M, D> = <T(M), lmo(T(M))> = -dual(T(M)),

the direction of steepest descent in the norm of Q_r [(√V + ε)^½ ∘ Q_rᵀ W Q_c] Q_cᵀ, scaled to the Frobenius norm of
what the lmo found. Where √V is nothing but rounding of the products, at most 64 √max(m, n) units in the last place of
its root mean square, so is the average, and X is zero there; if all of V is zero, X is M.

The bases of a parameter are made in its first step and then in its turns, by the eigenvectors of L or by one step of
the orthogonal iteration, the factor Q of a QR decomposition of (L + γ I) Q_r. V stays what it is in the basis before.
A gradient has often less than full rank, and what an eigensolver finds in the null space of L is rounding. So that
steps do not depend on it, the basis there is that of fixed vectors, taken one after the other; γ, 10⁻⁴ of the mean
eigenvalue, keeps it in the iteration. In a matrix' first step V is a diagonal, but for what
float32 leaves beside it: X, whose polar factor would be that of M then, is only near it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from steepest.anatomy import Load, PlanRow
from steepest.checks import check_fields, choice, flag, number, whole
from steepest.linalg import ridge_unit
from steepest.ranks import scalar_type
from steepest.stages.factors import SIDES, Factored, between, transposed
from steepest.stages.metric import ROUNDING
from steepest.stages.stage import Entry, Stage

BasisMethod = Literal["qr", "eigh"]

SQUARE = "basis_square"
RIDGE = 1e-4  # γ, relative to the mean eigenvalue
BLUR = 64  # units in the last place, times the root of the length, that products are off
GOLDEN = math.pi * (3 - math.sqrt(5))  # an angle no multiple of which comes near a whole turn


@dataclass(frozen=True)
class Eigenbasis(Stage):
    """The average is divided by the root mean square of gradients, entry by entry in SOAP's basis, before the lmo.

    Without `split` a direction may go up along the average: such a matrix does not move in that step, and
    `diagnostics()["climbing_directions"]` counts it. It has norm one, so that weight decay keeps weights in a ball;
    with `split` it has not. Momo, regularised descent and product norms take the dual norm with the direction that is
    applied.

    It keeps 2 (m² + n²) + m n numbers for a matrix of m x n, in float32 or wider, and renews its bases with some
    multiple of m³ + n³ operations; c blocks take 1/c of the numbers of their side and 1/c² of the operations. On
    several ranks all of that goes to the matrix' owner and back in each step.

    Args:
        beta: β, weight of the old L and R, in [0, 1).
        beta2: β₂, weight of the old V, in [0, 1).
        every: Steps from one renewal of a parameter's bases to the next; parameters take turns.
        method: "qr": one step of the orthogonal iteration; "eigh": eigenvectors, as the first bases always are.
        eps: ε, in units of the gradients' entries, at least 0.
        block_size: A longer side is cut into the fewest equal blocks of at most that, each with a basis of its own.
        split: Whether half of the power stands before the lmo and half after it.

    Raises:
        ValueError: If a number is out of range, or a name unknown.
        TypeError: If one is of the wrong type.

    Source:
        Vyas et al., arXiv:2409.11321, Algorithm 3: L, R, the QR step, V in the basis. The lmo after it:
        https://github.com/KellerJordan/modded-nanogpt, records/track_3_optimization. The halves are ours.
    """

    beta: float = 0.95
    beta2: float = 0.95
    every: int = 10
    method: BasisMethod = "qr"
    eps: float = 1e-8
    block_size: int = 8192
    split: bool = False

    prefix = "basis_"
    kept = "moments of gradients and their eigenvectors"
    option = "stages=[Eigenbasis()]"

    def __post_init__(self) -> None:
        check_fields(self, _CHECKS)

    def attach(self, rows: Sequence[PlanRow]) -> Stage:
        """Begin to work for one optimizer.

        Args:
            rows: Of the plan: the trainable matrices.

        Returns:
            What knows whose turn it is.
        """
        return Eigenbases(self, rows)


class Eigenbases(Factored):
    """Keeps bases, and the squares of gradients in them, for one optimizer."""

    prefix = Eigenbasis.prefix
    kept = Eigenbasis.kept
    option = Eigenbasis.option
    made = "vectors"
    options: Eigenbasis

    def entries(self, row: PlanRow) -> Sequence[Entry]:
        """Moments, bases, counts and V, which is laid out like the parameter.

        Args:
            row: Of the plan, with a view.
        """
        return (*super().entries(row), Entry(SQUARE, least=0.0))

    def renewed(self, moments: Tensor, means: Tensor, counts: Tensor, old: Tensor, *, first: bool) -> Tensor:
        """Orthogonal matrices near the eigenvectors, those of the largest eigenvalues first."""
        del means, counts
        if first or self.options.method == "eigh":
            return eigenvectors(moments)
        moments.diagonal(dim1=-2, dim2=-1).add_(RIDGE * ridge_unit(moments).unsqueeze(-1))
        return torch.linalg.qr(wide(moments) @ wide(old))[0].to(moments.dtype)

    def look(
        self, load: Load, gradients: Sequence[Tensor], states: Sequence[dict[str, Tensor]], accept: Tensor | None
    ) -> None:
        """Average the squares of gradients in the bases."""
        q, p = (self.made_of(load, states, side) for side in SIDES)
        old = load.matrices([state[SQUARE] for state in states])
        found = zip(between(gradients, transposed(q), p), old, strict=True)
        new = [torch.lerp(own.square(), square, self.options.beta2) for own, square in found]
        self.write(states, SQUARE, load.parameter_shaped(new), accept)

    def before(
        self, load: Load, batches: tuple[Tensor, ...], states: Sequence[dict[str, Tensor]]
    ) -> tuple[Tensor, ...]:
        """X, or the first half of it.

        Args:
            load: Whose averages these are.
            batches: (B, m, n) each.
            states: Of the parameters.

        Returns:
            Likewise.
        """
        counts = load.numbers_of_batches([state[self.count] for state in states])
        beta2 = self.options.beta2
        masses = -torch.expm1(counts * math.log(beta2)) if beta2 else torch.ones_like(counts)
        masses = torch.where(masses == 0, 1.0, masses).split(load.counts)
        squares = load.matrices([state[SQUARE] for state in states])
        q, p = (self.made_of(load, states, side) for side in SIDES)
        inside = [
            batch * self._scales(square / mass.view(-1, 1, 1))
            for batch, square, mass in zip(between(batches, transposed(q), p), squares, masses, strict=True)
        ]
        return between(inside, q, transposed(p))

    def _scales(self, square: Tensor) -> Tensor:
        """1 / (√V + ε), or the root of it; 0 where V is nothing but rounding."""
        root, mean = square.sqrt(), square.mean((-2, -1), keepdim=True).sqrt()
        known = root > BLUR * max(root.shape[-2:]) ** 0.5 * torch.finfo(root.dtype).eps * mean
        scale = torch.where(known, root + self.options.eps, 1.0).reciprocal()
        scale = torch.where(known | (mean == 0), scale, 0.0)
        return scale.sqrt() if self.options.split else scale


def eigenvectors(moments: Tensor) -> Tensor:
    """Eigenvectors, those of the largest eigenvalues first; in the null space those that are nearest to fixed vectors.

    Args:
        moments: (B, k, k), symmetric and positive semidefinite.

    Returns:
        (B, k, k), orthogonal.
    """
    values, vectors = torch.linalg.eigh(wide(moments))
    values, vectors = values.flip(-1), vectors.flip(-1)
    size = values.size(-1)
    none = values <= ROUNDING * size * torch.finfo(moments.dtype).eps * values[..., :1]
    # As good as random, and the same everywhere: on the CPU, since not all devices have float64.
    places = torch.arange(1, size + 1, dtype=torch.float64, device="cpu")
    fixed = torch.outer(places, GOLDEN * places).cos().to(values.device, values.dtype)
    return torch.linalg.qr(torch.where(none.unsqueeze(-2), fixed, vectors))[0].to(moments.dtype)


def wide(matrices: Tensor) -> Tensor:
    """In float64, if the device has it: last bits then do not depend on where in memory a library finds a matrix.

    Args:
        matrices: Any shape.
    """
    return matrices.to(scalar_type(matrices.device))


_CHECKS: Mapping[str, Any] = {
    "beta": number(high=1.0),
    "beta2": number(high=1.0),
    "every": whole(1),
    "method": choice(get_args(BasisMethod)),
    "eps": number(),
    "block_size": whole(1),
    "split": flag,
}
