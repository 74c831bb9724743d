"""The loss of a step, whichever way it arrives: explicitly, recorded per micro-batch, or from the closure."""

import math
from functools import partial
from numbers import Real
from typing import Any

from torch import Tensor

from steepest.checks import refusal
from steepest.ranks import is_sharded, local

Loss = Tensor | float
OFF = 1.4  # times: less may be another term of the loss, twice is a part that was divided twice
TOLERANCE = 1e-4  # of the sum of weights: a ninth of nine micro-batches, in float32

MISSING = (
    "Momo needs the loss whose gradient is present. Pass it in one of three ways: optimizer.step(loss=loss); "
    "optimizer.record_loss(loss, weight=1 / micro_batches) after each forward pass, then optimizer.step(); or "
    "optimizer.step(closure) with a closure that returns the loss. For the method without Momo use step_size=Fixed()."
)


class LossTap:
    """Collects the losses of micro-batches until a step takes their weighted sum."""

    def __init__(self) -> None:
        self._entries: list[tuple[Tensor | float, float]] = []
        self._received: list[list[Tensor]] = []  # what each pass multiplied an entry by, where it has a graph
        self._taken: list[tuple[float, list[Tensor]]] = []
        self._cleared = False

    def record(self, loss: Loss, weight: float) -> None:
        """Add a micro-batch.

        Args:
            loss: Its mean loss; one number.
            weight: Its part of the batch; all weights of a step sum to 1.

        Raises:
            ValueError: If the loss is not one real number, or the weight is not in (0, 1].
            TypeError: If one is of the wrong type.
        """
        if isinstance(weight, bool) or not isinstance(weight, Real):
            raise TypeError(f"record_loss takes a number as weight, got {weight!r}.")
        if not 0 < weight <= 1 + TOLERANCE:
            raise ValueError(
                f"record_loss takes a weight in (0, 1], the micro-batch's part of the batch, got {weight}."
            )
        entry = check_loss("record_loss", loss)
        # The gradient of an earlier, complete batch was thrown away: loss scaling passed over its step.
        if self._cleared and self._total() > 1 - TOLERANCE:
            self.clear()
        self._cleared = False
        self._entries.append((entry, float(weight)))
        self._received.append([])
        if isinstance(loss, Tensor) and loss.requires_grad:
            loss.register_hook(partial(_receive, self._received[-1]))

    def gradients_cleared(self) -> None:
        """What was recorded so far may belong to gradients that are gone; the next record decides."""
        self._cleared = True

    def clear(self) -> None:
        """Forget everything."""
        self._entries, self._received, self._cleared = [], [], False

    def take(self) -> Loss | None:
        """The weighted sum, forgotten here; None if nothing was recorded.

        Raises:
            ValueError: If the weights do not sum to 1. What was recorded is forgotten then, too.
        """
        entries, total = self._entries, self._total()
        self._taken = [(weight, got) for (_, weight), got in zip(entries, self._received, strict=True)]
        self.clear()
        if not entries:
            return None
        if abs(total - 1) > TOLERANCE:
            raise ValueError(
                f"{len(entries)} recorded losses have weights that sum to {total:g} instead of 1: a micro-batch is "
                "missing or was recorded twice. Record each with weight=1 / micro_batches, before every step. If a "
                "step was passed over, clear its gradients with optimizer.zero_grad(), which forgets its losses, too."
            )
        return sum((loss * weight for loss, weight in entries), start=0.0)

    def check_weights(self, undone: float) -> None:
        """Refuse losses that backward did not multiply with the weights that were told; reads what it did.

        Passes may be of some parameters each, or may leave no gradients, as of a penalty on them: one of them, or all
        together, must fit.

        Args:
            undone: What gradients were multiplied by since, clipping not counted: one over the scale of a GradScaler.

        Raises:
            ValueError: If one was multiplied by something else.
        """
        for weight, received in self._taken:
            factors = [float(factor) * undone for factor in received]
            total = math.fsum(factors)
            if not factors or not math.isfinite(total):
                continue
            if not any(weight / OFF < factor < weight * OFF for factor in (*factors, total)):
                raise ValueError(
                    f"record_loss was told weight={weight:g}, but backward multiplied this loss by {total:g}. Record "
                    "the loss as it is before it is divided by the number of micro-batches or scaled: "
                    "record_loss(loss, weight=1 / micro_batches); (loss / micro_batches).backward()."
                )

    @property
    def told(self) -> bool:
        """Whether something was recorded that no step has taken yet."""
        return bool(self._entries)

    @property
    def parts(self) -> int:
        """How many losses the last step was told."""
        return len(self._taken)

    def _total(self) -> float:
        return math.fsum(weight for _, weight in self._entries)


def _receive(received: list[Tensor], factor: Tensor) -> None:
    received.append(local([factor])[0].detach().sum())


def check_closure(closure: object) -> None:
    """Refuse what cannot be called, a loss most likely.

    Raises:
        TypeError: If so.
    """
    if not callable(closure):
        remedy = "A loss is passed by name: write step(loss=loss)."
        raise TypeError(refusal("closure", "a function that computes the loss", closure, remedy))


def check_loss(caller: str, loss: object) -> Loss:
    """Refuse what cannot be the loss of a step.

    Args:
        caller: For the message.
        loss: What was given.

    Returns:
        A number, or a 0-d tensor without a graph.

    Raises:
        ValueError: If it is not one number, or this rank has a part of it only.
        TypeError: If it is not real.
    """
    if isinstance(loss, Tensor):
        if parts := _parts(loss):
            raise ValueError(
                f"{caller} takes one number as loss, got a DTensor with placements {parts}, of which each rank has a "
                "part. Pass loss.full_tensor(), on all ranks."
            )
        if loss.numel() != 1:
            raise ValueError(
                f"{caller} takes one number as loss, got shape {tuple(loss.shape)}. Reduce it as for backward(), "
                "for example with .mean()."
            )
        if not loss.is_floating_point():
            raise TypeError(f"{caller} takes a real loss, got a tensor of {loss.dtype}.")
        return local([loss])[0].detach().reshape(())
    if isinstance(loss, bool) or not isinstance(loss, Real):
        raise TypeError(f"{caller} takes a number or a tensor as loss, got {loss!r}.")
    return float(loss)


def _parts(loss: Any) -> tuple[Any, ...]:
    """The placements of a loss of which ranks have different parts; none of any other."""
    if not is_sharded(loss) or all(placement.is_replicate() for placement in loss.placements):
        return ()
    return tuple(loss.placements)
