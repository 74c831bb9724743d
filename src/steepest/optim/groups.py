"""What stands in a parameter group is text, numbers and tensors: whoever saves a group can load it again.

Norms and views stand there as the text that builds them; the objects are kept beside the groups.
"""

from collections.abc import Mapping, Sequence
from enum import Enum
from functools import lru_cache
from numbers import Integral, Real
from typing import Any, cast

import torch
from torch import Tensor

from steepest.anatomy import View
from steepest.checks import refusal, shown
from steepest.geometry import Norm, get_norm
from steepest.geometry.text import built, text_of
from steepest.notices import warn
from steepest.optim.momentum import Averages

Group = dict[str, Any]
# Types that torch.load(weights_only=True) reads back; of exactly these, as a subclass is refused there.
PLAIN = frozenset({type(None), bool, int, float, complex, str, Tensor, torch.nn.Parameter, torch.dtype, torch.device})
GIVEN = ("max_lr", "swa_lr")  # where torch's schedulers write what they were given, before rates are there
UNSEEN = frozenset({"params", "param_names", "norm", "view"})  # cared for elsewhere


class Norms:
    """The norms of one optimizer, by the texts that stand for them in its groups."""

    def __init__(self) -> None:
        self._known: dict[str, Norm] = {}

    def __contains__(self, text: object) -> bool:
        return isinstance(text, str) and text in self._known

    def text(self, norm: Norm) -> str:
        """The text that stands for a norm from now on; two norms that print alike, but differ, have two."""
        text = first = text_of(norm)
        count = 1
        while (known := self._known.setdefault(text, norm)) is not norm and not _same(known, norm):
            count += 1
            text = f"{first}#{count}"
        return text

    def of(self, group: Mapping[str, Any]) -> Norm:
        """The norm of a group."""
        return self._known[group["norm"]]

    def settle(self, group: Group, where: str) -> Norm:
        """Turn what somebody wrote as a group's norm into its text.

        Args:
            group: Written to.
            where: Which group, for the message.

        Returns:
            The norm.

        Raises:
            ValueError: If it is a text that stands for no norm.
            TypeError: If it is neither a text nor a norm.
        """
        norm = group["norm"]
        if type(norm) is str and norm in self._known:
            return self._known[norm]
        try:
            found = get_norm(norm)
        except (ValueError, TypeError) as problem:
            raise type(problem)(
                f"{where}: norm is {norm!r}, but a name, a norm, or the text of a norm that this optimizer was built "
                f"with is needed. {problem}"
            ) from problem
        group["norm"] = self.text(found)
        return found


def _same(one: Norm, other: Norm) -> bool:
    try:
        return type(one) is type(other) and bool(one == other)
    except (TypeError, ValueError, RuntimeError):  # as of options that are tensors
        return False


AVERAGES = "averages"  # key of the text of several averages; a group with one has none


def averages_of(group: Mapping[str, Any]) -> Averages | None:
    """The averages of a group's gradients; None: one, with the group's "momentum".

    Args:
        group: Whose text is settled.
    """
    text = group.get(AVERAGES)
    return None if text is None else _averages(text)


@lru_cache(maxsize=64)
def _averages(text: str) -> Averages:
    found = built(text, {"Averages": Averages})
    if not isinstance(found, Averages) or len(found) == 1:
        raise ValueError(f"{text!r} does not say what several averages are.")
    return found


def settle_averages(group: Group, where: str, *, made: bool) -> None:
    """Turn averages that somebody wrote as a group's momentum into its first beta and a text of the rest.

    Args:
        group: Written to.
        where: Which group, for the message.
        made: Whether the group is one of an optimizer, whose state is of so many averages.

    Raises:
        ValueError: If the text is of none, or there were another number of averages before.
        TypeError: If the text is no text.
    """
    given, text = group["momentum"], group.get(AVERAGES)
    if text is not None and not isinstance(text, str):
        raise TypeError(refusal(f"{where}: {AVERAGES}", "the text of Averages(...)", text))
    try:
        known = averages_of(group)
    except (ValueError, TypeError) as problem:
        raise ValueError(f"{where}: {AVERAGES} is {shown(text)}. Write momentum=Averages(...). {problem}") from problem
    if not isinstance(given, Averages):
        return
    count = 1 if known is None else len(known)
    if made and count != len(given):
        raise ValueError(
            f"{where}: momentum must be a number{f' or {count} averages' * (count > 1)}, as when the group was made, "
            f"got {shown(given)}. Build a new optimizer to have another number of averages."
        )
    group["momentum"] = given.betas[0]
    group.pop(AVERAGES, None)
    if len(given) > 1:
        group[AVERAGES] = text_of(given)


def view_text(view: View | None) -> str | None:
    """The text that stands for a group's view."""
    return None if view is None else text_of(view)


def view_of(group: Mapping[str, Any], where: str) -> View | None:
    """A group's view.

    Args:
        group: Its "view" may be the text, the object or None.
        where: Which group, for the message.

    Raises:
        TypeError: If it is something else.
    """
    view = group.get("view")
    if isinstance(view, str) and view.startswith("View("):
        try:
            return cast(View, built(view, {"View": View}))
        except (ValueError, TypeError) as problem:
            raise type(problem)(f"{where}: view is {view!r}. {problem}") from problem
    if view is not None and not isinstance(view, View):
        raise TypeError(refusal(f"{where}: view", "a View, such as View(groups=4), or None", view))
    return view


def make_plain(group: Group, where: str, *, strict: bool = True) -> None:
    """Turn NumPy's and other numbers of a group, as schedulers write them, into Python's.

    Args:
        group: Written to.
        where: Which group, for the message.
        strict: Whether the rest is refused, not left for others to refuse.

    Raises:
        TypeError: If a value could not be read back from a checkpoint.
    """
    for key, value in group.items():
        if type(value) not in PLAIN and key not in UNSEEN:
            try:
                group[key] = plain(value, f"{where}: {key}")
            except TypeError:
                if strict:
                    raise


def plain(value: Any, what: str) -> Any:
    """A value as text, number or tensor, or as a list, tuple, set or dictionary of these.

    Args:
        value: Anything.
        what: Where it stands, for the message.

    Raises:
        TypeError: If it is none of these.
    """
    kind = type(value)
    if kind in PLAIN or isinstance(value, Tensor):
        return value
    if isinstance(value, Enum):
        return plain(value.value, what)
    if isinstance(value, str):
        return "".join(value)
    if isinstance(value, dict):
        return {plain(key, what): plain(one, what) for key, one in cast(Mapping[Any, Any], value).items()}
    if isinstance(value, list | tuple):
        items = [plain(one, what) for one in cast(list[Any], value)]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, set):
        return {plain(one, what) for one in cast(set[Any], value)}
    if kind.__module__.partition(".")[0] == "numpy" and getattr(value, "ndim", None) == 0:
        item = value.item()
        return float(item) if type(item) is kind else plain(item, what)
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    raise TypeError(
        f"{what} is a {kind.__name__}, which torch.load(weights_only=True) would not read back from a checkpoint. Put "
        "text, a number or a tensor there, or keep it outside of the optimizer."
    )


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

    def forget(self, count: int) -> None:
        """Groups were taken back.

        Args:
            count: How many are left.
        """
        del self._built[count:]

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
