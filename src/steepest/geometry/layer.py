"""Norms on the weight of one layer, and their names; see `norm` for the notation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast, get_args

import torch
from torch import Tensor

from steepest.checks import Check, check_fields, choice, refusal
from steepest.geometry.adaptive import Ada2, AdaInf
from steepest.geometry.norm import MATRIX, Norm, Printed, sized_one, svd_work
from steepest.geometry.scale import ScaleRule, scale_factor
from steepest.geometry.spectrum import Nuclear, Schatten
from steepest.geometry.text import built
from steepest.linalg import (
    MEMORY_CAP,
    Coefficients,
    PolarMethod,
    compute_dtype,
    flops,
    get_coefficients,
    overshoot,
    polar,
    polars,
)

__all__ = ["NORMS", "ColNorm", "Frobenius", "RowNorm", "Sign", "Spectral", "get_norm"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _check_dtype(name: str, value: object) -> torch.dtype | None:
    if value is None or (isinstance(value, torch.dtype) and value in DTYPES):
        return value
    raise TypeError(refusal(name, f"one of {', '.join(map(str, DTYPES))}, or None", value))


def _check_coefficients(name: str, value: object) -> Any:
    try:
        get_coefficients(cast(Any, value), torch.float64)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name.rpartition(': ')[0]}: {error}") from error
    return value


CHECKS: Mapping[str, Check] = {
    "scale": choice(get_args(ScaleRule)),
    "polar": choice(get_args(PolarMethod)),
    "coefficients": _check_coefficients,
    "dtype": _check_dtype,
}


@dataclass(frozen=True, eq=False)
class Spectral(Printed):
    """Largest singular value, divided by a scale s that depends on the shape: ‖W‖ = σ_max(W) / s, lmo = -s U Vᵀ.

    Args:
        scale: How long the step is by shape: "original", "match_rms_adamw", "spectral" or "none"; see `scale_factor`.
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
    coefficients: str | Coefficients | Sequence[Sequence[float]] = "auto"
    dtype: torch.dtype | None = None
    name: ClassVar[str] = "spectral"
    adapts = False
    matrix = True
    free_radius = True  # the last product is multiplied with a scale anyway

    def __post_init__(self) -> None:
        check_fields(self, CHECKS)
        polar(torch.zeros(0, 1, 1, device="cpu"), method=self.polar, coefficients=self.coefficients, dtype=self.dtype)

    def primal(self, w: Tensor, /, m: Tensor | None = None, v: Tensor | None = None) -> Tensor:
        """σ_max(W) / s, by a singular value decomposition."""
        return torch.linalg.matrix_norm(w, ord=2) / scale_factor(self.scale, *w.shape[-2:])

    def dual(self, m: Tensor, /, v: Tensor | None = None) -> Tensor:
        """s times the sum of singular values, by a singular value decomposition."""
        return torch.linalg.matrix_norm(m, ord="nuc") * scale_factor(self.scale, *m.shape[-2:])

    def lmo(self, m: Tensor, /, v: Tensor | None = None) -> Tensor:
        """-s U Vᵀ."""
        return self.lmos([m], [v])[0]

    def lmos(
        self,
        batches: Sequence[Tensor],
        moments: Sequence[Tensor | None],
        *,
        memory_cap: int | None = None,
        radius: float = 1.0,
        company: Sequence[tuple[int, int, int]] | None = None,
    ) -> list[Tensor]:
        """Polar factors of matrices of several shapes take less time together than one shape after the other."""
        return polars(
            batches,
            method=self.polar,
            coefficients=self.coefficients,
            dtype=self.dtype,
            memory_cap=memory_cap or MEMORY_CAP,
            times=[-radius * self.polar_scale(*batch.shape[-2:]) for batch in batches],
            company=company,
        )

    def work(self, fan_out: int, fan_in: int) -> float:
        """Operations of the products, or of a singular value decomposition; the same count on every machine."""
        if self.polar == "svd":
            return svd_work(fan_out, fan_in)
        dtype = self.dtype or torch.float32
        return float(
            flops(fan_out, fan_in, method=self.polar, coefficients=self.coefficients, dtype=dtype, device="meta")
        )

    def polar_scale(self, fan_out: int, fan_in: int) -> float:
        """s; see `scale_factor`."""
        return scale_factor(self.scale, fan_out, fan_in)

    def overshoot(self, w: Tensor) -> float:
        """Largest singular value of the polar factors that these options compute."""
        return overshoot(
            None if self.polar == "svd" else self.coefficients, self.dtype or compute_dtype(w, self.coefficients)
        )


@dataclass(frozen=True, eq=False)
class Frobenius(Printed):
    """Root of the sum of squares: lmo = -M / ‖M‖, normalised gradient descent."""

    name: ClassVar[str] = "frobenius"
    adapts = False
    matrix = False

    def primal(self, w: Tensor, /, m: Tensor | None = None, v: Tensor | None = None) -> Tensor:
        """‖W‖_F."""
        return torch.linalg.vector_norm(w, dim=MATRIX)

    def dual(self, m: Tensor, /, v: Tensor | None = None) -> Tensor:
        """‖M‖_F: the norm is its own dual."""
        scaled, power = sized_one(m)
        return torch.linalg.vector_norm(scaled, dim=MATRIX) * power.squeeze(MATRIX)

    def lmo(self, m: Tensor, /, v: Tensor | None = None) -> Tensor:
        """-M / ‖M‖_F, by way of the largest entry so that squares stay in range."""
        largest = m.abs().amax(dim=MATRIX, keepdim=True) if m.numel() else m.new_zeros(*m.shape[:-2], 1, 1)
        m = m / torch.where(largest == 0, 1.0, largest)
        norm = torch.linalg.vector_norm(m, dim=MATRIX, keepdim=True)
        return m / -torch.where(norm == 0, 1.0, norm)


@dataclass(frozen=True, eq=False)
class Sign(Printed):
    """Largest absolute entry: lmo = -sign(M), sign descent."""

    name: ClassVar[str] = "sign"
    adapts = False
    matrix = False
    elementwise = True

    def primal(self, w: Tensor, /, m: Tensor | None = None, v: Tensor | None = None) -> Tensor:
        """Largest |w_ij|; 0 for a weight without entries."""
        return torch.linalg.vector_norm(w, ord=torch.inf, dim=MATRIX) if w.numel() else w.new_zeros(w.shape[:-2])

    def dual(self, m: Tensor, /, v: Tensor | None = None) -> Tensor:
        """Sum of |m_ij|."""
        return torch.linalg.vector_norm(m, ord=1, dim=MATRIX)

    def lmo(self, m: Tensor, /, v: Tensor | None = None) -> Tensor:
        """-sign(M)."""
        return -torch.sign(m)


def _scaled_lines(m: Tensor, dim: int) -> Tensor:
    """Each row (dim = -1) or column (dim = -2) divided by its length, by way of its largest entry; 0 stays 0."""
    if m.numel() == 0:
        return m.clone()
    largest = m.abs().amax(dim=dim, keepdim=True)
    m = m / torch.where(largest == 0, 1.0, largest)
    length = torch.linalg.vector_norm(m, dim=dim, keepdim=True)
    return m / torch.where(length == 0, 1.0, length)


@dataclass(frozen=True, eq=False)
class RowNorm(Printed):
    """Longest row: the norm from the largest of outputs' sensitivities, lmo = each row over its length, negated.

    Source:
        Pethick et al., arXiv:2502.07529 (RowNorm).
    """

    name: ClassVar[str] = "row"
    adapts = False
    matrix = True

    def primal(self, w: Tensor, /, m: Tensor | None = None, v: Tensor | None = None) -> Tensor:
        """Largest length of a row; 0 for a weight without entries."""
        lengths = torch.linalg.vector_norm(w, dim=-1)
        return lengths.amax(dim=-1) if w.numel() else w.new_zeros(w.shape[:-2])

    def dual(self, m: Tensor, /, v: Tensor | None = None) -> Tensor:
        """Sum of the lengths of rows."""
        scaled, power = sized_one(m)
        return torch.linalg.vector_norm(scaled, dim=-1).sum(dim=-1) * power.squeeze(MATRIX)

    def lmo(self, m: Tensor, /, v: Tensor | None = None) -> Tensor:
        """Each row over its length, negated."""
        return -_scaled_lines(m, -1)


@dataclass(frozen=True, eq=False)
class ColNorm(Printed):
    """Longest column: lmo = each column over its length, negated.

    Source:
        Pethick et al., arXiv:2502.07529 (ColNorm).
    """

    name: ClassVar[str] = "col"
    adapts = False
    matrix = True

    def primal(self, w: Tensor, /, m: Tensor | None = None, v: Tensor | None = None) -> Tensor:
        """Largest length of a column; 0 for a weight without entries."""
        lengths = torch.linalg.vector_norm(w, dim=-2)
        return lengths.amax(dim=-1) if w.numel() else w.new_zeros(w.shape[:-2])

    def dual(self, m: Tensor, /, v: Tensor | None = None) -> Tensor:
        """Sum of the lengths of columns."""
        scaled, power = sized_one(m)
        return torch.linalg.vector_norm(scaled, dim=-2).sum(dim=-1) * power.squeeze(MATRIX)

    def lmo(self, m: Tensor, /, v: Tensor | None = None) -> Tensor:
        """Each column over its length, negated."""
        return -_scaled_lines(m, -2)


NORMS: dict[str, type[Norm]] = {
    kind.name: kind for kind in (Spectral, Frobenius, Sign, RowNorm, ColNorm, AdaInf, Ada2, Nuclear, Schatten)
}
"""Norms of one layer, by the name that `norms=` takes."""


# Classes that a norm's text may name; `scaled` adds its own.
KINDS: dict[str, type] = {kind.__name__: kind for kind in (*NORMS.values(), Coefficients)}


def get_norm(norm: str | Norm) -> Norm:
    """Turn an option value into a norm.

    Args:
        norm: A norm; a name in `NORMS` for the norm with its default options; or the text that a norm prints as in
            the groups of an optimizer, such as "Spectral(scale='none')".

    Returns:
        The norm.

    Raises:
        ValueError: If the name is not known.
        TypeError: If it is neither a name nor a norm.
    """
    return check_norm("norm", norm)


def check_norm(name: str, value: object) -> Norm:
    """Check of a norm: an object, a name in `NORMS` for one with default options, or the text that builds it."""
    if isinstance(value, str) and "(" in value:
        value = built(value, KINDS)
    if isinstance(value, str):
        return NORMS[choice(NORMS)(name, value)]()
    if isinstance(value, type) or not all(hasattr(value, part) for part in ("lmo", "dual", "adapts", "matrix")):
        raise TypeError(refusal(name, "a name or an object such as Spectral()", value))
    return cast(Norm, value)
