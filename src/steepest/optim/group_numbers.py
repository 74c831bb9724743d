"""Numbers of the groups, looked at before every step: schedulers and users may write them at any time."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from steepest.checks import flag
from steepest.optim.options import OPTIONS

BELOW = {"lr": math.inf, "momentum": 1.0, "weight_decay": math.inf, "beta2": 1.0}


def check_numbers(groups: Sequence[tuple[int, dict[str, Any]]]) -> list[Tensor]:
    """Refuse numbers with which weights would not stay numbers, and flags that are none.

    Args:
        groups: Those that move in this step, and their places; a whole number becomes a float, as torch takes no larger
            ones than 2^63.

    Returns:
        For each number that is a tensor on an accelerator, and so stays unread, whether it is in its range: 0-d.

    Raises:
        ValueError: If a number is out of its range, or not finite.
        TypeError: If it is no number, or the flag is none.
    """
    unread: list[Tensor] = []
    for place, group in groups:
        if type(ahead := group.get("nesterov", False)) is not bool:
            flag(f"{_who(place, group)}: nesterov", ahead)
        for option, below in BELOW.items():
            value = group[option]
            if type(value) is float and 0.0 <= value < below:
                continue
            name = f"{_who(place, group)}: {option}"
            if isinstance(value, Tensor):
                if value.ndim:
                    raise TypeError(
                        f"{name} as a tensor must be 0-d, got shape {tuple(value.shape)}; write .squeeze()."
                    )
                OPTIONS["lr"](name, value)  # type, and what is here is finite and at least 0
                if value.device.type != "cpu":
                    unread.append((value >= 0) & (value < below))
                    continue
                value = float(value)
            checked = OPTIONS[option](name, value)
            if type(value) is int:
                group[option] = checked
    return unread


def _who(place: int, group: dict[str, Any]) -> str:
    return f"parameter group {place} (role {group['role']!r}), as this step finds it"
