"""Looks at gradients when they arrive: which passes made them, and what backward left before others touch it."""

import math
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.hooks import unserializable_hook

from steepest.notices import warn
from steepest.ranks import is_sharded, local

ENTRIES = 64  # of a gradient, by which it is recognised without a pass over it
WATCHED = 8  # parameters: one of each of the first groups

STACKED = (
    "step(closure): gradients of earlier backward passes were there before the closure ran, and it added to them, as "
    "under accumulation. The loss that it returned is that of its own pass, and Momo needs the loss of them all: call "
    "optimizer.record_loss(loss, weight=1 / micro_batches) in every micro-batch, with the loss before it is divided, "
    "or pass the mean with step(loss=mean). In Lightning, RecordLoss of steepest.integrations.lightning does that. If "
    "these gradients are left from an earlier step, clear them with optimizer.zero_grad() before the closure's "
    "backward pass."
)

_began: list[int] = []  # the backward pass that is on its way from a recorded loss


def begins() -> None:
    """A backward pass begins, at a recorded loss: those inside of it, as of reentrant checkpoints, are parts of it."""
    task = torch._C._current_graph_task_id()
    if task != -1 and task not in _began:
        _began[:] = [task]
        _queue(lambda: _began.remove(task) if task in _began else None)


class Arrivals:
    """Watches one parameter of each group, in every backward pass; of a sharded one, what this rank keeps."""

    def __init__(self) -> None:
        self.watched: list[Tensor] = []
        self.seen: list[Tensor | None] = []  # entries of the watched gradients as the last pass left them
        self._task = self._pass = -1  # which gradients came in, and of which that is a part
        self.passes = 0  # backward passes since gradients were new
        self._total = 0
        self._zeroed = False  # and nothing arrived since
        self._left: list[weakref.ref[Tensor] | None] = []  # the watched gradients of the last pass
        self._at_entry: dict[
            int, tuple[int, Tensor | None]
        ] = {}  # of the watched gradients when the closure was called
        self._entered = 0
        self._stacked: list[Tensor] = []

    def watch(self, group: Sequence[Tensor]) -> None:
        """Watch one more parameter: the smallest that has entries enough for all who keep a part, else the largest.

        Args:
            group: To choose from; all ranks choose the same.
        """
        able = [p for p in group if p.requires_grad and p.numel()]
        if not able or len(self.watched) == WATCHED:
            return
        counts = {p: p.numel() / _keepers(p) for p in able}
        chosen = min(able, key=lambda p: (counts[p] < ENTRIES, counts[p] if counts[p] >= ENTRIES else -counts[p]))
        # Weakly: the parameter may outlive the optimizer.
        own: weakref.ref[Arrivals] = weakref.ref(cast(Arrivals, self))
        index = len(self.watched)
        handles = [chosen.register_hook(unserializable_hook(partial(_arrives, own, index)))]
        if is_sharded(chosen):  # FSDP2 tells of gradients only afterwards
            handles.append(chosen.register_post_accumulate_grad_hook(partial(_arrived, own, index)))
        for handle in handles:
            weakref.finalize(self, handle.remove)
        self.watched.append(chosen)

    @property
    def sharded(self) -> bool:
        """Whether all that is watched is, so that ranks average gradients before they are seen."""
        return all(is_sharded(parameter) for parameter in self.watched)

    def zeroed(self) -> None:
        """Gradients were cleared."""
        _began.clear()  # it did not end, if it was stopped by an error
        self.passes, self._zeroed = 0, True

    def stepped(self) -> None:
        """A step was made of them."""
        self.passes, self.seen = 0, []

    def enter(self) -> None:
        """A closure is about to be called."""
        present = [] if self._zeroed else [(i, p.grad) for i, p in enumerate(self.watched)]
        self._at_entry = {index: (g._version, _nonzero_shard(g)) for index, g in present if g is not None}
        self._entered, self._stacked = self._total, []

    def check_closure(self) -> None:
        """Refuse the loss of a closure that added to gradients of earlier passes; waits for the device if it may have.

        Raises:
            ValueError: If it did.
        """
        stacked, self._stacked, self._at_entry = self._stacked, [], {}
        if any(bool(one) for one in stacked):  # else they were zeros
            raise ValueError(STACKED)
        if self._total == self._entered and self.passes > 1:
            warn(
                f"step(closure): the closure made no gradients; those present are of {self.passes} backward passes. "
                "Momo takes what it returned for the loss of them all. If it is that of the last micro-batch, call "
                "optimizer.record_loss(loss, weight=1 / micro_batches) in every micro-batch instead."
            )

    def arrives(self, index: int) -> None:
        """A gradient is about to be added to a parameter's.

        Args:
            index: Of the watched parameter.
        """
        gradient, (version, _) = self.watched[index].grad, self._at_entry.pop(index, (None, None))
        if gradient is not None and gradient._version == version:  # nobody wrote to it since, not even zeros
            self._stacked.append(local([gradient])[0].detach().any())
        self.arrived()

    def came(self, index: int) -> None:
        """A gradient was added to a sharded parameter's.

        Args:
            index: Of the watched parameter.
        """
        gradient, (version, before) = self.watched[index].grad, self._at_entry.pop(index, (None, None))
        # FSDP2 writes past this count, zero_() does not; what hides zeros from it hides them here
        if gradient is not None and gradient._version == version and self._is_old(index) and before is not None:
            self._stacked.append(before)
        self.arrived()

    def arrived(self) -> None:
        """Look at the gradients when this pass is over."""
        task = torch._C._current_graph_task_id()
        if task == -1:  # it is
            return self.passed()
        if task == self._task:
            return None
        whole = next(iter(_began), task)
        if whole != self._pass:
            self.passes = 1 + self.passes * any(map(self._is_old, range(len(self.watched))))
            self._total += 1
        self._task, self._pass, self._zeroed = task, whole, False
        own: weakref.ref[Arrivals] = weakref.ref(cast(Arrivals, self))
        # Twice: what averages gradients over ranks may have asked later to be called, so it comes in between.
        _queue(lambda: _queue(partial(_passed, own)))
        return None

    def passed(self) -> None:
        """The pass is over."""
        gradients = [parameter.grad for parameter in self.watched]
        self._left = [None if g is None else weakref.ref(g) for g in gradients]
        self.seen = [
            None if g is None or g.layout != torch.strided else spaced(local([g])[0]).clone() for g in gradients
        ]

    def _is_old(self, index: int) -> bool:
        """Whether a parameter has a gradient of an earlier pass, also when this one's may be there already."""
        parameter = self.watched[index]
        if parameter.grad is None or not is_sharded(parameter):
            return parameter.grad is not None
        left = self._left[index] if index < len(self._left) else None
        return left is not None and left() is parameter.grad

    def __getstate__(self) -> dict[str, object]:
        """For copy and pickle: a copy watches nothing, as hooks stay with the original's parameters."""
        return Arrivals().__dict__


def _queue(callback: Callable[[], None]) -> None:
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def _arrives(own: "weakref.ref[Arrivals]", index: int, _: Tensor) -> None:
    if (alive := own()) is not None:
        alive.arrives(index)


def _arrived(own: "weakref.ref[Arrivals]", index: int, _: Tensor) -> None:
    if (alive := own()) is not None:
        alive.came(index)


def _passed(own: "weakref.ref[Arrivals]") -> None:
    if (alive := own()) is not None:
        alive.passed()


def _keepers(parameter: Any) -> int:
    """How many ranks keep a part of a parameter."""
    return parameter.device_mesh.size() if is_sharded(parameter) else 1


def _nonzero_shard(gradient: Tensor) -> Tensor | None:
    """Whether this rank's part of a sharded gradient is not zero; None of others, which are asked later."""
    return local([gradient])[0].detach().any() if is_sharded(gradient) else None


def spaced(tensor: Tensor) -> Tensor:
    """At most 64 entries, evenly spaced in memory; all of a small tensor.

    Args:
        tensor: Of any shape.

    Returns:
        One dimension; a view without a graph, unless the tensor has gaps in memory, then a copy.
    """
    dense = tensor.detach()
    flat = dense.permute(sorted(range(dense.ndim), key=dense.stride, reverse=True)).reshape(-1)
    stride = max(1, math.ceil(flat.numel() / ENTRIES))
    row = tensor.size(-1) if tensor.ndim else 1
    while math.gcd(stride, row) != 1:  # else all entries could be of one column
        stride -= 1
    return flat[::stride][:ENTRIES]
