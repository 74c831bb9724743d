"""Notices gradients that were clipped between backward and step, which a model of the loss cannot be right with."""

import math
import warnings
import weakref
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

ENTRIES = 64
CALLER = 5  # from the warning through this file, the step and torch's wrappers of it to the line that called step()


class Witness:
    """Remembers a few entries of one gradient as backward left them, and compares them when the step comes.

    What multiplies gradients by one number at every step, or by powers of two, is no clipping but scaling, of a sum
    to a mean or of the loss against underflow; so a factor is looked at in relation to the one before.

    Args:
        parameters: The one with the fewest entries is watched.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._seen: Tensor | None = None
        self._looks = 0
        self._warned = False
        self._ratio: float | None = None
        watched = min((p for p in parameters if p.requires_grad and p.numel()), key=Tensor.numel, default=None)
        if watched is not None:
            # Weakly: the parameter may outlive the optimizer.
            own: weakref.ref[Witness] = weakref.ref(cast(Witness, self))
            handle = watched.register_post_accumulate_grad_hook(lambda p: _note(own, p))
            weakref.finalize(self, handle.remove)
        self._watched = watched

    def look(self) -> None:
        """Warn once if the gradient is not what backward left; waits for the device at steps 1, 2, 4, 8, ... only."""
        seen, self._seen = self._seen, None
        self._looks += 1
        if self._warned or seen is None or self._watched is None or self._watched.grad is None:
            return
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return  # averaging over ranks changes gradients, too
        if seen.device.type != "cpu" and self._looks & (self._looks - 1):
            return
        now = _sample(self._watched.grad)
        if now.shape != seen.shape or not seen.any():
            return
        ratio = float((now * seen).sum() / seen.square().sum())
        if not math.isfinite(ratio):  # an overflow, which others care for
            return
        before, self._ratio = self._ratio, ratio
        octaves = math.log2(ratio / before) if before is not None and ratio / before > 0 else 0.0
        if ratio <= 0 or abs(octaves - round(octaves)) > 1e-4:
            self._warned = True
            warnings.warn(
                f"Gradients were changed between backward and step (by a factor of about {ratio:.3g}), as by clipping. "
                "Momo's model of the loss is then wrong: leave clipping out, its step size already bounds the step.",
                UserWarning,
                stacklevel=CALLER,
            )

    def __getstate__(self) -> dict[str, object]:
        """For copy and pickle: a copy watches nothing, as hooks stay with the original's parameters."""
        return {**self.__dict__, "_seen": None, "_watched": None}


def _note(witness: "weakref.ref[Witness]", parameter: Tensor) -> None:
    alive = witness()
    if alive is not None and parameter.grad is not None and parameter.grad.layout == torch.strided:
        alive._seen = _sample(parameter.grad)


def _sample(gradient: Tensor) -> Tensor:
    return gradient.detach().flatten()[:ENTRIES].float().clone()
