"""A step with a gradient or loss that is not finite must leave no trace."""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from steepest.checks import choice

OnNonFinite = Literal["skip", "raise"]
# From the warning through this file, the step and torch's wrappers of it to the line that called step().
CALLER = 6


class NonFiniteError(ArithmeticError):
    """A gradient or the loss holds NaN or infinity, and the optimizer was told to raise."""


class Guard:
    """Decides whether a step may be taken, and remembers how many were not.

    On the CPU the answer is known at once. On an accelerator it stays on the device, as a 0-d boolean by which every
    write is masked, so that training never waits for it; the warning then comes with the next `skipped_steps()`. With
    "raise" the host must wait.

    Args:
        on_nonfinite: "skip" leaves parameters and state as they are, counts, and warns once; "raise" raises.

    Raises:
        ValueError: If `on_nonfinite` is neither.
        TypeError: If it is no text.
    """

    def __init__(self, on_nonfinite: OnNonFinite) -> None:
        self.on_nonfinite: OnNonFinite = choice(get_args(OnNonFinite))("on_nonfinite", on_nonfinite)
        self._warned = False
        self._skipped: int | Tensor = 0

    def admit(
        self, names: Callable[[], Sequence[str]], gradients: Sequence[Tensor], loss: Tensor | float | None
    ) -> bool | Tensor:
        """Whether all gradients and the loss are finite, and small enough to be averaged without overflow.

        Args:
            names: Tells the parameters' names, for the message.
            gradients: One per name.
            loss: The loss of this step, if known.

        Returns:
            True or False on the CPU, else a 0-d boolean on the first gradient's device.

        Raises:
            NonFiniteError: If something is not finite and `on_nonfinite` is "raise".
        """
        device = gradients[0].device
        if device.type == "cpu" and bool(_finite(loss, device)) and _surely_finite(gradients):
            return True
        # The largest absolute entry is finite exactly if all are; the factor leaves room for a difference of two.
        peaks = torch._foreach_norm(list(gradients), ord=torch.inf)
        wide = [peak.to(device, torch.promote_types(peak.dtype, torch.float32)) for peak in peaks]
        finite = torch.stack([(4 * peak).isfinite() for peak in wide])
        loss_finite = _finite(loss, device)
        admitted = finite.all() & loss_finite
        if device.type != "cpu" and self.on_nonfinite == "skip":
            self._skipped = self._skipped + (~admitted).long()
            return admitted
        if bool(admitted):
            return True
        culprit = "the loss" if not bool(loss_finite) else f"the gradient of {names()[int(finite.int().argmin())]!r}"
        if self.on_nonfinite == "raise":
            raise NonFiniteError(
                f"{culprit} is not finite; nothing was changed. Look for an overflow, a division by zero or a too "
                "large learning rate, or build the optimizer with on_nonfinite='skip' to pass over such steps."
            )
        self._skipped = self._skipped + 1
        self._warn(culprit)
        return False

    def skipped_steps(self) -> int:
        """Number of steps that were not taken; waits for the device, and warns if it was the first to know."""
        count = int(self._skipped)
        if count:
            self._warn("a gradient or the loss")
        return count

    def restore(self, skipped: int) -> None:
        """Continue counting from a checkpoint's number; what was skipped before was warned about before."""
        self._skipped = skipped
        self._warned = skipped > 0

    def _warn(self, culprit: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{culprit} is not finite: this step is skipped, parameters and state stay as they are. Further ones "
                "are counted in diagnostics()['skipped_steps'] without a warning.",
                RuntimeWarning,
                stacklevel=CALLER,
            )


def _surely_finite(gradients: Sequence[Tensor]) -> bool:
    """Whether sums of squares say so already, on the CPU many times faster than largest entries; False is no answer."""
    lengths = torch._foreach_norm(list(gradients))
    return all((4 * torch.stack(own)).isfinite().all() for own in _by_kind(lengths))


def _by_kind(numbers: Sequence[Tensor]) -> list[list[Tensor]]:
    found: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for number in numbers:
        found.setdefault((number.dtype, number.device), []).append(number)
    return list(found.values())


def dense_gradients(parameters: Sequence[Tensor], names: Callable[[], Sequence[str]]) -> list[Tensor]:
    """The gradients of parameters that have one.

    Args:
        parameters: With a gradient each.
        names: Tells their names, for the message.

    Raises:
        ValueError: If a gradient is sparse.
    """
    gradients = [cast(Tensor, parameter.grad) for parameter in parameters]
    for index, gradient in enumerate(gradients):
        if gradient.layout is not torch.strided:
            raise ValueError(
                f"The gradient of {names()[index]!r} has layout {gradient.layout}, but a dense one is needed. "
                "Build the embedding with sparse=False."
            )
    return gradients


def _finite(loss: Tensor | float | None, device: torch.device) -> bool | Tensor:
    """Without moving anything to the device that is not there yet."""
    if isinstance(loss, Tensor):
        return loss.detach().isfinite().all().to(device)
    return loss is None or math.isfinite(loss)
