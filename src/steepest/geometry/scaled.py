"""Any norm divided by a factor that depends on the shape: its steps are longer by that factor."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from steepest.checks import check_fields, choice, number, refusal
from steepest.geometry.layer import KINDS, check_norm
from steepest.geometry.norm import Norm
from steepest.geometry.text import Textual

__all__ = ["Scaled"]

SizeRule = Literal["sqrt_fan_out", "inverse_fan_in", "sqrt_size"]


def _check_factor(name: str, value: object) -> str | float:
    if isinstance(value, str):
        return choice(get_args(SizeRule))(f"{name}: rule", value)
    try:
        return number(above=True)(name, value)
    except TypeError as error:
        rules = ", ".join(map(repr, get_args(SizeRule)))
        raise TypeError(refusal(name, f"a number above 0 or one of {rules}", value)) from error


@dataclass(frozen=True, eq=False)
class Scaled(Textual, Norm):
    """‖W‖ / s in place of ‖W‖: lmo and dual are s times the norm's own.

    Between spaces measured by root mean square, the norms of embeddings, heads and biases are
    `Scaled(ColNorm(), "sqrt_fan_out")`, `Scaled(Sign(), "inverse_fan_in")` and `Scaled(Frobenius(), "sqrt_size")`.

    Args:
        norm: The norm, or its name.
        by: s, a number above 0 or a rule: "sqrt_fan_out": sqrt(m); "inverse_fan_in": 1/n; "sqrt_size": sqrt(m n).

    Raises:
        ValueError: If s is not a finite number above 0, or the rule or the norm is not known.
        TypeError: If s is neither a number nor a name, or the norm is none.

    Source:
        Pethick et al., arXiv:2502.07529 (the norms above).
    """

    norm: Norm
    by: SizeRule | float

    def __post_init__(self) -> None:
        check_fields(self, {"norm": check_norm, "by": _check_factor})

    @property
    def adapts(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride] - read only
        """As the norm."""
        return self.norm.adapts

    @property
    def matrix(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride] - read only
        """Whether the norm or the rule sees a linear map."""
        return self.norm.matrix or self.by in ("sqrt_fan_out", "inverse_fan_in")

    @property
    def elementwise(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride] - read only
        """As the norm, where s does not depend on the shape."""
        return self.norm.elementwise and not isinstance(self.by, str)

    def work(self, fan_out: int, fan_in: int) -> float:
        """Operations of the norm."""
        return self.norm.work(fan_out, fan_in)

    def factor(self, shape: tuple[int, ...]) -> float:
        """s for matrices of a shape (*batch, m, n)."""
        m, n = shape[-2:]
        if not isinstance(self.by, str):
            return self.by
        return {"sqrt_fan_out": math.sqrt(m), "inverse_fan_in": 1 / max(n, 1), "sqrt_size": math.sqrt(m * n)}[self.by]

    def primal(self, w: Tensor, /, m: Tensor | None = None, v: Tensor | None = None) -> Tensor:
        """‖W‖ / s."""
        # ‖D‖ of a norm that depends on M must not see the factor twice, so M is passed as it is.
        return self.norm.primal(w, m, v) / self.factor(tuple(w.shape))

    def dual(self, m: Tensor, /, v: Tensor | None = None) -> Tensor:
        """s times the norm's dual."""
        return self.norm.dual(m, v) * self.factor(tuple(m.shape))

    def lmo(self, m: Tensor, /, v: Tensor | None = None) -> Tensor:
        """s times the norm's direction."""
        return self.norm.lmo(m, v) * self.factor(tuple(m.shape))

    def __str__(self) -> str:
        by = self.by if isinstance(self.by, str) else f"{self.by:g}"
        return f"{self.norm} × {by}"


KINDS[Scaled.__name__] = Scaled
