"""Several optimizers that act as one."""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer


class CombinedOptimizer(Optimizer):
    """Steps its parts in turn; one list of groups for schedulers, one state dict for checkpoints.

    Args:
        parts: Optimizers of disjoint parameters.
    """

    def __init__(self, *parts: Optimizer) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share_groups()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of each part; `closure` runs once, before them."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The state dicts of the parts, in order."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: If it belongs to another number of parts.
        """
        states = state_dict["parts"]
        if len(states) != len(self.parts):
            raise ValueError(f"The state is of {len(states)} optimizers, this one combines {len(self.parts)}.")
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)
        self._share_groups()  # a part's groups are new objects after loading

    def _share_groups(self) -> None:
        self.param_groups = [group for part in self.parts for group in part.param_groups]
