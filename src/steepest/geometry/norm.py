"""What a norm on the weight of one layer is.

Notation: W and M are batches of matrices (*batch, m, n), M in loss per weight unit; <M, W> is the sum of elementwise
products of one matrix. For each norm
    lmo(M)  = argmin over ‖D‖ <= 1 of <M, D>: a step *adds* the learning rate times it,
    dual(M) = max over ‖W‖ <= 1 of <M, W> = -<M, lmo(M)>.
A vector is a 1 x n matrix. Norms that adapt take the second moment V of the gradient, shaped like M.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from steepest.geometry.text import Textual

__all__ = ["Norm"]

MATRIX = (-2, -1)


def svd_work(fan_out: int, fan_in: int) -> float:
    """Operations of a singular value decomposition with both factors, roughly: 20 m n min(m, n)."""
    return 20.0 * fan_out * fan_in * min(fan_out, fan_in)


def sized_one(m: Tensor) -> tuple[Tensor, Tensor]:
    """M divided by a power of two for each matrix, so that the largest entry is of size one and squares fit.

    No bit of an entry changes, but of those that are smaller than the largest by more than the type's range.

    Args:
        m: (*batch, m, n).

    Returns:
        The quotient, a new tensor, and the powers (*batch, 1, 1).
    """
    if not m.numel():
        return m.clone(), m.new_ones(*m.shape[:-2], 1, 1)
    _, exponent = torch.frexp(m.abs().amax(dim=MATRIX, keepdim=True))
    most = -math.frexp(torch.finfo(m.dtype).tiny)[1]  # so that the power and its inverse are normal numbers
    exponent = exponent.clamp(-most, most).to(m.dtype)
    return m * torch.exp2(-exponent), torch.exp2(exponent)


class Norm(ABC):
    """A norm on weights, and what steepest descent needs of it.

    Contract, for every M != 0: dual(M) = -<M, lmo(M)>, primal(lmo(M)) = 1, and <M, W> <= dual(M) · primal(W) for all W;
    lmo(0) = 0; nothing is written to the arguments. A norm of yours defines `adapts`, `matrix`, `primal`, `dual` and
    `lmo`; the rest has defaults. An object of another class that has these five is a norm, too (`completed`).

    Attributes:
        adapts: Whether the norm needs the second moment V. Otherwise V is ignored and may be None.
        matrix: Whether the norm sees a linear map, so that fan-out, fan-in and fused parts matter.
        elementwise: Whether `lmo` looks at each entry by itself, so that parts of a matrix can be worked on apart.
        free_radius: Whether directions of another length cost nothing, so that decay and move are one pass.
    """

    adapts: bool
    matrix: bool
    elementwise: bool = False
    free_radius: bool = False

    def __init_subclass__(cls, **options: Any) -> None:
        """A class with an `lmo` of its own has no `lmos` that knows nothing of it."""
        super().__init_subclass__(**options)
        if "lmo" in vars(cls) and "lmos" not in vars(cls):
            cls.lmos, cls.free_radius = Norm.lmos, Norm.free_radius
        if "lmo" in vars(cls) and "elementwise" not in vars(cls):
            cls.elementwise = Norm.elementwise

    def __str__(self) -> str:
        return type(self).__name__

    @abstractmethod
    def primal(self, w: Tensor, /, m: Tensor | None = None, v: Tensor | None = None) -> Tensor:
        """Norm of W: (*batch, m, n) to (*batch,), in weight units."""

    @abstractmethod
    def dual(self, m: Tensor, /, v: Tensor | None = None) -> Tensor:
        """Dual norm of M: (*batch, m, n) to (*batch,), in units of the loss per unit of the norm."""

    @abstractmethod
    def lmo(self, m: Tensor, /, v: Tensor | None = None) -> Tensor:
        """Steepest direction for M: a new tensor of the shape and dtype of M, of norm one."""

    def lmos(
        self,
        batches: Sequence[Tensor],
        moments: Sequence[Tensor | None],
        *,
        memory_cap: int | None = None,
        radius: float = 1.0,
        company: Sequence[tuple[int, int, int]] | None = None,
    ) -> list[Tensor]:
        """Steepest directions for matrices of several shapes; by default one shape after the other.

        Args:
            batches: Momenta, (*batch, m, n) each.
            moments: Second moments likewise, for a norm that adapts, else None for each.
            memory_cap: Bytes that temporaries may take; None for the norm's own bound.
            radius: Norm of the directions.
            company: Shapes (B, m, n) of all that is worked on in the same step, these and what other ranks have: what
                is chosen by it is chosen alike everywhere. None: of the batches.

        Returns:
            `radius` times `lmo` of each.
        """
        found = [self.lmo(m, v) for m, v in zip(batches, moments, strict=True)]
        return found if radius == 1 else [radius * direction for direction in found]

    def polar_scale(self, fan_out: int, fan_in: int) -> float | None:
        """Factor s where the direction for an m x n matrix is -s times a polar factor; None where it is something else.

        By it `SteepestDescent.diagnostics` says how orthogonal directions are, and where in its ball a weight is.
        """
        return None

    def work(self, fan_out: int, fan_in: int) -> float:
        """Operations that the direction of an m x n matrix takes, roughly: by these, ranks share the matrices."""
        return float(fan_out * fan_in)

    def overshoot(self, w: Tensor) -> float:
        """Largest norm of a computed direction for weights of the dtype and device of W; 1 where `lmo` is exact."""
        return 1.0


class _Completed(Norm):
    """A norm whose class knows nothing of `Norm`."""

    def __init__(self, norm: Norm) -> None:
        self._norm = norm
        self.adapts, self.matrix = norm.adapts, norm.matrix

    def primal(self, w: Tensor, /, m: Tensor | None = None, v: Tensor | None = None) -> Tensor:
        return self._norm.primal(w, m, v)

    def dual(self, m: Tensor, /, v: Tensor | None = None) -> Tensor:
        return self._norm.dual(m, v)

    def lmo(self, m: Tensor, /, v: Tensor | None = None) -> Tensor:
        return self._norm.lmo(m, v)


def completed(norm: Norm) -> Norm:
    """A norm that answers everything a step may ask: itself, or with the defaults of `Norm` if of no such class."""
    return norm if isinstance(cast(object, norm), Norm) else _Completed(norm)


class Printed(Textual, Norm):
    """A norm prints as its name and the options that are not the default, for plans and tables."""

    name: ClassVar[str]

    def __str__(self) -> str:
        changed = [
            f"{option.name}={getattr(self, option.name)}"
            for option in fields(self)  # pyright: ignore[reportArgumentType] - subclasses are dataclasses
            if getattr(self, option.name) != option.default
        ]
        return " ".join([type(self).__dict__.get("name", type(self).__name__), *changed])
