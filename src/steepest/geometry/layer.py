"""Norms on the weight of one layer.

Notation: W and M are batches of matrices (*batch, m, n), M in loss per weight unit; <M, W> is the sum of elementwise
products of one matrix. For each norm
    lmo(M)  = argmin over ‖D‖ <= 1 of <M, D>: a step *adds* the learning rate times it,
    dual(M) = max over ‖W‖ <= 1 of <M, W> = -<M, lmo(M)>.
A vector is a 1 x n matrix. Norms that adapt take the second moment V of the gradient, shaped like M.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import ClassVar, Protocol, cast

import torch
from torch import Tensor

from steepest.geometry.scale import ScaleRule, scale_factor
from steepest.linalg import Coefficients, PolarMethod, get_coefficients, polar
from steepest.names import unknown_name

MATRIX = (-2, -1)


class Norm(Protocol):
    """A norm on weights, and what steepest descent needs of it.

    Contract, for every M != 0: dual(M) = -<M, lmo(M)>, primal(lmo(M)) = 1, and <M, W> <= dual(M) · primal(W) for all W;
    lmo(0) = 0; nothing is written to the arguments.


    Attributes:
        adapts: Whether the norm needs the second moment V. Otherwise V is ignored and may be None.
        matrix: Whether the norm sees a linear map, so that fan-out, fan-in and fused parts matter.
    """

    adapts: ClassVar[bool]
    matrix: ClassVar[bool]

    def primal(self, w: Tensor, /, m: Tensor | None = None, v: Tensor | None = None) -> Tensor:
        """Norm of W: (*batch, m, n) to (*batch,), in weight units."""
        ...

    def dual(self, m: Tensor, /, v: Tensor | None = None) -> Tensor:
        """Dual norm of M: (*batch, m, n) to (*batch,), in units of the loss per unit of the norm."""
        ...

    def lmo(self, m: Tensor, /, v: Tensor | None = None) -> Tensor:
        """Steepest direction for M: the shape and dtype of M, of norm one."""
        ...


class _Printed:
    """A norm prints as its name and the options that are not the default, for plans and tables."""

    def __str__(self) -> str:
        changed = [
            f"{option.name}={getattr(self, option.name)}"
            for option in fields(self)  # pyright: ignore[reportArgumentType] - subclasses are dataclasses
            if getattr(self, option.name) != option.default
        ]
        name = next((name for name, kind in NORMS.items() if kind is type(self)), type(self).__name__)
        return " ".join([name, *changed])


@dataclass(frozen=True)
class Spectral(_Printed):
    """Largest singular value, divided by a scale s that depends on the shape: ‖W‖ = σ_max(W) / s, lmo = -s U Vᵀ.

    Args:
        scale: The rule for s; see `scale_factor`.
        polar: How U Vᵀ is computed; see `polar`. The contract holds as closely as this is exact.
        coefficients: For the polynomial methods; see `get_coefficients`.
        dtype: Type of the matrix products; None chooses by device.

    Raises:
        ValueError: If an option is not known.
        TypeError: If `dtype` is not a floating-point type.

    Source:
        Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/; Bernstein and Newhouse, arXiv:2409.20325.
    """

    scale: ScaleRule = "original"
    polar: PolarMethod = "auto"
    coefficients: str | Coefficients | Sequence[Sequence[float]] = "polar_express"
    dtype: torch.dtype | None = None
    adapts: ClassVar[bool] = False
    matrix: ClassVar[bool] = True

    def __post_init__(self) -> None:
        scale_factor(self.scale, 1, 1)
        get_coefficients(self.coefficients)
        polar(torch.zeros(0, 1, 1), method=self.polar)
        if self.dtype not in (None, torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise TypeError(f"Spectral takes a dtype such as torch.float32, or None, got dtype={self.dtype!r}.")

    def primal(self, w: Tensor, /, m: Tensor | None = None, v: Tensor | None = None) -> Tensor:
        """σ_max(W) / s, by a singular value decomposition."""
        return torch.linalg.matrix_norm(w, ord=2) / scale_factor(self.scale, *w.shape[-2:])

    def dual(self, m: Tensor, /, v: Tensor | None = None) -> Tensor:
        """s times the sum of singular values, by a singular value decomposition."""
        return torch.linalg.matrix_norm(m, ord="nuc") * scale_factor(self.scale, *m.shape[-2:])

    def lmo(self, m: Tensor, /, v: Tensor | None = None) -> Tensor:
        """-s U Vᵀ."""
        factor = polar(m, method=self.polar, coefficients=self.coefficients, dtype=self.dtype)
        return factor.mul_(-scale_factor(self.scale, *m.shape[-2:]))


@dataclass(frozen=True)
class Frobenius(_Printed):
    """Root of the sum of squares: lmo = -M / ‖M‖, normalised gradient descent."""

    adapts: ClassVar[bool] = False
    matrix: ClassVar[bool] = False

    def primal(self, w: Tensor, /, m: Tensor | None = None, v: Tensor | None = None) -> Tensor:
        """‖W‖_F."""
        return torch.linalg.vector_norm(w, dim=MATRIX)

    def dual(self, m: Tensor, /, v: Tensor | None = None) -> Tensor:
        """‖M‖_F: the norm is its own dual."""
        return torch.linalg.vector_norm(m, dim=MATRIX)

    def lmo(self, m: Tensor, /, v: Tensor | None = None) -> Tensor:
        """-M / ‖M‖_F, by way of the largest entry so that squares stay in range."""
        largest = m.abs().amax(dim=MATRIX, keepdim=True) if m.numel() else m.new_zeros(*m.shape[:-2], 1, 1)
        m = m / torch.where(largest == 0, 1.0, largest)
        norm = torch.linalg.vector_norm(m, dim=MATRIX, keepdim=True)
        return m / -torch.where(norm == 0, 1.0, norm)


@dataclass(frozen=True)
class Sign(_Printed):
    """Largest absolute entry: lmo = -sign(M), sign descent."""

    adapts: ClassVar[bool] = False
    matrix: ClassVar[bool] = False

    def primal(self, w: Tensor, /, m: Tensor | None = None, v: Tensor | None = None) -> Tensor:
        """Largest |w_ij|; 0 for a weight without entries."""
        return torch.linalg.vector_norm(w, ord=torch.inf, dim=MATRIX) if w.numel() else w.new_zeros(w.shape[:-2])

    def dual(self, m: Tensor, /, v: Tensor | None = None) -> Tensor:
        """Sum of |m_ij|."""
        return torch.linalg.vector_norm(m, ord=1, dim=MATRIX)

    def lmo(self, m: Tensor, /, v: Tensor | None = None) -> Tensor:
        """-sign(M)."""
        return -torch.sign(m)


@dataclass(frozen=True)
class AdaInf(_Printed):
    """Adam's norm: max |w| (sqrt(v) + eps) / |m|, whose constrained step is Adam's -m / (sqrt(v) + eps).

    An entry with m = 0 has infinite weight: it does not move.

    Args:
        eps: Added to the root of the second moment, in units of the gradient.

    Raises:
        ValueError: If `eps` is negative.

    Source:
        Crawshaw, Modi, Liu and Gower, arXiv:2510.09827 (the norm ada-infinity); Kingma and Ba, arXiv:1412.6980.
    """

    eps: float = 1e-8
    adapts: ClassVar[bool] = True
    matrix: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isinstance(cast(object, self.eps), Real) or not 0 <= self.eps < math.inf:
            raise ValueError(f"AdaInf takes a finite number eps >= 0, got eps={self.eps!r}.")

    def _root(self, v: Tensor | None) -> Tensor:
        if v is None:
            raise ValueError("AdaInf needs the second moment v of the gradient, got None; pass v shaped like m.")
        return v.sqrt().add_(self.eps)

    def primal(self, w: Tensor, /, m: Tensor | None = None, v: Tensor | None = None) -> Tensor:
        """max |w| (sqrt(v) + eps) / |m| over entries, 0/0 counting as 0: this norm depends on M too."""
        if m is None:
            raise ValueError("AdaInf.primal needs the momentum m that the norm was built at, got None; pass m and v.")
        weighted = w.abs() * self._root(v) / m.abs()
        return torch.where(w == 0, 0.0, weighted).amax(dim=MATRIX)

    def dual(self, m: Tensor, /, v: Tensor | None = None) -> Tensor:
        """Sum of m² / (sqrt(v) + eps), 0/0 counting as 0."""
        return -(m * self.lmo(m, v)).sum(dim=MATRIX)

    def lmo(self, m: Tensor, /, v: Tensor | None = None) -> Tensor:
        """-M / (sqrt(V) + eps); 0 where M is 0."""
        root = self._root(v)
        # m = 0 with eps = 0 and v = 0 would be 0/0
        return m / -torch.where(root == 0, 1.0, root) if self.eps == 0 else m / -root


NORMS: dict[str, type[Spectral] | type[Frobenius] | type[Sign] | type[AdaInf]] = {
    "spectral": Spectral,
    "frobenius": Frobenius,
    "sign": Sign,
    "ada_inf": AdaInf,
}


def get_norm(norm: str | Norm) -> Norm:
    """Turn an option value into a norm.

    Args:
        norm: A norm, or a name in `NORMS` for the norm with its default options.

    Returns:
        The norm.

    Raises:
        ValueError: If the name is not known.
        TypeError: If it is neither a name nor a norm.
    """
    if isinstance(norm, str):
        if norm not in NORMS:
            raise ValueError(unknown_name("norm", norm, NORMS))
        return NORMS[norm]()
    if isinstance(norm, type) or not all(hasattr(norm, name) for name in ("lmo", "dual", "adapts", "matrix")):
        raise TypeError(f"norm takes a name or an object such as Spectral(), got {norm!r}.")
    return norm
