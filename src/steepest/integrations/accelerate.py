"""Accelerate: the loss of each micro-batch, for an optimizer whose step takes none.

What `accelerator.prepare` returns as optimizer has no `record_loss`, `plan` or `diagnostics`; `unwrapped` finds the one
that has.
"""

from typing import Any, cast

from torch import Tensor

from steepest.checks import refusal
from steepest.integrations.wrapped import unwrapped

try:
    from accelerate import Accelerator
except ImportError as error:
    raise ImportError(
        "steepest.integrations.accelerate needs accelerate: pip install 'steepest[accelerate]'"
    ) from error

__all__ = ["record_loss", "unwrapped"]


def record_loss(optimizer: Any, loss: Tensor, accelerator: Accelerator, *, adds_up: bool = False) -> None:
    """Tell Momo the loss of a micro-batch: between the forward pass and `accelerator.backward(loss)`.

    `backward` divides by `gradient_accumulation_steps`, also in a last window with fewer micro-batches, whose gradient
    is smaller then; that is known, as are the scale of a GradScaler, clipping and the losses of other ranks.

    Args:
        optimizer: As `accelerator.prepare` returned it.
        loss: What backward is about to be called on.
        accelerator: Whose backward.
        adds_up: Whether the loss was scaled so that, divided by `gradient_accumulation_steps`, those of a window add up
            to its mean, however many there are: as where each token of the window is to count alike. Else it is the
            mean of the micro-batch.

    Raises:
        TypeError: If there is no optimizer of this library in the wrapper, or the loss has no graph.
        ValueError: If the loss is not one number.
    """
    if not isinstance(cast(object, loss), Tensor) or not loss.requires_grad:
        raise TypeError(refusal("loss", "the tensor that accelerator.backward() is about to be called on", loss))
    steps = accelerator.gradient_accumulation_steps
    if adds_up:
        # as it is, and not a part of it: that backward runs through it tells whether its gradient is there
        unwrapped(optimizer).record_loss(loss, already_divided=True, scale=steps)
    else:
        unwrapped(optimizer).record_loss(loss, weight=1 / steps)
