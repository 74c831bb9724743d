"""Any norm divided by a factor that depends on the shape: its steps are longer by that factor."""

import math
from dataclasses import dataclass
from numbers import Real
from typing import Literal, cast, get_args

from torch import Tensor

from steepest.geometry.norm import Norm
from steepest.names import unknown_name

SizeRule = Literal["sqrt_fan_out", "inverse_fan_in", "sqrt_size"]


@dataclass(frozen=True)
class Scaled:
    """‖W‖ / s in place of ‖W‖: lmo and dual are s times the norm's own.

    Between spaces measured by root mean square, the norms of embeddings, heads and biases are
    `Scaled(ColNorm(), "sqrt_fan_out")`, `Scaled(Sign(), "inverse_fan_in")` and `Scaled(Frobenius(), "sqrt_size")`.

    Args:
        norm: The norm.
        by: s, a number above 0 or a rule: "sqrt_fan_out": sqrt(m); "inverse_fan_in": 1/n; "sqrt_size": sqrt(m n).

    Raises:
        ValueError: If s is not a finite number above 0, or the rule is not known.
        TypeError: If it is neither a number nor a name.

    Source:
        Pethick et al., arXiv:2502.07529 (the norms above).
    """

    norm: Norm
    by: SizeRule | float

    def __post_init__(self) -> None:
        if isinstance(self.by, str):
            if self.by not in get_args(SizeRule):
                raise ValueError(unknown_name("rule", self.by, get_args(SizeRule)))
        elif isinstance(self.by, bool) or not isinstance(cast(object, self.by), Real):
            raise TypeError(f"Scaled takes a number or the name of a rule as factor, got by={self.by!r}.")
        elif not 0 < self.by < math.inf:
            raise ValueError(f"Scaled takes a finite factor above 0, got by={self.by!r}.")

    @property
    def adapts(self) -> bool:
        """As the norm."""
        return self.norm.adapts

    @property
    def matrix(self) -> bool:
        """Whether the norm or the rule sees a linear map."""
        return self.norm.matrix or self.by in ("sqrt_fan_out", "inverse_fan_in")

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
