"""Hooks before or after the forward pass of a module that no copy of it takes along, by deepcopy or by pickle.

A copy has nobody who removes them, could not be scripted or quantised for them, and its pickle would need this library.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn


class _Kept(OrderedDict[int, Any]):
    """What torch keeps of a module's hooks, by their numbers; some of them are left out of copies."""

    def __init__(self, *items: Any) -> None:
        super().__init__(*items)
        self.left_out: set[int] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, (), None, None, iter([item for item in self.items() if item[0] not in self.left_out])

    @classmethod
    def instead_of(cls, module: nn.Module, name: str) -> Self | None:
        """Takes the place of a module's dictionary; not of one with hooks of others, who could not remove them then."""
        found = getattr(module, name)
        if not isinstance(found, cls) and not found:
            found = cls()
            setattr(module, name, found)
        return found if isinstance(found, cls) else None


class Attached:
    """A hook that gets the arguments of a call by place and by name.

    torch's compiler does not ask whether a module has hooks before it takes a graph that it made of one without
    (`skip_nnmodule_hook_guards`), but whether its parameters are marked as of fixed shape, which they all are; this one
    is marked.

    Args:
        module: Before whose calls.
        parameter: Of the module.
        hook: Copies take it along where others had registered hooks before: its `__reduce__` says as what.
        after: Whether it comes after the calls, and gets what they return, too.
    """

    def __init__(self, module: nn.Module, parameter: Tensor, hook: Callable[..., Any], *, after: bool = False) -> None:
        name = "_forward_hooks" if after else "_forward_pre_hooks"
        kept = [_Kept.instead_of(module, own) for own in (name, f"{name}_with_kwargs")]
        register = module.register_forward_hook if after else module.register_forward_pre_hook
        self._handle = register(hook, with_kwargs=True)
        for own in kept:
            if own is not None:
                own.left_out.add(self._handle.id)
        self._parameter = parameter
        torch._dynamo.mark_static(parameter)

    def remove(self) -> None:
        """Take it off; more than once does no harm."""
        self._handle.remove()
        for mark in ("_dynamo_static_indices", "_has_dynamo_dim_marking"):
            vars(self._parameter).pop(mark, None)
