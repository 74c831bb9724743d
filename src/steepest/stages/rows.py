"""Row normalisation after the direction is found, as NorMuon does it (arXiv:2510.05491, Algorithm 1).

A polar factor has singular values of one, but rows of very different lengths, so that some neurons move far more than
others. With V a moving average, row by row, of the mean of the squared entries of the directions D that were found,

    V <- β V + (1-β) mean over columns of D∘D,     D' = D / (√V + ε),     D <- D' ‖D‖_F / ‖D'‖_F.

The paper scales to 0.2 √(m n) instead of ‖D‖_F: with `scale="match_rms_adamw"`, the two are the same for full rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steepest.anatomy import Load, PlanRow
from steepest.checks import check_fields, number
from steepest.stages.sizes import of_size
from steepest.stages.stage import Entry, Stage

ROW_MOMENT = "row_moment"


@dataclass(frozen=True)
class RowScaling(Stage):
    """Directions whose rows are divided by a moving root mean square of them.

    The result has the Frobenius norm of what was found, but not its spectral norm: weight decay keeps weights in no
    ball. Momo, regularised descent and product norms take the dual norm with the direction that is applied.

    Args:
        beta2: β, weight of the old average, in [0, 1).
        eps: ε, in units of the directions' entries, at least 0.

    Raises:
        ValueError: If a number is out of range.
        TypeError: If it is none.

    Source:
        Li, Liu, Liang, Chen and Zhao, arXiv:2510.05491, Algorithm 1.
    """

    beta2: float = 0.95
    eps: float = 1e-8

    prefix = "row_"
    kept = "moments of rows"
    option = "stages=[RowScaling()]"

    def __post_init__(self) -> None:
        check_fields(self, {"beta2": number(high=1.0), "eps": number()})

    @property
    def replays(self) -> bool:
        """Yes."""
        return True

    def entries(self, row: PlanRow) -> Sequence[Entry]:
        """V: one number for each row of each matrix, block after block.

        Args:
            row: Of the plan, with a view.
        """
        return (Entry(ROW_MOMENT, torch.Size((sum(count * m for count, m, _ in row.blocks()),)), least=0.0),)

    def after(
        self, load: Load, directions: tuple[Tensor, ...], states: Sequence[dict[str, Tensor]], accept: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Divide rows by their moving root mean square.

        Args:
            load: Whose directions these are.
            directions: (B, m, n) each.
            states: With V; written to.
            accept: A 0-d boolean; where it is False, V does not change. None means True.

        Returns:
            Likewise, each matrix with the Frobenius norm that it had.
        """
        squares = load.rows_of_parameters([d.square().mean(-1) for d in directions])
        moments = [state[ROW_MOMENT] for state in states]
        for moment, square in zip(moments, squares, strict=True):
            new = torch.lerp(square, moment, self.beta2)
            moment.copy_(new if accept is None else torch.where(accept, new, moment))
        averages = load.rows_of_batches(moments)
        return tuple(self._divided(d, average) for d, average in zip(directions, averages, strict=True))

    def _divided(self, direction: Tensor, average: Tensor) -> Tensor:
        length = (average.sqrt() + self.eps).unsqueeze(-1)
        return of_size(direction / torch.where(length == 0, 1.0, length), direction)
