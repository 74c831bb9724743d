"""The optimizer inside what a host wraps it in."""

from typing import Any

from steepest.checks import shown
from steepest.optim import SteepestDescent
from steepest.optim.follow import opened


def unwrapped(optimizer: Any) -> SteepestDescent:
    """The optimizer of this library inside a wrapper: for `record_loss`, `plan`, `diagnostics`, which wrappers hide.

    Args:
        optimizer: It, or what wraps it once or more: Accelerate's `AcceleratedOptimizer`, which Trainer has as
            `trainer.optimizer`; Lightning's `LightningOptimizer`, Fabric's; any object with the wrapped one as
            `.optimizer` or `._optimizer`.

    Raises:
        TypeError: If there is none inside.
    """
    chain = opened(optimizer)
    if not isinstance(chain[-1], SteepestDescent):
        kinds = " around ".join(type(one).__name__ for one in chain)
        raise TypeError(
            f"optimizer: there is no optimizer of steepest inside of {kinds}, got {shown(optimizer)}. Pass what "
            "the host wraps a steepest.SteepestDescent, such as steepest.Muon, in."
        )
    return chain[-1]
