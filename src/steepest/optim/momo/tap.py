"""The loss of a step, whichever way it arrives: explicitly, recorded per micro-batch, or from the closure."""

import math
from dataclasses import dataclass, field
from functools import partial
from numbers import Real
from typing import Any

from torch import Tensor

from steepest.checks import refusal
from steepest.optim.momo.arrivals import begins
from steepest.ranks import is_sharded, local

Loss = Tensor | float
OFF = 1.4  # times: less may be another term of the loss, twice is a part that was divided twice
CLOSE = 1.01  # times, likewise, where weights sum to less than 1
TOLERANCE = 1e-4  # of the sum of weights: a ninth of nine micro-batches, in float32

MISSING = (
    "Momo needs the loss whose gradient is present. Pass it in one of three ways: optimizer.step(loss=loss); "
    "optimizer.record_loss(loss, weight=1 / micro_batches) after each forward pass, then optimizer.step(); or "
    "optimizer.step(closure) with a closure that returns the loss. For loops of other libraries, steepest.integrations "
    "has what tells it: MomoTrainer for transformers' Trainer, record_loss for accelerate, a callback for Lightning. "
    "For the method without Momo use step_size=Fixed()."
)


@dataclass
class Entry:
    """The loss of a micro-batch.

    Args:
        part: Its mean loss, times its part of the batch.
        weight: Its part of the batch; None: not told, all parts that are added up make the mean.
        expected: What backward is to multiply the recorded loss by, its scale not counted.
        scale: What it was multiplied by already, against underflow.
        received: What each pass multiplied it by, where it has a graph.
        lost: Whether gradients were cleared since backward ran for it.
    """

    part: Loss
    weight: float | None
    expected: float
    scale: float = 1.0
    received: list[Tensor] = field(default_factory=list[Tensor])
    lost: bool = False


class LossTap:
    """Collects the losses of micro-batches until a step takes their weighted mean."""

    def __init__(self) -> None:
        self._entries: list[Entry] = []
        self._taken: list[Entry] = []
        self._cleared = False

    def record(
        self, loss: Loss, weight: float | None = None, *, already_divided: bool = False, scale: float = 1.0
    ) -> None:
        """Add a micro-batch.

        Args:
            loss: One number.
            weight: Its part of the batch.
            already_divided: Whether the loss was multiplied by that already.
            scale: What else it was multiplied by.

        Raises:
            ValueError: If the loss is not one real number, the weight is not in (0, 1], the scale is not above 0, or
                only some have a weight.
            TypeError: If one is of the wrong type.
        """
        if weight is None and not already_divided:
            weight = 1.0
        if isinstance(weight, bool) or not isinstance(weight, Real | None):
            raise TypeError(f"record_loss takes a number as weight, got {weight!r}.")
        if weight is not None and not 0 < weight <= 1 + TOLERANCE:
            raise ValueError(
                f"record_loss takes a weight in (0, 1], the micro-batch's part of the batch, got {weight}."
            )
        if isinstance(scale, bool) or not isinstance(scale, Real):
            raise TypeError(f"record_loss takes a number as scale, such as scaler.get_scale(), got {scale!r}.")
        scale = float(scale)
        if not 0 < scale < math.inf:
            raise ValueError(f"record_loss takes a finite scale above 0, got {scale}.")
        given = check_loss("record_loss", loss) / scale
        if self._cleared:
            self._entries = [entry for entry in self._entries if not entry.lost]
            if self._whole():
                self.clear()
        self._cleared = False
        if self._entries and (self._entries[-1].weight is None) != (weight is None):
            raise ValueError(
                "record_loss was told the weight of some micro-batches of a step only. Tell all of them, or none: the "
                "losses that were already_divided then add up to the mean loss of the batch."
            )
        part = given if already_divided else given * float(weight or 1.0)
        expected = 1.0 if already_divided else float(weight or 1.0)
        entry = Entry(part, None if weight is None else float(weight), expected, scale)
        self._entries.append(entry)
        if isinstance(loss, Tensor) and loss.requires_grad:
            loss.register_hook(partial(_receive, entry.received))

    def gradients_cleared(self) -> None:
        """What was recorded so far may belong to gradients that are gone; the next record decides."""
        self._cleared = True
        for entry in self._entries:  # else its backward comes after this
            entry.lost = bool(entry.received)

    def _whole(self) -> bool:
        """Whether a batch is complete, whose step was passed over, as loss scaling does, if another loss comes."""
        weights = [entry.weight for entry in self._entries]
        return None not in weights and math.fsum(weight or 0.0 for weight in weights) > 1 - TOLERANCE

    def clear(self) -> None:
        """Forget everything."""
        self._entries, self._cleared = [], False

    def take(self) -> tuple[Loss | None, float]:
        """The weighted mean of what was recorded, forgotten here, and the sum of the weights.

        Returns:
            None if nothing was recorded; and the sum, 1 but for rounding of a whole batch. Less: gradients are that
            part of the mean loss', as of a window of micro-batches that is shorter than what its losses were divided
            by; `check_weights` says whether that is so.

        Raises:
            ValueError: If the weights sum to more than 1. What was recorded is forgotten then, too.
        """
        kept = [entry for entry in self._entries if not entry.lost]
        entries = self._taken = kept or self._entries  # a penalty on gradients runs backward before these are cleared
        self.clear()
        if not entries:
            return None, 1.0
        total = 1.0 if entries[0].weight is None else math.fsum(entry.weight or 0.0 for entry in entries)
        if total > 1 + TOLERANCE:
            raise ValueError(_unequal(entries, total))
        part = sum((entry.part for entry in entries), start=0.0)
        return (part, 1.0) if total > 1 - TOLERANCE else (part / total, total)

    def check_window(self, total: float, passes: int) -> None:
        """Refuse weights that sum to less than 1, unless backward is known to have run for each loss alone.

        Args:
            total: The sum.
            passes: Backward passes since gradients were new.

        Raises:
            ValueError: If so.
        """
        entries = self._taken
        if total < 1 and not (len(entries) == passes and all(len(entry.received) == 1 for entry in entries)):
            raise ValueError(_unequal(entries, total))

    def check_weights(self, undone: float) -> None:
        """Refuse losses that backward did not multiply with the weights that were told; reads what it did.

        Passes may be of some parameters each, or may leave no gradients, as of a penalty on them: one of them, or all
        together, must fit.

        Args:
            undone: What gradients were multiplied by since, clipping not counted: one over the scale of a GradScaler.

        Raises:
            ValueError: If one was multiplied by something else.
        """
        weights = [entry.weight for entry in self._taken if entry.weight is not None]
        off = CLOSE if weights and math.fsum(weights) < 1 - TOLERANCE else OFF
        for entry in self._taken:
            factors = [float(factor) * entry.scale * undone for factor in entry.received]
            total, expected = math.fsum(factors), entry.expected
            if not factors or not math.isfinite(total):
                continue
            if any(expected / off < factor < expected * off for factor in (*factors, total)):
                continue
            if entry.weight is None or entry.expected != entry.weight:
                raise ValueError(
                    f"record_loss was told that this loss is already divided, but backward multiplied it by {total:g} "
                    "besides. Record what backward() is called on, before it is scaled."
                )
            raise ValueError(
                f"record_loss was told weight={entry.weight:g}, but backward multiplied this loss by {total:g}. "
                "Record the loss as it is before it is divided by the number of micro-batches or scaled: "
                "record_loss(loss, weight=1 / micro_batches); (loss / micro_batches).backward(). Or record what "
                "is already divided: record_loss(loss / micro_batches, already_divided=True)."
            )

    @property
    def told(self) -> bool:
        """Whether something was recorded that no step has taken yet."""
        return bool(self._entries)

    @property
    def parts(self) -> int:
        """How many losses the last step was told."""
        return len(self._taken)


def _unequal(entries: list[Entry], total: float) -> str:
    return (
        f"{len(entries)} recorded losses have weights that sum to {total:g} instead of 1: a micro-batch is missing or "
        "was recorded twice. Record each with weight=1 / micro_batches, before every step. If a step was passed over, "
        "clear its gradients with optimizer.zero_grad(), which forgets its losses, too. A window with fewer micro-"
        "batches is known by their losses' graphs: record tensors, before backward()."
    )


def _receive(received: list[Tensor], factor: Tensor) -> None:
    begins()
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
