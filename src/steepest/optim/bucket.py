"""Parameters of one layout, worked on together: gradients in, directions out, weights moved."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from steepest.anatomy import PlanRow, View
from steepest.geometry import Norm


@dataclass(frozen=True)
class Bucket:
    """Parameters of one group with the same shape, view, dtype and device.

    Args:
        parameters: At least one.
        view: How one of them is a set of matrices. None: a bag of entries, one row.
    """

    parameters: tuple[Tensor, ...]
    view: View | None

    def matrices(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Gather tensors shaped like the parameters into batches, parameter by parameter.

        Args:
            tensors: One per parameter.

        Returns:
            One batch (P·B, m, n) per block of the view, P the number of parameters.
        """
        if self.view is None:
            rows = [tensor.reshape(1, -1) for tensor in tensors]
            return (torch.stack(rows) if len(rows) > 1 else rows[0].unsqueeze(0),)
        split = [self.view.split_tensor(tensor) for tensor in tensors]
        if len(split) == 1:
            return split[0]
        return tuple(torch.cat(part) for part in zip(*split, strict=True))

    def parameter_shaped(self, batches: Sequence[Tensor]) -> list[Tensor]:
        """The inverse of `matrices`.

        Args:
            batches: As `matrices` returns them.

        Returns:
            One tensor per parameter; may share memory with the batches.
        """
        shape = self.parameters[0].shape
        if self.view is None:
            return [row.reshape(shape) for row in batches[0]]
        view, count = self.view, len(self.parameters)
        pieces = [batch.chunk(count) if count > 1 else (batch,) for batch in batches]
        return [view.merge(blocks, shape) for blocks in zip(*pieces, strict=True)]


def buckets(parameters: Sequence[Tensor], rows: Mapping[Tensor, PlanRow], *, matrix: bool) -> Iterator[Bucket]:
    """Parameters of one group, together where they have one layout; in order of first appearance.

    Args:
        parameters: Of the group.
        rows: Of the plan.
        matrix: Whether the group's norm is one of matrices.
    """
    alike: dict[tuple[object, ...], list[Tensor]] = {}
    for parameter in parameters:
        view = rows[parameter].view if matrix else None
        key = (parameter.shape, view, parameter.dtype, parameter.device)
        alike.setdefault(key, []).append(parameter)
    for (_, view, *_), members in alike.items():
        yield Bucket(tuple(members), cast(View | None, view))


def directions(norm: Norm, batches: Sequence[Tensor], moments: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """Steepest directions for momenta.

    Args:
        norm: Whose unit ball.
        batches: Debiased momenta as a bucket's matrices, (B, m, n) each.
        moments: Debiased second moments likewise, for a norm that adapts, else None for each.

    Returns:
        Directions to add, shaped like the batches.
    """
    return tuple(norm.lmo(batch, v) for batch, v in zip(batches, moments, strict=True))


def gains(batches: Sequence[Tensor], moves: Sequence[Tensor]) -> Tensor:
    """What each direction is predicted to gain per unit of length, -<M, D>.

    Args:
        batches: Momenta, (B, m, n) each.
        moves: Directions, likewise.

    Returns:
        One number per matrix, batch after batch.
    """
    return torch.cat([-(m * d).sum(dim=(-2, -1)) for m, d in zip(batches, moves, strict=True)])


def apply_(
    parameters: Sequence[Tensor],
    moves: Sequence[Tensor],
    *,
    length: float | Tensor,
    decay: float | Tensor,
    accept: Tensor | None = None,
) -> None:
    """W <- (1 - decay) W + length · move, rounded once.

    Args:
        parameters: Written to.
        moves: One per parameter, float32 or wider.
        length: A number or a 0-d tensor.
        decay: Part of the weights that is taken away.
        accept: A 0-d boolean on the device; where it is False nothing decays, and the moves must be zero. None means
            True.
    """
    shrink = 1 - (decay if accept is None else decay * accept.to(moves[0].dtype))
    direct = parameters[0].dtype == moves[0].dtype
    wide = list(parameters) if direct else [p.to(moves[0].dtype) for p in parameters]
    if isinstance(shrink, Tensor) or shrink != 1:
        torch._foreach_mul_(wide, shrink)
    if isinstance(length, Tensor):
        torch._foreach_add_(wide, torch._foreach_mul(list(moves), length))
    else:
        torch._foreach_add_(wide, list(moves), alpha=length)
    if not direct:  # half precision: decay and move together, else both would be lost to rounding one by one
        torch._foreach_copy_(list(parameters), wide)
