"""Damped inverses and powers of second moments: symmetric positive semidefinite matrices that may be rank-deficient.

With K = V diag(λ) Vᵀ, what is computed is (K + γ I)^-p = V diag((λ + γ)^-p) Vᵀ. Where K + γ I is not positive definite
beyond the rounding of its largest eigenvalue, γ grows tenfold until it is; a matrix for which that does not help, such
as one with a NaN, is marked, and its neighbours in the batch are not touched.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from steepest.names import unknown_name

RidgeUnit = Literal["trace", "frobenius", "spectral"]
"""What a ridge is relative to: the mean, the root mean square or the largest of the eigenvalues."""

ATTEMPTS = 6  # a ridge up to 1e5 times the one that was asked for
# Eigenvalues up to this many eps ‖K + γ I‖_F drown in rounding. Cholesky factors often exist far below that, and their
# inverses are then wrong by any factor; above it they were within 3 %, and powers by eigenvalues within 40 %.
KNOWN = 8


class Damped(NamedTuple):
    """A batch of powers, and how they came about.

    Args:
        power: Symmetric, (B, n, n); a lower triangular factor from `damped_factor`; arbitrary where `ok` is False.
        ok: (B,), whether the matrix is what was asked for.
        raised: (B,), how often its ridge grew.
    """

    power: Tensor
    ok: Tensor
    raised: Tensor


def ridge_unit(moment: Tensor, unit: RidgeUnit = "trace") -> Tensor:
    """What a relative ridge is relative to: a size of K that equals c for K = c I.

    Args:
        moment: (B, n, n), symmetric.
        unit: Of the eigenvalues, "trace" is the mean tr(K) / n, "frobenius" the root mean square ‖K‖_F / √n, "spectral"
            the largest.

    Returns:
        (B,), units of the moment; not finite for a matrix that is not.

    Raises:
        ValueError: If the unit is unknown.
    """
    n = moment.size(-1)
    if unit == "trace":
        return (moment.diagonal(dim1=-2, dim2=-1) / n).sum(-1)
    if unit == "frobenius":
        largest = moment.abs().amax((-2, -1))  # divided out so that squares stay in range
        scale = torch.where(largest == 0, 1.0, largest)
        return scale * (torch.linalg.matrix_norm(moment / scale[:, None, None]) / n**0.5)
    if unit == "spectral":
        usable = _finite(moment)
        return torch.where(usable, torch.linalg.eigvalsh(_or_identity(moment, usable))[..., -1], torch.nan)
    raise ValueError(unknown_name("ridge unit", unit, get_args(RidgeUnit)))


def damped_inverse(moment: Tensor, ridge: Tensor, *, attempts: int = ATTEMPTS) -> Damped:
    """(K + γ I)^-1 by Cholesky factors.

    Args:
        moment: (B, n, n), symmetric, units of K.
        ridge: (B,), γ in the same units, at least 0. One that rounding swallows grows to the smallest that matters,
            then tenfold.
        attempts: How many ridges are tried.

    Returns:
        The inverses.
    """
    factor = damped_factor(moment, ridge, attempts=attempts)
    inverse = torch.cholesky_inverse(_or_identity(factor.power, factor.ok))  # which refuses a batch for one zero pivot
    return Damped(inverse, factor.ok & _finite(inverse), factor.raised)


def damped_factor(moment: Tensor, ridge: Tensor, *, attempts: int = ATTEMPTS) -> Damped:
    """Lower triangular L with L Lᵀ = K + γ I, for `torch.cholesky_solve`.

    Args:
        moment: As for `damped_inverse`.
        ridge: As for `damped_inverse`.
        attempts: As for `damped_inverse`.

    Returns:
        The factors in place of powers.
    """

    def cholesky(damped: Tensor) -> tuple[Tensor, Tensor]:
        factor, info = torch.linalg.cholesky_ex(damped)
        # The square of the smallest pivot is never below the smallest eigenvalue, and near it where that is tiny.
        return factor, torch.where(info == 0, factor.diagonal(dim1=-2, dim2=-1).amin(-1) ** 2, 0.0)

    return _escalating(moment, ridge, cholesky, attempts)


def damped_power(
    moment: Tensor, ridge: Tensor, exponent: float, *, attempts: int = ATTEMPTS, wide: bool = False
) -> Damped:
    """(K + γ I)^-p by eigenvalues; for p = 1 `damped_inverse` is faster and at least as exact.

    Args:
        moment: As for `damped_inverse`.
        ridge: As for `damped_inverse`.
        exponent: p, any real number.
        attempts: As for `damped_inverse`.
        wide: Whether eigenvalues are raised to it in float64: a processor's vectors and what is left over of them round
            float32 powers otherwise, so that a matrix' last bits depend on its place in the batch.

    Returns:
        The powers.
    """

    def power(damped: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(damped)
        above = torch.where(values > 0, values, 1.0)
        scaled = (above.double() ** -exponent).to(values.dtype) if wide else above**-exponent
        result = (vectors * scaled.unsqueeze(-2)) @ vectors.mT
        return (result + result.mT) / 2, values[..., 0]

    return _escalating(moment, ridge, power, attempts)


def diagonal_power(diagonal: Tensor, ridge: Tensor, exponent: float) -> Damped:
    """(diag(k) + γ I)^-p of diagonal matrices, as diagonals; each entry is exact by itself, so no ridge is raised.

    Args:
        diagonal: (B, n), k.
        ridge: (B,), γ, at least 0.
        exponent: p.

    Returns:
        Powers (B, n).
    """
    damped = diagonal + ridge.unsqueeze(-1)
    ok = (damped.isfinite() & (damped > 0)).all(-1) & (ridge >= 0)
    power = torch.where(ok.unsqueeze(-1), damped, 1.0) ** -exponent
    return Damped(power, ok & power.isfinite().all(-1), torch.zeros_like(ok, dtype=torch.int64))


def _escalating(
    moment: Tensor, ridge: Tensor, solve: Callable[[Tensor], tuple[Tensor, Tensor]], attempts: int
) -> Damped:
    """Try ever larger ridges for those matrices that need them; looking whether any does waits for the device.

    Args:
        moment: (B, n, n).
        ridge: (B,).
        solve: From K + γ I to the result and its smallest eigenvalue, or a stand-in for that.
        attempts: How many ridges are tried.

    Returns:
        The results.
    """
    usable = _finite(moment) & ridge.isfinite() & (ridge >= 0)
    ridge = torch.where(usable, ridge, 1.0)
    result, ok = _attempt(moment, ridge, solve)
    raised = torch.zeros_like(ok, dtype=torch.int64)
    least = 2 * _rounding(moment)
    for _ in range(attempts - 1):
        failed = usable & ~ok
        if not bool(failed.any()):
            break
        ridge = torch.where(failed, torch.maximum(10 * ridge, least), ridge)
        raised = raised + failed
        retried, now_ok = _attempt(moment[failed], ridge[failed], solve)
        result[failed], ok[failed] = retried, now_ok
    return Damped(result, ok & usable, raised)


def _attempt(moment: Tensor, ridge: Tensor, solve: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    damped = moment.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_(ridge.unsqueeze(-1))
    usable = _finite(damped)
    damped = _or_identity(damped, usable)
    result, smallest = solve(damped)
    return result, usable & (smallest > _rounding(damped)) & _finite(result)


def _rounding(moment: Tensor) -> Tensor:
    """The size below which an eigenvalue is not known, perhaps not even its sign."""
    return KNOWN * torch.finfo(moment.dtype).eps * moment.size(-1) ** 0.5 * ridge_unit(moment, "frobenius")


def _finite(matrices: Tensor) -> Tensor:
    return matrices.isfinite().all(-1).all(-1)


def _or_identity(moment: Tensor, usable: Tensor) -> Tensor:
    """The batch with some matrices replaced, because some solvers refuse a whole batch for one of them."""
    eye = torch.eye(moment.size(-1), dtype=moment.dtype, device=moment.device)
    return torch.where(usable[:, None, None], moment, eye)
