"""Calls after each step of an optimizer, for objects that stand beside it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim.optimizer import Optimizer

from steepest.checks import refusal
from steepest.optim.descent import SteepestDescent


@dataclass(frozen=True)
class Following:
    """What `follow` returns; copies and pickles of the optimizer do not have it.

    Args:
        handles: Of torch's hooks.
    """

    handles: tuple[Any, ...]

    def remove(self) -> None:
        """From here on the optimizer's steps are not followed."""
        for handle in self.handles:
            handle.remove()


def follow(optimizer: Any, before: Callable[[], None] | None, after: Callable[[bool | Tensor], None]) -> Following:
    """Call something before and after each step.

    Args:
        optimizer: Any of torch's kind, or what a host wraps one in.
        before: Called before the step looks at gradients; None: nothing.
        after: Called when the step is done, with whether it was taken: False for one that was passed over because
            something was not finite; 0-d where that is on a device, and is not read. Not called if the step raises.

    Raises:
        TypeError: If there is no optimizer.
    """
    inner = opened(optimizer)[-1]
    if not isinstance(inner, Optimizer):
        raise TypeError(refusal("optimizer", "a torch optimizer, or what wraps one", optimizer))
    skipped: list[int | Tensor] = [0]

    def pre(*_: Any) -> None:
        skipped[0] = _skipped(inner)
        if before is not None:
            before()

    def post(*_: Any) -> None:
        taken = _taken(inner, skipped[0])
        after(bool(taken) if isinstance(taken, Tensor) and taken.device.type == "cpu" else taken)

    return Following((inner.register_step_pre_hook(pre), inner.register_step_post_hook(post)))


def opened(optimizer: Any) -> list[Any]:
    """An optimizer and what is inside of it, which hosts' wrappers have as `.optimizer` or `._optimizer`.

    Args:
        optimizer: Wrapped any number of times, or not; the outermost stands first.
    """
    chain = [optimizer]
    # Lightning's and Fabric's wrappers pretend to be of the class that they wrap, so all are opened.
    while (inner := _inside(chain[-1])) is not None and not any(inner is one for one in chain):
        chain.append(inner)
    return chain


def _inside(wrapper: Any) -> Any:
    return getattr(wrapper, "optimizer", None) or getattr(wrapper, "_optimizer", None)


def _taken(optimizer: Optimizer, skipped: int | Tensor) -> bool | Tensor:
    found: object = getattr(optimizer, "found_inf", None)
    if isinstance(found, Tensor):  # GradScaler leaves it to torch's fused optimizers to pass over a step
        return found.reshape(()) == 0
    return _skipped(optimizer) == skipped


def _skipped(optimizer: Optimizer) -> int | Tensor:
    if not isinstance(optimizer, SteepestDescent):
        return 0  # others leave such a step to whoever calls them
    count = optimizer.skipped_steps
    return count.clone() if isinstance(count, Tensor) else count  # it is written in place
