"""A step with a gradient or loss that is not finite must leave no trace."""

import math
from collections.abc import Callable, Sequence
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from steepest.checks import choice
from steepest.notices import warn
from steepest.optim.replay import kept
from steepest.ranks import local

OnNonFinite = Literal["skip", "raise"]
"""What a gradient or loss that is not finite does to a step: it is passed over, or raises."""

REMEDY = (
    "Look for an overflow, a division by zero or a too large learning rate, or build the optimizer with "
    "on_nonfinite='skip' to pass over such steps."
)


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
        """Whether what this rank has of gradients and the loss is finite, and can be averaged without overflow.

        Args:
            names: Tells the parameters' names, for the message.
            gradients: One per name.
            loss: The loss of this step, if known.

        Returns:
            True or False on the CPU, else a 0-d boolean on the first gradient's device.

        Raises:
            NonFiniteError: If something is not finite and `on_nonfinite` is "raise".
        """
        named = [(name, part) for name, part in enumerate(local(gradients)) if part.numel()]
        own = [part for _, part in named]
        if not gradients:
            return bool(_finite(loss, torch.device("cpu"))) or self._refuse("the loss is not finite")
        device = own[0].device if own else gradients[0].device
        quick = device.type == "cpu" and bool(_finite(loss, device)) and _surely_finite(own)
        if quick:
            return True
        # The largest absolute entry is finite exactly if all are; the factor leaves room for a difference of two.
        peaks = torch._foreach_norm(own, ord=torch.inf) if own else ()
        wide = [peak.to(device, torch.promote_types(peak.dtype, torch.float32)) for peak in peaks]
        finite = (
            torch.stack([(4 * peak).isfinite() for peak in wide])
            if wide
            else torch.ones(1, dtype=torch.bool, device=device)
        )
        loss_finite = _finite(loss, device)
        admitted = finite.to(device).all() & loss_finite
        if device.type != "cpu" and self.on_nonfinite == "skip":
            self._count(~admitted)
            return admitted
        if bool(admitted):
            return True
        if not bool(loss_finite):
            return self._refuse("the loss is not finite")
        worst = int(finite.int().argmin())
        most = torch.finfo(wide[worst].dtype).max
        kind = f"above {most / 4:.2g}, too large" if bool(wide[worst].isfinite()) else "not finite"
        return self._refuse(f"the gradient of {names()[named[worst][0]]!r} is {kind}")

    def follow(self, admitted: bool | Tensor, all_fine: bool | Tensor, loss: Tensor | float | None) -> bool | Tensor:
        """Pass over a step that another rank cannot take.

        Args:
            admitted: What `admit` and `restrict` said of this rank.
            all_fine: Whether no rank refused it.
            loss: What all ranks share.

        Returns:
            As `admit`.

        Raises:
            NonFiniteError: If another rank cannot take it and `on_nonfinite` is "raise".
        """
        if admitted is False or all_fine is True:
            return admitted
        if isinstance(admitted, Tensor) and isinstance(all_fine, Tensor) and self.on_nonfinite == "skip":
            self._count(~all_fine & admitted)
            return all_fine & admitted
        if bool(all_fine):
            return admitted
        finite = bool(_finite(loss, torch.device("cpu")))
        elsewhere = "a gradient is not finite on another rank, or the step was refused there"
        return self._refuse(elsewhere if finite else "the loss is not finite")

    def restrict(self, admitted: bool | Tensor, rates: Sequence[Tensor]) -> bool | Tensor:
        """Take back what was admitted where a learning rate or the like on an accelerator is out of its range.

        Args:
            admitted: What `admit` returned.
            rates: Whether each of them is in its range, 0-d.

        Returns:
            As `admit`.

        Raises:
            NonFiniteError: If one is not and `on_nonfinite` is "raise".
        """
        if not rates or admitted is False:
            return admitted
        device = admitted.device if isinstance(admitted, Tensor) else rates[0].device
        allowed = torch.stack([rate.to(device) for rate in rates]).all()
        if self.on_nonfinite == "raise" and not bool(allowed):
            raise NonFiniteError(
                "A learning rate, a momentum or a decay that is a tensor is not finite, negative or too large; nothing "
                "was changed. Look at what writes into the parameter groups."
            )
        self._count(~allowed & admitted)
        return allowed & admitted

    def made(
        self, names: Callable[[], Sequence[Sequence[str]]], fine: Sequence[bool | Tensor], accept: Tensor | None
    ) -> bool:
        """Count a step with a move that was not made because weights would not have stayed finite.

        Args:
            names: Tells the parameters' names of each move, for the message.
            fine: Whether each move was made.
            accept: A 0-d boolean; where it is False nothing was to be made. None means True.

        Returns:
            Whether one was seen not to be.

        Raises:
            NonFiniteError: If one was not made and `on_nonfinite` is "raise".
        """
        unread = [flag for flag in fine if isinstance(flag, Tensor)]
        refused = [place for place, flag in enumerate(fine) if flag is False]
        if self.on_nonfinite == "skip" and (unread or accept is not None):
            flags = [flag.to(unread[0].device) for flag in unread]
            bad = ~torch.stack(flags).all() if flags and not refused else torch.tensor(bool(refused), device="cpu")
            self._count(bad if accept is None else bad.to(accept.device) & accept)
            return False
        refused += [place for place, flag in enumerate(fine) if isinstance(flag, Tensor) and not bool(flag)]
        if not refused:
            return False
        own = names()
        left = [name for place in refused for name in own[place]]
        which = ", ".join(map(repr, left[:3])) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
        told = (
            f"the step for {which} is not finite though the gradients are: "
            f"{'no weight was' if len(refused) == len(fine) else 'these weights were not'} changed, and averages hold "
            "the gradients of this step"
        )
        if self.on_nonfinite == "raise":
            raise NonFiniteError(f"{told}. {REMEDY}")
        self._skipped = self._skipped + 1
        self._warn(told)
        return True

    def _count(self, skipped: Tensor | bool) -> None:
        """One step more where `skipped` holds; what is on a device is counted there."""
        total = self._skipped + (skipped.long() if isinstance(skipped, Tensor) else int(skipped))
        known = self._skipped if isinstance(self._skipped, Tensor) else None
        self._skipped = kept(known, total) if isinstance(total, Tensor) else total

    @property
    def skipped(self) -> int | Tensor:
        """Number of steps that were not taken, written in place where it is on a device; nothing is waited for."""
        return self._skipped

    def skipped_steps(self) -> int:
        """Number of steps that were not taken; waits for the device, and warns if it was the first to know."""
        count = int(self._skipped)
        if count:
            self._warn("a gradient, the loss or the step itself is not finite: the step is skipped")
        return count

    def restore(self, skipped: int) -> None:
        """Continue counting from a checkpoint's number; what was skipped before was warned about before."""
        self._skipped = skipped
        self._warned = skipped > 0

    def _refuse(self, culprit: str) -> Literal[False]:
        if self.on_nonfinite == "raise":
            raise NonFiniteError(f"{culprit}; nothing was changed. {REMEDY}")
        self._skipped = self._skipped + 1
        self._warn(f"{culprit}: this step is skipped, parameters and state stay as they are")
        return False

    def _warn(self, told: str) -> None:
        if not self._warned:
            self._warned = True
            warn(
                f"{told}. Further ones are counted in diagnostics()['skipped_steps'] without a warning.",
                RuntimeWarning,
            )


def _surely_finite(gradients: Sequence[Tensor]) -> bool:
    """Whether sums of squares say so already, on the CPU many times faster than largest entries; False is no answer."""
    lengths = torch._foreach_norm(list(gradients)) if gradients else ()
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
        ValueError: If a gradient is sparse, or not of its parameter's shape or device.
        TypeError: If a gradient is not of real floating point.
    """
    gradients = [cast(Tensor, parameter.grad) for parameter in parameters]
    for index, (gradient, parameter) in enumerate(zip(gradients, parameters, strict=True)):
        if gradient.layout is not torch.strided:
            raise ValueError(
                f"The gradient of {names()[index]!r} has layout {gradient.layout}, but a dense one is needed. "
                "Build the embedding with sparse=False."
            )
        if gradient.shape != parameter.shape or gradient.device != parameter.device:
            raise ValueError(
                f"The gradient of {names()[index]!r} has shape {tuple(gradient.shape)} on {gradient.device}, but the "
                f"parameter has shape {tuple(parameter.shape)} on {parameter.device}. Clear it with zero_grad() and "
                "run backward() again after changing a parameter."
            )
        if not gradient.is_floating_point():
            raise TypeError(
                f"The gradient of {names()[index]!r} must be of real floating point, got {gradient.dtype}. Write "
                "gradients of the parameter's own type."
            )
    return gradients


def _finite(loss: Tensor | float | None, device: torch.device) -> bool | Tensor:
    """Without moving anything to the device that is not there yet."""
    if isinstance(loss, Tensor):
        return loss.detach().isfinite().all().to(device)
    return loss is None or math.isfinite(loss)
