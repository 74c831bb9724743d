"""Norms that are functions of the singular values, other than the largest one; see `norm` for the notation.

They need a singular value decomposition and are there to compare with: the spectral norm is what trains fast.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from steepest.checks import check_fields, number
from steepest.geometry.norm import Printed, svd_work

__all__ = ["Nuclear", "Schatten"]


def _thin_svd(m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD in float32 or wider; matrices with an entry that is not finite give NaN instead of an error."""
    wide = m.to(torch.promote_types(m.dtype, torch.float32))
    finite = wide.isfinite().all(dim=(-2, -1), keepdim=True)
    u, s, vh = torch.linalg.svd(torch.where(finite, wide, 0.0), full_matrices=False)
    return u, torch.where(finite.squeeze(-1), s, torch.nan), vh


def _length(s: Tensor, order: float) -> Tensor:
    """‖s‖_order over the last dimension, kept; by way of the largest entry so that powers stay in range."""
    largest = s.amax(dim=-1, keepdim=True) if s.numel() else s.new_zeros(*s.shape[:-1], 1)
    return largest * torch.linalg.vector_norm(s / torch.where(largest == 0, 1.0, largest), order, dim=-1, keepdim=True)


@dataclass(frozen=True, eq=False)
class Nuclear(Printed):
    """Sum of singular values: lmo = -u vᵀ of the largest one, a step of rank one.

    Source:
        The dual of the spectral norm; Frank-Wolfe's step for low-rank matrices (Jaggi, ICML 2013).
    """

    name: ClassVar[str] = "nuclear"
    adapts = False
    matrix = True

    def work(self, fan_out: int, fan_in: int) -> float:
        """Operations of a singular value decomposition."""
        return svd_work(fan_out, fan_in)

    def primal(self, w: Tensor, /, m: Tensor | None = None, v: Tensor | None = None) -> Tensor:
        """Sum of singular values."""
        return torch.linalg.matrix_norm(w, ord="nuc")

    def dual(self, m: Tensor, /, v: Tensor | None = None) -> Tensor:
        """Largest singular value; 0 for a matrix without entries."""
        return torch.linalg.matrix_norm(m, ord=2) if m.numel() else m.new_zeros(m.shape[:-2])

    def lmo(self, m: Tensor, /, v: Tensor | None = None) -> Tensor:
        """-u vᵀ; 0 for a zero matrix."""
        if m.numel() == 0:
            return m.clone()
        u, s, vh = _thin_svd(m)
        some = s[..., :1] / torch.where(s[..., :1] == 0, 1.0, s[..., :1])  # 1, or 0 for a zero matrix
        return (-some.unsqueeze(-1) * u[..., :, :1] @ vh[..., :1, :]).to(m.dtype)


@dataclass(frozen=True, eq=False)
class Schatten(Printed):
    """p-norm of the singular values, between the nuclear (p = 1) and the spectral norm (p = ∞).

    With 1/p + 1/q = 1: dual = ‖σ‖_q, lmo = -U diag(σ^(q-1)) Vᵀ / ‖σ‖_q^(q-1). p = 2 is the Frobenius norm.

    Args:
        p: Above 1 and finite; use `Nuclear` and `Spectral` at the ends.

    Raises:
        ValueError: If `p` is not.
        TypeError: If it is no number.
    """

    p: float = 2.0
    name: ClassVar[str] = "schatten"
    adapts = False
    matrix = True

    def __post_init__(self) -> None:
        try:
            check_fields(self, {"p": number(1.0, above=True)})
        except ValueError as error:
            raise ValueError(f"{error} At the ends are Nuclear() and Spectral().") from error

    @property
    def q(self) -> float:
        """The conjugate exponent p / (p - 1)."""
        return self.p / (self.p - 1)

    def work(self, fan_out: int, fan_in: int) -> float:
        """Operations of a singular value decomposition."""
        return svd_work(fan_out, fan_in)

    def primal(self, w: Tensor, /, m: Tensor | None = None, v: Tensor | None = None) -> Tensor:
        """‖σ‖_p."""
        return _length(_thin_svd(w)[1], self.p).squeeze(-1).to(w.dtype)

    def dual(self, m: Tensor, /, v: Tensor | None = None) -> Tensor:
        """‖σ‖_q."""
        return _length(_thin_svd(m)[1], self.q).squeeze(-1).to(m.dtype)

    def lmo(self, m: Tensor, /, v: Tensor | None = None) -> Tensor:
        """-U diag(σ^(q-1)) Vᵀ / ‖σ‖_q^(q-1), by way of σ / ‖σ‖_q; 0 for a zero matrix."""
        u, s, vh = _thin_svd(m)
        norm = _length(s, self.q)
        weights = (s / torch.where(norm == 0, 1.0, norm)) ** (self.q - 1)
        return (-(u * weights.unsqueeze(-2)) @ vh).to(m.dtype)
