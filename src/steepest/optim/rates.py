"""Notices a scheduler that gave all groups one learning rate, where they were built with different ones."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from steepest.notices import warn

Group = dict[str, Any]
GIVEN = ("max_lr", "swa_lr")  # where torch's schedulers write what they were given, before rates are there


class Rates:
    """The learning rates that groups were built with."""

    def __init__(self) -> None:
        self._built: list[float | None] = []
        self._settled = False  # a step was taken with different rates
        self._warned = False

    def add(self, group: Group) -> None:
        """A group was built.

        Args:
            group: With its learning rate.
        """
        self._built.append(_number(group["lr"]))
        self._settled = False

    def restart(self, groups: Sequence[Group]) -> None:
        """Groups were loaded: what they have now is meant.

        Args:
            groups: All of them.
        """
        self._built, self._settled = [_number(group["lr"]) for group in groups], False

    def check(self, groups: Sequence[Group]) -> None:
        """Warn once if different rates became one; a step is about to be taken. Rates on an accelerator are not read.

        Different rates that fall to one floor, below all that they were built with, are no such thing.

        Args:
            groups: All of them.
        """
        if self._warned or len(self._built) != len(groups):
            return
        pairs = [(group, rate) for group, rate in zip(groups, self._built, strict=True) if group["params"]]
        built = [rate for _, rate in pairs if rate is not None]
        groups = [group for group, _ in pairs]
        if len(built) != len(groups) or len(set(built)) < 2:
            return
        rate = _one([_number(group["lr"]) for group in groups])
        given = {key: one for key in GIVEN if (one := _one([_number(group.get(key)) for group in groups]))}
        lowest = min(one for one in built if one > 0)
        if given or (rate and (not self._settled or rate >= lowest)):
            self._warned = True
            _tell(groups, built, *next(iter(given.items()), ("lr", rate)))
        self._settled = self._settled or rate is None


def _tell(groups: Sequence[Group], built: Sequence[float], key: str, number: float | None) -> None:
    roles = ", ".join(f"{g.get('name') or g['role']} {rate:g}" for g, rate in zip(groups, built, strict=True))
    unit = (number or 0.0) / (built[0] or max(built))
    rates = ", ".join(f"{unit * rate:.6g}" for rate in built)
    warn(
        f"All groups have the same {key}, {number:g}, but were built with learning rates that differ: {roles}. Their "
        f"ratio is lost, as by a scheduler that was given one number. Give it a list, in order of "
        f"optimizer.param_groups: {'max_lr' if key == 'lr' else key}=[{rates}]. If one rate is meant, build the "
        "optimizer with it."
    )


def _one(numbers: Sequence[float | None]) -> float | None:
    """The number that all are; None if they differ or one is not known."""
    return numbers[0] if numbers and all(number == numbers[0] for number in numbers) else None


def _number(rate: object) -> float | None:
    if isinstance(rate, Tensor):
        return float(rate) if rate.device.type == "cpu" else None
    return float(rate) if isinstance(rate, int | float) else None
