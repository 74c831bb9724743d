"""Moving averages whose weights sum to one, for lists of tensors.

A buffer holds the plain average m_t = β m_{t-1} + (1-β) g_t from m_0 = 0; its weights sum to 1 - β^t, and dividing by
that sum is done where the average is read, so that a buffer can be exchanged with other implementations.

Without gradients an average shrinks by β a step and never reaches zero: rounding keeps it at the smallest numbers there
are, and a direction does not depend on scale. So, from time to time, what is nothing but rounding is set to zero.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

SMALLEST = torch.finfo(torch.float32).tiny  # of the normal numbers
# A few passes over the averages in one step of so many cost nothing; a prime number meets every rhythm of gradients.
FORGET_EVERY = 61


def average_(buffers: Sequence[Tensor], values: Sequence[Tensor], beta: float, *, accept: Tensor | None = None) -> None:
    """Move each buffer toward its value: buffer <- β buffer + (1-β) value.

    Args:
        buffers: Averages, written to.
        values: One per buffer, same shape, dtype and device.
        beta: Weight of the old average, in [0, 1).
        accept: A 0-d boolean on the device; where it is False, every buffer keeps its bits. None means True.
    """
    if accept is not None:  # averaging a buffer with itself changes nothing: b + (1-β)(b - b) = b
        values = [torch.where(accept, value, buffer) for value, buffer in zip(values, buffers, strict=True)]
    torch._foreach_lerp_(list(buffers), list(values), 1 - beta)


def forget_(buffers: Sequence[Tensor], values: Sequence[Tensor], beta: float, *, accept: Tensor | None = None) -> None:
    """Set to zero what an average holds of gradients that ended so long ago that only rounding is left.

    That is an entry whose new value is exactly 0 and whose next decrease, (1-β) of it, is below the smallest normal
    number of float32, 1.2e-38: in wider types too, so that all end at the same time, 84 / (1-β) steps after a gradient
    of size one. An entry with a value counts, however small.

    Args:
        buffers: Averages that already hold the values, written to.
        values: One per buffer, what was averaged last.
        beta: Weight of the old average, in [0, 1).
        accept: A 0-d boolean on the device; where it is False, every buffer keeps its bits. None means True.
    """
    bound = SMALLEST / (1 - beta)
    for buffer, value in zip(buffers, values, strict=True):
        over = (buffer.abs() <= bound).logical_and_(value == 0)
        buffer.masked_fill_(over if accept is None else over.logical_and_(accept), 0.0)


def debias(beta: float, steps: Tensor) -> Tensor:
    """Sum of the weights of an average after `steps` steps, 1 - β^steps, without cancellation for β near 1.

    Args:
        beta: In [0, 1).
        steps: Any shape, number of values averaged so far.

    Returns:
        The shape and dtype of `steps`; 0 at 0 steps, for the caller to keep from dividing by.

    Examples:
        >>> debias(0.9, torch.tensor([1.0, 2.0], dtype=torch.float64))
        tensor([0.1000, 0.1900], dtype=torch.float64)
    """
    return -torch.expm1(steps * math.log(beta)) if beta > 0 else (steps > 0).to(steps.dtype)


def look_ahead(buffers: Sequence[Tensor], gradients: Sequence[Tensor], beta: float) -> list[Tensor]:
    """Nesterov's combination (1-β) g + β m: the average as it will be if the next gradient equals this one.

    Its weights sum to 1 - β^(t+1), one step further than the buffer's; the direction is that of the heavy-ball form.

    Args:
        buffers: Averages m that already hold the gradients g.
        gradients: One per buffer.
        beta: In [0, 1).

    Returns:
        New tensors.
    """
    return list(torch._foreach_lerp(list(gradients), list(buffers), beta))
