"""What a norm on the weight of one layer is.

Notation: W and M are batches of matrices (*batch, m, n), M in loss per weight unit; <M, W> is the sum of elementwise
products of one matrix. For each norm
    lmo(M)  = argmin over ‖D‖ <= 1 of <M, D>: a step *adds* the learning rate times it,
    dual(M) = max over ‖W‖ <= 1 of <M, W> = -<M, lmo(M)>.
A vector is a 1 x n matrix. Norms that adapt take the second moment V of the gradient, shaped like M.
"""

import math
from dataclasses import fields
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from steepest.geometry.text import Textual

MATRIX = (-2, -1)


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


class Norm(Protocol):
    """A norm on weights, and what steepest descent needs of it.

    Contract, for every M != 0: dual(M) = -<M, lmo(M)>, primal(lmo(M)) = 1, and <M, W> <= dual(M) · primal(W) for all W;
    lmo(0) = 0; nothing is written to the arguments.

    Attributes:
        adapts: Whether the norm needs the second moment V. Otherwise V is ignored and may be None.
        matrix: Whether the norm sees a linear map, so that fan-out, fan-in and fused parts matter.
    """

    @property
    def adapts(self) -> bool: ...  # noqa: D102 - above
    @property
    def matrix(self) -> bool: ...  # noqa: D102 - above

    def primal(self, w: Tensor, /, m: Tensor | None = None, v: Tensor | None = None) -> Tensor:
        """Norm of W: (*batch, m, n) to (*batch,), in weight units."""
        ...

    def dual(self, m: Tensor, /, v: Tensor | None = None) -> Tensor:
        """Dual norm of M: (*batch, m, n) to (*batch,), in units of the loss per unit of the norm."""
        ...

    def lmo(self, m: Tensor, /, v: Tensor | None = None) -> Tensor:
        """Steepest direction for M: a new tensor of the shape and dtype of M, of norm one."""
        ...


class Printed(Textual):
    """A norm prints as its name and the options that are not the default, for plans and tables."""

    name: ClassVar[str]

    def __str__(self) -> str:
        changed = [
            f"{option.name}={getattr(self, option.name)}"
            for option in fields(self)  # pyright: ignore[reportArgumentType] - subclasses are dataclasses
            if getattr(self, option.name) != option.default
        ]
        return " ".join([type(self).__dict__.get("name", type(self).__name__), *changed])
