"""Parameters of one layout, worked on together: gradients in, directions out, weights moved."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steepest.anatomy import LINEAR, View
from steepest.optim.group_numbers import masked


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
        if self._plain:
            return (torch.stack(list(tensors)) if len(tensors) > 1 else tensors[0].unsqueeze(0),)
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
            return [row.reshape(shape) for row in batches[0].unbind()]
        if self._plain:
            return list(batches[0].unbind())
        view, count = self.view, len(self.parameters)
        pieces = [batch.chunk(count) if count > 1 else (batch,) for batch in batches]
        return [view.merge(blocks, shape) for blocks in zip(*pieces, strict=True)]

    @property
    def blocks(self) -> tuple[tuple[int, int, int], ...]:
        """Shapes (B, m, n) of one parameter's batches."""
        shape = self.parameters[0].shape
        return ((1, 1, shape.numel()),) if self.view is None else self.view.blocks(shape)

    @property
    def _plain(self) -> bool:
        return self.view == LINEAR and self.parameters[0].ndim == 2


def gains(batches: Sequence[Tensor], moves: Sequence[Tensor]) -> Tensor:
    """What each direction is predicted to gain per unit of length, -<M, D>.

    Args:
        batches: Momenta, (B, m, n) each.
        moves: Directions, likewise.

    Returns:
        One number per matrix, batch after batch.
    """
    return torch.cat([-(m * d).sum(dim=(-2, -1)) for m, d in zip(batches, moves, strict=True)])


def pull_(parameters: Sequence[Tensor], targets: Sequence[Tensor], *, by: float) -> None:
    """W <- (1 - by) W + by · target, in one pass.

    A step of length lr with weight decay λ is the step `by` lr · λ toward a point of the ball of radius 1 / λ.

    Args:
        parameters: Written to.
        targets: One per parameter, of its dtype.
        by: Part of the way.
    """
    torch._foreach_lerp_(list(parameters), list(targets), by)


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
    decay, length = masked(decay, accept), masked(length, accept)
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


def stay_finite(
    parameters: Sequence[Tensor],
    moves: Sequence[Tensor],
    *,
    length: float | Tensor,
    decay: float | Tensor,
    pull: bool,
) -> Tensor:
    """Whether `apply_` or `pull_` would leave only finite weights; takes what they take, and memory for one parameter.

    Args:
        parameters: Read only.
        moves: One per parameter.
        length: As for `apply_`, in the range of their type.
        decay: As for `apply_`, likewise; `by` of `pull_`.
        pull: Whether it would be `pull_`.

    Returns:
        0-d boolean on their device.
    """
    finite: list[Tensor] = []
    for parameter, move in zip(parameters, moves, strict=True):
        wide = parameter.detach().to(move.dtype)
        after = torch.lerp(wide, move, decay) if pull else wide * (1 - decay) + move * length
        finite.append(after.to(parameter.dtype).isfinite().all())
    return torch.stack(finite).all()
