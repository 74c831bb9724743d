"""Damped inverses of second moments from matrix products alone, for devices where those are fast and Cholesky is not.

With A = α (K + γ I), whose eigenvalues lie in [ε, 1], the residual R = I - A X of an approximate inverse X is made
small by polynomials q(R) = a + b R + c R². From X = I:

    X <- X q(R),    R <- I - (I - R) q(R).

That keeps R = I - A X: if it holds before a step, then I - R = A X, so that after it I - A X q(R) = I - (I - R) q(R).
All these matrices are polynomials in A: symmetric, commuting, and each eigenvalue x of A has its own scalar iteration.
Then (K + γ I)^-1 ≈ α X, and X, whose eigenvalues (1 - r) / x are positive while |r| < 1, keeps every step a descent.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from steepest.linalg.spd import Damped, ridge_unit

Triple = tuple[float, float, float]

# A multiple of eps by which the bound on the largest eigenvalue is enlarged: rounding must not push one beyond 1, where
# these polynomials grow fast.
SLACK = 4


@dataclass(frozen=True)
class InversePlan:
    """Polynomials that invert every x in [smallest, 1] up to a relative error.

    Args:
        smallest: ε, the smallest eigenvalue of A that the plan was made for.
        residual: Bound on |1 - x X(x)| over [smallest, 1], a thousandth for rounding included.
        steps: (a, b, c) of each q.

    Raises:
        ValueError: If the bound does not hold, or an eigenvalue in [-1, 0) could pass for one that was inverted.
    """

    smallest: float
    residual: float
    steps: tuple[Triple, ...]

    def __post_init__(self) -> None:
        largest = float(self(torch.linspace(self.smallest, 1, 4001, dtype=torch.float64, device="cpu")).abs().max())
        if not 0 < self.smallest < 1 or not largest <= self.residual < 1:
            raise ValueError(
                "InversePlan takes smallest in (0, 1) and a residual below 1 that its steps keep on [smallest, 1]; got "
                f"smallest={self.smallest}, residual={self.residual}, and steps that leave {largest:.4g}. Raise "
                "smallest or residual, or add steps."
            )
        if bool((self(torch.linspace(-1, -1e-6, 4001, dtype=torch.float64, device="cpu")) < 1).any()):
            raise ValueError(
                f"InversePlan got steps that invert some negative eigenvalues as if they were positive: {self.steps}. "
                "Choose q(r) = a + b r + c r² that are positive for r in [1, 2]."
            )

    def __call__(self, x: Tensor) -> Tensor:
        """The residual that is left of eigenvalues.

        Args:
            x: Any shape, eigenvalues of A.

        Returns:
            1 - x X(x), the shape of `x`.
        """
        r = 1 - x
        for a, b, c in self.steps:
            r = 1 - (1 - r) * (a + r * (b + r * c))
        return r


# Table 5 of arXiv:2604.01472, those rows of which every step is printed; cheapest first: 7, 8 and 8 products, to which
# the check adds one. The largest residuals they leave are 0.0075, 0.0071 and 0.0461, a thousandth below those stated.
PLANS = (
    InversePlan(0.025, 0.0085, ((1.679044, -10.844625, 23.373926), (1.301562, 1.301562, 0), (1, 1.073878, 1.073878))),
    InversePlan(0.012, 0.0081, ((1.828900, -13.257429, 27.420730), (1, 2.072900, 2.072900), (1, 1.071558, 1.071558))),
    InversePlan(0.006, 0.0471, ((1.915935, -14.653845, 29.754543), (1, 2.716205, 2.716205), (1, 1.262596, 1.262596))),
)


def polynomial_inverse(
    moment: Tensor, ridge: Tensor, *, plan: InversePlan | None = None, dtype: torch.dtype | None = None
) -> Damped:
    """(K + γ I)^-1 by matrix products, where the ridge is large enough that a plan is certified.

    With a bound L on the largest eigenvalue of K, the smaller of ‖K‖_F and the largest row sum of |K|, and
    α = 1 / (L + γ), all eigenvalues of α (K + γ I) lie in [α γ, 1]; a plan is certified if it starts at α γ or below.
    At a ridge of 0.2 of the mean eigenvalue that takes L up to 33 mean eigenvalues. Where no plan is certified, `ok` is
    False and `damped_inverse` is to be used.

    Args:
        moment: (B, n, n), symmetric, positive semidefinite, units of K. Where K + γ I is not positive definite, `ok` is
            False.
        ridge: (B,), γ in the same units; it is never raised.
        plan: Polynomials. Default: for each matrix the cheapest of `PLANS` that is certified.
        dtype: Type of the products. Default: that of `moment`. In bfloat16 the error grows, because X has eigenvalues
            up to 1 / smallest.

    Returns:
        The inverses X, with ‖I - (K + γ I) X‖₂ at most `plan.residual` in exact arithmetic, and 0.001 more in float32;
        in bfloat16 it was up to 0.17, 0.34 and 0.70 more for the three plans, about 0.004 / smallest.

    Source:
        arXiv:2604.01472, appendix B.3.
    """
    compute = dtype or moment.dtype
    rows = moment.abs().sum(-1).amax(-1)
    bound = torch.minimum(moment.size(-1) ** 0.5 * ridge_unit(moment, "frobenius"), rows)
    eps = max(torch.finfo(compute).eps, torch.finfo(moment.dtype).eps)
    alpha = 1 / ((1 + SLACK * eps) * (bound + ridge))
    power = torch.zeros_like(moment)
    ok = torch.zeros_like(ridge, dtype=torch.bool)
    waiting = ~ok  # shares that are not a number compare as False
    for candidate in PLANS if plan is None else (plan,):
        chosen = waiting & (alpha * ridge >= candidate.smallest)
        waiting = waiting & ~chosen
        if bool(chosen.any()):
            scale = alpha[chosen, None, None]
            scaled = scale * moment[chosen]
            scaled.diagonal(dim1=-2, dim2=-1).add_((alpha * ridge)[chosen, None])
            inverse, inverted = _iterate(scaled.to(compute), candidate)
            power[chosen] = scale * inverse.to(moment.dtype)
            ok[chosen] = inverted
    return Damped(power, ok & power.isfinite().all(-1).all(-1), torch.zeros_like(ok, dtype=torch.int64))


def _iterate(scaled: Tensor, plan: InversePlan) -> tuple[Tensor, Tensor]:
    """X for A, and whether all eigenvalues of its residual were below one: those of an x <= 0 are not."""
    residual = _plus(-scaled, 1.0)
    inverse = torch.eye(scaled.size(-1), dtype=scaled.dtype, device=scaled.device).expand_as(scaled)
    for index, (a, b, c) in enumerate(plan.steps):
        factor = b * residual if c == 0 else torch.baddbmm(residual, residual, residual, beta=b, alpha=c)
        factor = _plus(factor, a)
        inverse = inverse @ factor if index else factor
        residual = _plus(torch.baddbmm(factor, residual, factor, beta=-1), 1.0)
    # ‖R‖₂² <= ‖R²‖_F <= √n ‖R‖₂²: never below one for an x <= 0, always where a plan is certified, for n up to 10^5.
    return (inverse + inverse.mT) / 2, torch.linalg.matrix_norm(residual @ residual) < 1


def _plus(matrices: Tensor, number: float) -> Tensor:
    """Add a multiple of the identity to matrices that nobody else uses."""
    matrices.diagonal(dim1=-2, dim2=-1).add_(number)
    return matrices
