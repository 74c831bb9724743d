"""Looking at the inputs of layers, in those steps and for those layers that somebody asked for.

A hook before each module puts an identity with a derivative between the inputs and the module. Its backward pass runs
exactly once for every call whose gradient is taken, whatever recomputes activations, and never for a call that is only
evaluated; that is where the inputs are summed. Nothing is put there while nobody watches.

In a compiled graph hooks cannot change with time. There the identity is always present, and its backward pass is an
operation that asks this registry at run time whether anybody watches.
"""

import itertools
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, library, nn
from torch.utils.hooks import RemovableHandle

from steepest.anatomy.feeds import Feed, Rows
from steepest.anatomy.readers import Reader

SAMPLE = 64  # entries by which two tensors at one address are told apart

Print = tuple[int, tuple[int, ...], tuple[int, ...]]


@dataclass
class Sighting:
    """What was seen of one parameter's inputs since the last step.

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
        self.total = total if self.total is None else self.total + total
        self.mass = mass if self.mass is None else self.mass + mass


class InputWatch:
    """Watches the readers of a model.

    Args:
        readers: Each has a number, its place in the list.
        tokens: Rows of one call to look at, at most; None: all.
    """

    def __init__(self, readers: Sequence[Reader], tokens: int | None) -> None:
        self.readers = list(readers)
        self.tokens = tokens
        self._weights: Tensor | None = None
        self._weighted = False
        self.summing: frozenset[int] = frozenset()
        self.comparing: frozenset[int] = frozenset()
        self.seen: dict[int, Sighting] = {}
        self.given: dict[int, Sighting] = {}  # by hand, which clearing gradients does not take back
        self._attach()

    @property
    def weights(self) -> Tensor | None:
        """Of the tokens of calls from now on; None: 1 each."""
        return self._weights

    @weights.setter
    def weights(self, weights: Tensor | None) -> None:
        self._weights = weights
        self._weighted = self._weighted or weights is not None

    def watch(self, summing: frozenset[int], comparing: frozenset[int]) -> None:
        """Choose what to look at from now on, and forget what was seen.

        Args:
            summing: Numbers of the readers whose inputs are summed.
            comparing: Of those whose inputs are compared with those of others.
        """
        self.summing, self.comparing = summing, comparing
        self._weighted = self._weights is not None
        self.given = {}
        self.forget()

    def looks_at(self, number: int) -> bool:
        """Whether somebody asked for a reader's inputs."""
        return number in self.summing or number in self.comparing

    def forget(self) -> None:
        """Drop what hooks saw since the last step."""
        self.seen = {}

    def sums(self, number: int) -> tuple[Tensor, Tensor] | None:
        """Sum of z zᵀ and mass of a reader since the last step, seen and given; None if there was nothing.

        Args:
            number: Of the reader.
        """
        both = [own[number] for own in (self.seen, self.given) if number in own]
        known = [(one.total, one.mass) for one in both if one.total is not None and one.mass is not None]
        if not known:
            return None
        total, mass = known[0]
        for more_total, more_mass in known[1:]:
            total, mass = total + more_total, mass + more_mass
        return total, mass

    def give(self, number: int, rows: Rows) -> None:
        """Take note of inputs that were given by hand; not in passes without gradients, or that only recompute.

        Args:
            number: Of the reader.
            rows: The inputs.
        """
        if number in self.summing and torch.is_grad_enabled() and not _in_backward():
            with torch.no_grad(), torch.autocast(rows.values.device.type, enabled=False):
                self.given.setdefault(number, Sighting()).add(*self._sums(number, rows, None))

    def seed(self, number: int, total: Tensor, mass: Tensor) -> None:
        """Go on from sums that were seen before a checkpoint.

        Args:
            number: Of the reader.
            total: Its sum.
            mass: Its sum of weights.
        """
        self.seen[number] = Sighting(total, mass)

    def see(self, number: int, rows: Rows, weights: Tensor | None, source: Tensor) -> None:
        """Take note of inputs.

        Args:
            number: Of the reader.
            rows: The inputs.
            weights: Of the tokens, over the first of their dimensions.
            source: The tensor they are from.
        """
        if not self.looks_at(number):
            return
        sighting = self.seen.setdefault(number, Sighting())
        with torch.no_grad(), torch.autocast(rows.values.device.type, enabled=False):
            sighting.prints.append(_print_of(source))
            if number in self.summing:
                sighting.add(*self._sums(number, rows, weights))

    def _sums(self, number: int, rows: Rows, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        layout, parameter = self.readers[number].layout, self.readers[number].parameter
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        tokens = rows.values.shape[:-2]
        if weights is not None:
            weights = _fitted(weights, tokens, self.readers[number].row.name)
        count = tokens.numel()
        if self.tokens is None or count <= self.tokens:
            return layout.sums(rows, weights, dtype)
        chosen = _spread(count, self.tokens, rows.values.device)
        flat = Rows(
            rows.values.reshape(count, *rows.values.shape[-2:])[chosen],
            None if rows.chosen is None else rows.chosen.reshape(count, -1)[chosen],
        )
        if weights is not None:
            weights = weights.reshape(weights.shape + (1,) * (len(tokens) - weights.ndim)).expand(tokens)
            weights = weights.reshape(count)[chosen.to(weights.device)]
        total, mass = layout.sums(flat, weights, dtype)
        return total * (count / self.tokens), mass * (count / self.tokens)

    def late_weights(self, number: int) -> Tensor | None:
        """The weights of a call that is seen without knowing which were in force in its forward pass.

        Args:
            number: Of the reader.

        Raises:
            RuntimeError: If others were, since the last step, than now.
        """
        if self._weights is None and self._weighted and self.looks_at(number):
            raise RuntimeError(
                f"input_mask was used in a forward pass since the last step, but is not in force while the inputs of "
                f"{self.readers[number].row.name!r} are seen: of compiled or checkpointed layers, that is in the "
                "backward pass. Call backward() within input_mask, with a mask for each micro-batch."
            )
        return self._weights

    def _attach(self) -> None:
        self._key = next(_KEYS)
        _WATCHES[self._key] = self
        self._handles: list[RemovableHandle] = []
        for number, reader in enumerate(self.readers):
            for which, (module, feed) in enumerate(reader.feeds):
                hook = _Hook(self._key, number, which, feed, reader.parameter)
                self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        weakref.finalize(self, _remove, self._handles)

    def detach(self) -> None:
        """Take the hooks off the modules; also done for a watch that is gone."""
        _remove(self._handles)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_handles", "_key")}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """A copy has hooks of its own, on the copied modules."""
        self.__dict__.update(state)
        self._attach()


def _remove(handles: Sequence[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


class _Hook:
    """Stands before one module for one parameter; a copy of the module takes an idle one along."""

    def __init__(self, key: int, number: int, which: int, feed: Feed, parameter: Tensor) -> None:
        self.key, self.number = key, number
        self.feed = feed
        self.parameter = parameter
        # Inputs that are data have no gradient of their own, and without one there is no backward pass to see them in.
        self.anchor: Tensor | None = torch.zeros((), requires_grad=True)
        self.address = torch.tensor([key, number, which])  # a tensor, so that layers alike share one compiled graph

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if self.anchor is None or not torch.is_grad_enabled() or not self.parameter.requires_grad:
            return None
        compiling = torch.compiler.is_compiling()
        watch = None if compiling else _WATCHES.get(self.key)
        if not compiling and (watch is None or not watch.looks_at(self.number) or _transformed()):
            return None
        tensors = self.feed.pick(arguments, options)
        if tensors is None:
            return None
        if watch is None:
            watched = _WatchedCompiled.apply(self.anchor, self.address, *tensors)
        else:
            watched = _Watched.apply(self.anchor, watch, self.number, self.feed, *tensors)

        def replaced(value: object) -> object:
            return watched if value is tensors[0] else value

        return tuple(map(replaced, arguments)), {name: replaced(value) for name, value in options.items()}

    def __getstate__(self) -> dict[str, Any]:
        return {"anchor": None}


class _Watched(torch.autograd.Function):
    """The identity on the inputs, seen when the gradient comes back; what it keeps is what the layer keeps anyway."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, watch: InputWatch, number: int, feed: Feed, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(_as_multiplied(tensors[0]), *tensors[1:])  # recomputed by checkpointing, not kept
        ctx.call = (watch, number, feed, watch.weights, _in_backward())
        return tensors[0].view_as(tensors[0])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        watch, number, feed, weights, late = ctx.call
        tensors = cast(tuple[Tensor, ...], ctx.saved_tensors)
        watch.see(number, feed.rows(tensors), watch.late_weights(number) if late else weights, tensors[0])
        return (None, None, None, None, gradients[0], *(None for _ in tensors[1:]))


class _WatchedCompiled(torch.autograd.Function):
    """The same in a compiled graph, which may hold tensors only."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, address: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(_as_multiplied(tensors[0]), *tensors[1:])
        ctx.address = address
        return tensors[0].view_as(tensors[0])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        tensors = cast(tuple[Tensor, ...], ctx.saved_tensors)
        _see_compiled(list(tensors), ctx.address)
        return (None, None, gradients[0], *(None for _ in tensors[1:]))


_KEYS = itertools.count()
_WATCHES: weakref.WeakValueDictionary[int, InputWatch] = weakref.WeakValueDictionary()


# The address is "written to", so that a compiler keeps an operation that returns nothing.
@library.custom_op("steepest::see_inputs", mutates_args=("address",))
def _see_compiled(tensors: list[Tensor], address: Tensor) -> None:
    key, number, which = address.tolist()
    watch = _WATCHES.get(key)
    if watch is not None and watch.looks_at(number):
        feed = watch.readers[number].feeds[which][1]
        watch.see(number, feed.rows(tuple(tensors)), watch.late_weights(number), tensors[0])


@_see_compiled.register_fake
def _(tensors: list[Tensor], address: Tensor) -> None:
    return None


def _transformed() -> bool:
    """Whether this is inside `torch.func`, whose gradients are not those that a step takes."""
    return torch._C._are_functorch_transforms_active()


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _as_multiplied(x: Tensor) -> Tensor:
    """What the layer keeps of its inputs: under autocast a rounded copy, so that the inputs may change in place."""
    kind = x.device.type
    rounds = torch.is_autocast_enabled(kind) and x.dtype == torch.float32
    return x.to(torch.get_autocast_dtype(kind)) if rounds else x


def _spread(count: int, wanted: int, device: torch.device) -> Tensor:
    """Places of `wanted` rows of `count`, one in each of as many equal parts; where in it changes from part to part,
    because rows that are a whole number of sequences apart would all be at one position.
    """
    part = torch.arange(wanted, dtype=torch.float64, device=device)
    return ((part + part * 0.6180339887498949 % 1) * count / wanted).long().clamp_max(count - 1)


def _print_of(tensor: Tensor) -> Print:
    """Where a tensor is and a few of its numbers: the same for two views of the same inputs."""
    flat = tensor.detach().reshape(-1)
    places = torch.arange(min(SAMPLE, len(flat)), device=flat.device) * len(flat) // max(1, min(SAMPLE, len(flat)))
    return tensor.data_ptr(), tuple(tensor.shape), tuple(flat[places].float().view(torch.int32).tolist())


def _fitted(weights: Tensor, tokens: torch.Size, name: str) -> Tensor:
    """The weights in the shape of the tokens' first dimensions; (batch, time) also fits tokens in one row."""
    if weights.shape == tokens[: weights.ndim]:
        return weights
    if tokens == (weights.numel(),):
        return weights.reshape(-1)
    raise ValueError(
        f"The mask of inputs has shape {tuple(weights.shape)}, which is not how the tokens {tuple(tokens)} that "
        f"{name!r} reads begin. Give the mask the shape (batch, time) of the tokens, or (batch,)."
    )
