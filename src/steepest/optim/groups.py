"""What stands in a parameter group is text, numbers and tensors: whoever saves a group can load it again.

Norms and views stand there as the text that builds them; the objects are kept beside the groups.
"""

from collections.abc import Mapping
from enum import Enum
from numbers import Integral, Real
from typing import Any, cast

import torch
from torch import Tensor

from steepest.anatomy import View
from steepest.checks import refusal
from steepest.geometry import Norm, get_norm
from steepest.geometry.text import built, text_of

Group = dict[str, Any]
# Types that torch.load(weights_only=True) reads back; of exactly these, as a subclass is refused there.
PLAIN = frozenset({type(None), bool, int, float, complex, str, Tensor, torch.nn.Parameter, torch.dtype, torch.device})
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
