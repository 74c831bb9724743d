"""Looking at the inputs of layers, in those steps and for those layers that somebody asked for.

A hook before each module puts an identity with a derivative between the inputs and the module. Its backward pass runs
exactly once for every call whose gradient is taken, whatever recomputes activations, and never for a call that is only
evaluated; that is where the inputs are summed. They count as long as that gradient does, see `arrivals`. Nothing is put
there while nobody watches.

In a compiled graph hooks cannot change with time. There the identity is always present, and its backward pass is an
operation that asks this registry at run time whether anybody watches.
"""

import itertools
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, library, nn
from torch._subclasses.fake_tensor import is_fake
from torch.autograd import forward_ad

from steepest.ranks import is_sharded
from steepest.stages.inputs.arrivals import Arrivals, Print, Sighting
from steepest.stages.inputs.feeds import Feed, Rows
from steepest.stages.inputs.hooks import Attached
from steepest.stages.inputs.readers import Reader

SAMPLE = 64  # entries by which two tensors at one address are told apart


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
        self.given: dict[int, Sighting] = {}  # by hand, which clearing gradients does not take back
        self._arrivals = [Arrivals(reader.parameter) for reader in self.readers]
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
        self._listen()

    def _listen(self) -> None:
        for number, arrivals in enumerate(self._arrivals):
            if self.looks_at(number):
                arrivals.listen(_Heard(self._key, number))
            else:
                arrivals.deafen()

    def follow(self, number: int) -> None:
        """Hear of a reader's gradient wherever autograd adds to it by now.

        Args:
            number: Of the reader.
        """
        self._arrivals[number].follow()

    def looks_at(self, number: int) -> bool:
        """Whether somebody asked for a reader's inputs."""
        return number in self.summing or number in self.comparing

    def forget(self) -> None:
        """Drop what hooks saw since the last step."""
        for arrivals in self._arrivals:
            arrivals.forget()

    def settle(self) -> None:
        """Drop what was seen of the inputs of gradients that were thrown away, by setting them to None or zero."""
        with torch.no_grad():
            for number in self.summing | self.comparing:
                self._arrivals[number].settle()

    @property
    def seen(self) -> dict[int, Sighting]:
        """What hooks saw of the inputs that made the gradients, by number."""
        known = [(number, arrivals.known()) for number, arrivals in enumerate(self._arrivals) if self.looks_at(number)]
        return {number: sighting for number, sighting in known if sighting is not None}

    def unseen(self, number: int) -> bool:
        """Whether a part of a reader's gradient came without its inputs being seen, or given; may wait for the device.

        Args:
            number: Of the reader.
        """
        return number not in self.given and self._arrivals[number].unseen()

    def arrived(self, number: int, gradient: Tensor) -> None:
        """Take note of a gradient that is about to be added.

        Args:
            number: Of the reader.
            gradient: What is added.
        """
        with torch.no_grad():
            self._arrivals[number].arrived(gradient)

    def sums(self, number: int) -> tuple[Tensor, Tensor] | None:
        """Sum of z zᵀ and mass of a reader since the last step, seen and given; None if there was nothing.

        Args:
            number: Of the reader.
        """
        both = [self._arrivals[number].known(), self.given.get(number)]
        known = [(one.total, one.mass) for one in both if one and one.total is not None and one.mass is not None]
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
        self._arrivals[number].seed(Sighting(total, mass))

    def see(self, number: int, feed: Feed, tensors: tuple[Tensor, ...], weights: Callable[[], Tensor | None]) -> None:
        """Take note of inputs, if the backward pass that runs makes a gradient with them.

        Args:
            number: Of the reader.
            feed: Of its call.
            tensors: That the feed picked.
            weights: Tells those of the tokens, over the first of their dimensions.
        """
        sighting = self._arrivals[number].sighting() if self.looks_at(number) else None
        if sighting is None:
            return
        with torch.no_grad(), torch.autocast(tensors[0].device.type, enabled=False):
            tensors = tuple(cast(Any, one).full_tensor() if is_sharded(one) else one for one in tensors)
            sighting.prints.append(_print_of(tensors[0]))
            if number in self.summing:
                sighting.add(*self._sums(number, feed.rows(tensors), weights()))

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

    def extend(self, readers: Sequence[Reader]) -> None:
        """Watch more readers, whose numbers follow."""
        self.readers += readers
        self._arrivals += [Arrivals(reader.parameter) for reader in readers]
        self._hook(len(self.readers) - len(readers))

    def _attach(self) -> None:
        self._key = next(_KEYS)
        _WATCHES[self._key] = self
        self._handles: list[Attached] = []
        self._hook(0)
        weakref.finalize(self, _remove, self._handles)

    def _hook(self, first: int) -> None:
        for number, reader in enumerate(self.readers[first:], start=first):
            for which, (module, feed) in enumerate(reader.feeds):
                kind = _HookAfter if feed.numbers else _Hook
                hook = kind(self._key, number, which, feed, reader.parameter)
                self._handles.append(Attached(module, reader.parameter, hook, after=feed.numbers))

    def detach(self) -> None:
        """Take the hooks off the modules; also done for a watch that is gone."""
        _remove(self._handles)

    def __getstate__(self) -> dict[str, Any]:
        own = ("_handles", "_key", "_arrivals")
        return {**{key: value for key, value in self.__dict__.items() if key not in own}, "kept": self.seen}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """A copy has hooks of its own, on the copied modules."""
        kept = state["kept"]
        self.__dict__.update({key: value for key, value in state.items() if key != "kept"})
        self._arrivals = [Arrivals(reader.parameter) for reader in self.readers]
        for number, sighting in kept.items():
            self._arrivals[number].seed(sighting)
        self._attach()
        self._listen()


def _remove(handles: Sequence[Attached]) -> None:
    for handle in handles:
        handle.remove()


class _Hook:
    """Stands before one module for one parameter."""

    def __init__(self, key: int, number: int, which: int, feed: Feed, parameter: Tensor) -> None:
        self.key, self.number = key, number
        self.feed = feed
        self.parameter = parameter
        # Inputs that are data have no gradient of their own, and without one there is no backward pass to see them in.
        self.anchor = torch.zeros((), requires_grad=True, device="cpu")
        # a tensor, so that layers alike share one compiled graph
        self.address = torch.tensor([key, number, which], device="cpu")

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any] | None = None) -> Any:
        found = self.watched(arguments, options or {}, None)
        if found is None:
            return None
        watched, inputs = found

        def replaced(value: object) -> object:
            return watched if value is inputs else value

        given = tuple(map(replaced, arguments))
        if options is None:  # torch's quantisation registers hooks anew, and forgets that they take options
            return given
        return given, {name: replaced(value) for name, value in options.items()}

    def watched(
        self, arguments: tuple[Any, ...], options: dict[str, Any], output: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """What looks at the inputs of a call when the gradient comes back through it, in the place of the inputs.

        Args:
            arguments: Of the call, by place.
            options: Likewise, by name.
            output: In whose place it stands instead, if it is given.

        Returns:
            That, and the inputs; None if nobody looks.
        """
        if not torch.is_grad_enabled() or not self.parameter.requires_grad:
            return None
        # is_exporting() is True in every compiled graph of torch 2.9
        if torch.jit.is_tracing() or torch.compiler._is_exporting_flag:
            return None  # what is made of the model takes no optimizer along
        compiling = torch.compiler.is_compiling()
        watch = None if compiling else _WATCHES.get(self.key)
        if not compiling and (watch is None or not watch.looks_at(self.number) or _transformed()):
            return None
        tensors = self.feed.pick(arguments, options)
        if tensors is None or (not compiling and _imagined(tensors[0] if output is None else output)):
            return None
        anchor, through = (self.anchor, tensors) if output is None else (None, (output, *tensors))
        if watch is None:
            return _WatchedCompiled.apply(anchor, self.address, *through), tensors[0]
        watch.follow(self.number)
        call = _Call(watch, self.number, self.feed, watch.weights, _in_backward())
        return _Watched.apply(anchor, call, *through), tensors[0]

    def __reduce__(self) -> tuple[Any, ...]:
        """What a copy takes along, if it must, does nothing and is known without this library."""
        return getattr, (nullcontext(), "__exit__")


class _HookAfter(_Hook):
    """Stands after a module whose inputs are numbers, and have no gradient: its output has one."""

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...], *rest: Any) -> Any:
        *options, output = rest  # see above
        found = self.watched(arguments, options[0] if options else {}, output)
        return None if found is None else found[0]


@dataclass
class _Call:
    """One call of a module."""

    watch: InputWatch
    number: int
    feed: Feed
    weights: Tensor | None
    late: bool
    seen: int = -1  # the last backward pass that saw it

    def see(self, tensors: tuple[Tensor, ...]) -> None:
        """Take note of the inputs, once in a backward pass."""
        task = torch._C._current_graph_task_id()
        if task != self.seen:
            self.watch.see(self.number, self.feed, tensors, self._in_force)
            self.seen = task

    def _in_force(self) -> Tensor | None:
        return self.watch.late_weights(self.number) if self.late else self.weights


class _Watched(torch.autograd.Function):
    """The identity, and inputs that are seen when the gradient comes back; they are what the layer keeps anyway.

    A gradient that is differentiated itself (create_graph) is watched again, with the same inputs: the parameter's
    gradient may come by that way only.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor | None, call: _Call, through: Tensor, *tensors: Tensor) -> Tensor:
        kept = tensors if anchor is None else (_as_multiplied(through), *tensors)
        ctx.save_for_backward(*kept)  # recomputed by checkpointing, not kept
        ctx.call = call
        return through.view_as(through)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        call, tensors = cast(_Call, ctx.call), cast(tuple[Tensor, ...], ctx.saved_tensors)
        call.see(tensors)
        (gradient,) = gradients
        if torch.is_grad_enabled():
            gradient = _Watched.apply(None, call, gradient, *tensors)
        return (None, None, gradient, *(None for _ in ctx.needs_input_grad[3:]))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """The identity's."""
        return tangents[2].view_as(tangents[2])


class _Heard:
    """Stands where autograd adds to a parameter's gradient."""

    def __init__(self, key: int, number: int) -> None:
        self.key, self.number = key, number

    def __call__(self, gradients: tuple[Tensor | None, ...]) -> None:
        watch = _WATCHES.get(self.key)
        if watch is not None and gradients[0] is not None:
            watch.arrived(self.number, gradients[0])


class _WatchedCompiled(torch.autograd.Function):
    """The same in a compiled graph, which may hold tensors only."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor | None, address: Tensor, through: Tensor, *tensors: Tensor) -> Tensor:
        kept = tensors if anchor is None else (_as_multiplied(through), *tensors)
        ctx.save_for_backward(*kept)
        ctx.address, ctx.further = address, len(tensors)
        return through.view_as(through)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        tensors = cast(tuple[Tensor, ...], ctx.saved_tensors)
        _see_compiled(list(tensors), ctx.address)
        return (None, None, gradients[0], *(None for _ in range(ctx.further)))


_KEYS = itertools.count()
_WATCHES: weakref.WeakValueDictionary[int, InputWatch] = weakref.WeakValueDictionary()


# The address is "written to", so that a compiler keeps an operation that returns nothing.
@library.custom_op("steepest::see_inputs", mutates_args=("address",))
def _see_compiled(tensors: list[Tensor], address: Tensor) -> None:
    key, number, which = address.tolist()
    watch = _WATCHES.get(key)
    if watch is not None and watch.looks_at(number):
        feed = watch.readers[number].feeds[which][1]
        watch.see(number, feed, tuple(tensors), partial(watch.late_weights, number))


@_see_compiled.register_fake
def _(tensors: list[Tensor], address: Tensor) -> None:
    return None


def _transformed() -> bool:
    """Whether this is inside `torch.func`, whose gradients are not those that a step takes."""
    return torch._C._are_functorch_transforms_active()


def _imagined(x: Tensor) -> bool:
    """Whether numbers cannot be looked at, or derivatives are of many directions at once, as no step takes them."""
    tangent = forward_ad.unpack_dual(x).tangent if forward_ad._current_level >= 0 else None
    return is_fake(x) or (tangent is not None and cast(Any, torch._C)._functorch.is_legacy_batchedtensor(tangent))


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
