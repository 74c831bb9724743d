"""Norms in which Adam is steepest descent; see `norm` for the notation. They adapt to the second moment V."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from steepest.checks import check_fields, number
from steepest.geometry.norm import MATRIX, Printed, sized_one

__all__ = ["Ada2", "AdaInf"]

SMALL = 1e-15  # the square of a number below may have lost digits


CHECKS = {"eps": number()}


def _root(name: str, v: Tensor | None, eps: float) -> Tensor:
    """sqrt(V) + eps, and 1 where that is 0: there no gradient was ever seen."""
    if v is None:
        raise ValueError(f"{name} needs the second moment v of the gradient, got None; pass v shaped like m.")
    root = v.sqrt().add_(eps)
    return root if eps > 0 else torch.where(root == 0, 1.0, root)


@dataclass(frozen=True, eq=False)
class AdaInf(Printed):
    """Adam's norm: max |w| (sqrt(v) + eps) / |m|, whose constrained step is Adam's -m / (sqrt(v) + eps).

    An entry with m = 0 has infinite weight: it does not move.

    Args:
        eps: Added to the root of the second moment, in units of the gradient.

    Raises:
        ValueError: If `eps` is not a finite number of at least 0.
        TypeError: If it is no number.

    Source:
        Crawshaw, Modi, Liu and Gower, arXiv:2510.09827 (the norm ada-infinity); Kingma and Ba, arXiv:1412.6980.
    """

    eps: float = 1e-8
    name: ClassVar[str] = "ada_inf"
    adapts = True
    matrix = False
    elementwise = True

    def __post_init__(self) -> None:
        check_fields(self, CHECKS)

    def primal(self, w: Tensor, /, m: Tensor | None = None, v: Tensor | None = None) -> Tensor:
        """max |w| (sqrt(v) + eps) / |m| over entries, 0/0 counting as 0: this norm depends on M too."""
        if m is None:
            raise ValueError("AdaInf.primal needs the momentum m that the norm was built at, got None; pass m and v.")
        weighted = w.abs() * _root("AdaInf", v, self.eps) / m.abs()
        return torch.where(w == 0, 0.0, weighted).amax(dim=MATRIX)

    def dual(self, m: Tensor, /, v: Tensor | None = None) -> Tensor:
        """Sum of m² / (sqrt(v) + eps), 0/0 counting as 0."""
        return -(m * self.lmo(m, v)).sum(dim=MATRIX)

    def lmo(self, m: Tensor, /, v: Tensor | None = None) -> Tensor:
        """-M / (sqrt(V) + eps); 0 where M is 0."""
        return m / -_root("AdaInf", v, self.eps)


@dataclass(frozen=True, eq=False)
class Ada2(Printed):
    """Adam's other norm: root of the sum of w² (sqrt(v) + eps), whose regularised step is Adam's.

    Its constrained step, here, is -m / (sqrt(v) + eps) over the dual norm of M.

    Args:
        eps: Added to the root of the second moment, in units of the gradient.

    Raises:
        ValueError: If `eps` is not a finite number of at least 0.
        TypeError: If it is no number.

    Source:
        Crawshaw, Modi, Liu and Gower, arXiv:2510.09827 (the norm ada-2).
    """

    eps: float = 1e-8
    name: ClassVar[str] = "ada_2"
    adapts = True
    matrix = False

    def __post_init__(self) -> None:
        check_fields(self, CHECKS)

    def primal(self, w: Tensor, /, m: Tensor | None = None, v: Tensor | None = None) -> Tensor:
        """Root of the sum of w² (sqrt(v) + eps)."""
        return (w.square() * _root("Ada2", v, self.eps)).sum(dim=MATRIX).sqrt()

    def dual(self, m: Tensor, /, v: Tensor | None = None) -> Tensor:
        """Root of the sum of m² / (sqrt(v) + eps)."""
        scaled, power = sized_one(m)
        return (scaled.square() / _root("Ada2", v, self.eps)).sum(dim=MATRIX).sqrt() * power.squeeze(MATRIX)

    def lmo(self, m: Tensor, /, v: Tensor | None = None) -> Tensor:
        """-M / (sqrt(V) + eps) / dual(M); 0 where M is 0."""
        root = _root("Ada2", v, self.eps)
        step = m / root
        norm = (m * step).sum(dim=MATRIX, keepdim=True).sqrt()
        # Products of small or large entries leave the range; elsewhere than here, looking would mean to wait.
        if m.device.type == "cpu" and not bool(((norm > SMALL) & norm.isfinite()).all()):
            scaled, _ = sized_one(m)
            step = scaled / root
            norm = (scaled * step).sum(dim=MATRIX, keepdim=True).sqrt()
        return step / -torch.where(norm == 0, 1.0, norm)
