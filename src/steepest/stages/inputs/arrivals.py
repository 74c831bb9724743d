"""Which of the inputs that were seen count: those whose gradient has come to the parameter and is still there.

Inputs are seen when a gradient passes by their layer. That need not make a gradient of the parameter:
`backward(inputs=...)` and `autograd.grad` may stop elsewhere, and what has arrived may be thrown away afterwards, by
setting it to None or to zero. So each backward pass is told apart, arrivals are heard where autograd adds to `.grad`,
and before each addition, and at the step, `.grad` is looked at: if it is empty, what was seen before no longer counts.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from steepest.ranks import is_sharded

Heard = Callable[[tuple[Tensor | None, ...]], None]
Print = tuple[int, tuple[int, ...], tuple[int, ...]]


@dataclass
class Sighting:
    """What was seen of one parameter's inputs.

    Args:
        total: Sum of z zᵀ, as its layout keeps it; None if only prints were asked for.
        mass: Sum of the tokens' weights, per matrix.
        prints: Of the tensors, to tell whether two parameters read the same.
    """

    total: Tensor | None = None
    mass: Tensor | None = None
    prints: list[Print] = field(default_factory=list[Print])

    def add(self, total: Tensor, mass: Tensor) -> None:
        """Add sums over tokens."""
        self.total = total if self.total is None or self.mass is None else self.total + total
        self.mass = mass if self.mass is None else self.mass + mass

    def join(self, other: "Sighting") -> None:
        """Add another sighting."""
        self.prints += other.prints
        if other.total is not None and other.mass is not None:
            self.add(other.total, other.mass)

    def clear_where(self, gone: Tensor) -> None:
        """Set the sums to zero, without waiting for the device.

        Args:
            gone: Whether to do so, 0-d.
        """
        if self.total is not None and self.mass is not None:
            self.total = torch.where(gone.to(self.total.device), 0, self.total)
            self.mass = torch.where(gone.to(self.mass.device), 0, self.mass)


class Arrivals:
    """Of one parameter's gradient.

    Args:
        parameter: Whose.
    """

    def __init__(self, parameter: Tensor) -> None:
        self._parameter = parameter
        self._node: Node | None = None  # which lives as long as somebody holds it, and its hook with it
        self._handle: RemovableHandle | None = None
        self._hears: Heard | None = None
        self.forget()

    def forget(self) -> None:
        """Drop what was seen."""
        self._kept: Sighting | None = None
        self._early: dict[int, Sighting] = {}  # by backward pass, whose gradient has not arrived yet
        self._handed: Sighting | None = None  # whose gradient `autograd.grad` gave to its caller
        self._came: set[int] = set()  # backward passes whose gradient has arrived
        self._blank: dict[int, Tensor] = {}  # those that saw nothing, and whether their gradient is more than zero
        self._filled: Tensor | bool = False  # whether more than zero has arrived

    def listen(self, heard: Heard) -> None:
        """Hear of gradients from now on, where autograd adds them.

        Args:
            heard: Is to call `arrived`.
        """
        self.deafen()
        if is_sharded(self._parameter):  # whose gradient is put there by FSDP, not by autograd: all that is seen counts
            return
        self._hears = heard
        if self._parameter.requires_grad:
            self._node = get_gradient_edge(self._parameter).node
            self._handle = self._node.register_prehook(heard)
            self._heard_at = self._where()

    def follow(self) -> None:
        """Listen where autograd adds by now: elsewhere once the parameter thawed, was moved or converted, even if back.

        To be called when a forward pass begins, outside of compiled graphs.
        """
        if self._hears is not None and get_gradient_edge(self._parameter).node is not self._node:
            self.listen(self._hears)

    def deafen(self) -> None:
        """Hear of none."""
        if self._handle is not None:
            self._handle.remove()
        self._node = self._handle = self._hears = None

    def arrived(self, gradient: Tensor) -> None:
        """A gradient is about to be added.

        Args:
            gradient: What is added.
        """
        self.settle()
        task, filled = torch._C._current_graph_task_id(), gradient.detach().any()
        self._came.add(task)
        self._filled = filled | self._filled
        if task in self._early:
            self._keep().join(self._early.pop(task))
        else:
            self._blank[task] = filled

    def sighting(self) -> Sighting | None:
        """Where to write what is seen in the backward pass that runs; None if it makes no gradient of the parameter."""
        if not self._parameter.requires_grad:
            return None
        if self._node is None or self._where() != self._heard_at:  # thawed or moved since, without a call in Python
            return self._keep()
        task = torch._C._current_graph_task_id()
        try:
            if not torch._C._will_engine_execute_node(self._node):
                return None
        except RuntimeError:  # so it answers where `autograd.grad` was asked for this gradient
            self._handed = self._handed or Sighting()
            return self._handed
        self._blank.pop(task, None)
        return self._keep() if task in self._came else self._early.setdefault(task, Sighting())

    def settle(self) -> None:
        """Drop what was seen of the inputs of a gradient that was thrown away; does not wait for the device."""
        gradient = self._parameter.grad
        if gradient is None:
            self._kept, self._came, self._blank, self._filled = None, set(), {}, False
        elif not is_sharded(self._parameter) and (self._came or self._kept is not None):
            gone = ~gradient.detach().any() & self._filled  # what never was anything but zero is still there
            if self._kept is not None:
                self._kept.clear_where(gone)
            self._blank = {task: filled & ~gone for task, filled in self._blank.items()}
            self._filled = ~gone & self._filled

    def known(self) -> Sighting | None:
        """What was seen of the inputs that made the gradient."""
        by_hand = not self._came and self._parameter.grad is not None
        return self._kept or (self._handed if by_hand else None)

    def unseen(self) -> bool:
        """Whether a backward pass added to the gradient but showed no inputs; may wait for the device."""
        return any(bool(filled) for filled in self._blank.values())

    def seed(self, sighting: Sighting) -> None:
        """Go on from what was seen before a checkpoint.

        Args:
            sighting: Of a gradient that is there, or will be before the next backward pass.
        """
        self.forget()
        self._kept, self._filled = sighting, True

    def _where(self) -> tuple[torch.device, torch.dtype]:
        """What autograd makes a new node after a change of."""
        return self._parameter.device, self._parameter.dtype

    def _keep(self) -> Sighting:
        self._kept = self._kept or Sighting()
        return self._kept
