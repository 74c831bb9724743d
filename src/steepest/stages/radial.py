"""Directions that look at the weights they are added to: how far they lead out, and how short their rows are.

Weight decay keeps steps in proportion to weights by making these smaller. A brake on what leads away from zero, and a
floor under the length of the rows of directions, do so without that anything shrinks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from steepest.anatomy import Load
from steepest.checks import check_fields, number
from steepest.stages.sizes import of_size
from steepest.stages.stage import Stage

MATRIX = (-2, -1)
NOISE = 64.0  # times the type's precision: what a decomposition leaves of a row that is zero, beside all of the matrix


class Weighed(Stage):
    """What the stages here have in common: nothing is kept, and what they make of a direction may climb."""

    @property
    def replays(self) -> bool:
        """Yes."""
        return True

    @property
    def may_climb(self) -> bool:
        """Yes: nothing here looks at the momentum."""
        return True


@dataclass(frozen=True)
class RadialBrake(Weighed):
    """Directions of which less leads out: where <D, W> > 0, matrix by matrix,

        D' = D - (1 - outward) (<D, W> / ‖W‖_F²) W,     D <- D' ‖D‖_F / ‖D'‖_F,

    so that weights grow more slowly and turn by more. What leads in stays as it is, as does all beside a zero weight.

    Args:
        outward: What is left of the part that leads out, in [0, 1]; 0: directions go along the sphere, or in.

    Raises:
        ValueError: If it is out of range.
        TypeError: If it is no number.

    Source:
        https://github.com/KellerJordan/modded-nanogpt/pull/294, with 0.5. There the update's length is not made up for,
        but weights are brought to the norm that its radial part alone would give them.
    """

    outward: float = 0.5

    def __post_init__(self) -> None:
        check_fields(self, {"outward": number(high=1.0, up_to=True)})

    @property
    def linear(self) -> bool:
        """Yes: of directions times a number above 0."""
        return True

    def beside(self, load: Load, directions: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Brake what leads out.

        Args:
            load: Whose directions these are.
            directions: (B, m, n) each.
            weights: Likewise.

        Returns:
            Likewise, each matrix with the Frobenius norm that it had.
        """
        del load
        return tuple(map(self._braked, directions, weights))

    def _braked(self, direction: Tensor, weight: Tensor) -> Tensor:
        size = torch.linalg.vector_norm(weight, dim=MATRIX, keepdim=True)
        unit = weight / torch.where(size == 0, 1.0, size)
        out = (direction * unit).sum(MATRIX, keepdim=True).clamp(min=0.0)
        new = direction - (1 - self.outward) * out * unit
        return torch.where(out > 0, of_size(new, direction), direction)


@dataclass(frozen=True)
class RowFloor(Weighed):
    """Directions whose rows are not short beside those of the weights: for each row i of a matrix,

        D_i <- D_i max(1, part ‖W_i‖ / ‖D_i‖),

    whatever the learning rate is: lr · part is then the least that a row moves, relative to itself. A row without a
    direction, or with what rounding alone leaves of none, stays. Directions become longer than their norm says,
    without bound where weights grow: those are kept in no ball.

    Args:
        part: At least 0.

    Raises:
        ValueError: If it is out of range.
        TypeError: If it is no number.

    Source:
        https://github.com/KellerJordan/modded-nanogpt/pull/328, with 0.3825; for whole matrices, with 0.35, of pull
        request 274 there. `part` counts by the norm's scale, here as there.
    """

    part: float = 0.3825

    def __post_init__(self) -> None:
        check_fields(self, {"part": number()})

    def beside(self, load: Load, directions: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Lengthen short rows.

        Args:
            load: Whose directions these are.
            directions: (B, m, n) each.
            weights: Likewise.

        Returns:
            Likewise.
        """
        del load
        return tuple(map(self._lengthened, directions, weights))

    def _lengthened(self, direction: Tensor, weight: Tensor) -> Tensor:
        length, size = (torch.linalg.vector_norm(one, dim=-1, keepdim=True) for one in (direction, weight))
        noise = NOISE * torch.finfo(direction.dtype).eps * torch.linalg.vector_norm(direction, dim=MATRIX, keepdim=True)
        return direction * torch.where(length > noise, (self.part * size / length).clamp(min=1.0), 1.0)
