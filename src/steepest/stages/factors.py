"""Moments of both sides of a gradient, L of G Gᵀ and R of Gᵀ G, and in whose turn something is made of them anew.

A long side is cut into blocks, c of b = k/c rows or columns, whose moments are kept and used one by one: those of a
side are (B, c, b, b). L is then what it is on its diagonal blocks, and zero beside them.

What is made of a moment, such as its eigenvectors or a power, takes far longer than to average it. So a parameter has
its turn every so many steps, and parameters have theirs one after the other, by their place in the plan. Which step it
is and whose turn is known without the device; only the first gradients of a matrix, with which all begins, are waited
for. A parameter without a gradient in its turn waits for the next.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from steepest.anatomy import Load, PlanRow
from steepest.stages.sizes import bounded, of_size
from steepest.stages.stage import Entry, Stage, States

SIDES = ("left", "right")
STEPS_TAKEN = "steps_taken"  # in the groups of a state, by the optimizer


class FactorOptions(Protocol):
    """What is common to stages with moments of both sides: how moments are averaged, and when it is whose turn."""

    @property
    def beta(self) -> float:
        """Weight of the old moment."""
        ...

    @property
    def every(self) -> int:
        """Steps from one turn of a parameter to the next."""
        ...

    @property
    def block_size(self) -> int:
        """The longest side, or block of one, that has a moment as a whole."""
        ...

    @property
    def split(self) -> bool:
        """Whether half of the change stands before the lmo and half after it."""
        ...

    def attach(self, rows: Sequence[PlanRow]) -> Stage:
        """Begin to work for one optimizer."""
        ...


class Factored(Stage):
    """Keeps L and R, and what is made of each, for one optimizer.

    Args:
        options: How.
        rows: Of the plan: the trainable matrices.

    Attributes:
        steps: How many were taken.
    """

    made: ClassVar[str]  # ends the keys of what is made of moments

    def __init__(self, options: FactorOptions, rows: Sequence[PlanRow]) -> None:
        self.options: Any = options
        self.steps = 0
        self._places: dict[Tensor, int] = {}
        self._begun: set[Tensor] = set()  # of all of whose matrices something was made
        self._counts: dict[Tensor, Tensor] = {}  # as they stood in the state when that was found
        self.added(rows)

    def __repr__(self) -> str:
        return repr(self.options)

    def attach(self, rows: Sequence[PlanRow]) -> Stage:
        """Begin anew for another optimizer."""
        return self.options.attach(rows)

    def added(self, rows: Sequence[PlanRow]) -> None:
        """More matrices have turns of their own."""
        for row in rows:
            self._places.setdefault(row.parameter, len(self._places))

    def allocate(self, states: States) -> None:
        """Notice whose state is another than it was: loaded, or taken away."""
        for parameter, state in states.items():
            if self.count in state and self._counts.get(parameter) is not state[self.count]:
                self._counts[parameter] = state[self.count]
                self._begun.discard(parameter)

    @property
    def keeps_ball(self) -> bool:
        """Whether directions stay what they are."""
        return not self.options.split

    @property
    def may_climb(self) -> bool:
        """Unless it is split."""
        return not self.options.split

    @property
    def linear(self) -> bool:
        """Yes: what directions are multiplied with does not depend on them."""
        return True

    def shape_of(self, side: str) -> Callable[[int, int], tuple[int, ...]]:
        """What a side's moment of a matrix m x n has for a shape.

        Args:
            side: "left" or "right".
        """
        place = SIDES.index(side)

        def shape(m: int, n: int) -> tuple[int, ...]:
            length = (m, n)[place]
            count = blocks_of(length, self.options.block_size)
            return (count, length // count, length // count)

        return shape

    @property
    def count(self) -> str:
        """Key of how many gradients each matrix had since the first that was not zero."""
        return f"{self.prefix}count"

    def entries(self, row: PlanRow) -> Sequence[Entry]:
        """Moments, what is made of them, and counts, matrix after matrix and block after block.

        Args:
            row: Of the plan, with a view.
        """
        blocks = row.blocks()
        found = [Entry(self.count, torch.Size((sum(count for count, _, _ in blocks),)), least=0.0)]
        for side in SIDES:
            shape = self.shape_of(side)
            size = torch.Size((sum(count * math.prod(shape(m, n)) for count, m, n in blocks),))
            found += [Entry(f"{self.prefix}{side}", size), Entry(f"{self.prefix}{side}_{self.made}", size)]
        return found

    def pieces(self, load: Load, states: Sequence[dict[str, Tensor]], side: str, end: str = "") -> list[list[Tensor]]:
        """A side's moments, or what is made of them, where they lie: to put them together would copy whole states.

        Args:
            load: Of the parameters.
            states: Of these.
            side: "left" or "right".
            end: Of the key.

        Returns:
            For each batch, (B, c, b, b) of each parameter.
        """
        return load.pieces_of_batches([state[f"{self.prefix}{side}{end}"] for state in states], self.shape_of(side))

    def made_of(self, load: Load, states: Sequence[dict[str, Tensor]], side: str) -> list[list[Tensor]]:
        """What is made of a side's moments; the identity for a matrix that had no gradient yet.

        Args:
            load: Of the parameters.
            states: Of these.
            side: "left" or "right".
        """
        found = self.pieces(load, states, side, f"_{self.made}")
        if all(parameter in self._begun for parameter in load.parameters):
            return found
        return [[torch.where(_filled(own)[:, None, None, None], own, identity(own)) for own in part] for part in found]

    def observe(
        self,
        load: Load,
        gradients: tuple[Tensor, ...],
        averages: tuple[Tensor, ...],
        states: Sequence[dict[str, Tensor]],
        accept: Tensor | None,
    ) -> None:
        """Average the moments, and make something of those whose turn it is.

        Args:
            load: Whose gradients these are.
            gradients: (B, m, n) each.
            averages: Likewise.
            states: Written to.
            accept: A 0-d boolean; where it is False, no entry changes. None means True.
        """
        del averages
        seen = [bounded(gradient) for gradient in gradients]
        alive = torch.cat([gradient.flatten(1).any(-1) for gradient in seen])
        counts = load.numbers_of_batches([state[self.count] for state in states])
        counts = torch.where((counts > 0) | alive, counts + 1, counts)
        self.write(states, self.count, load.numbers_of_parameters(counts), accept)
        for side in SIDES:
            for gradient, moments in zip(seen, self.pieces(load, states, side), strict=True):
                for own, moment in zip(gradient.split(moments[0].size(0)), moments, strict=True):
                    moment.lerp_(masked_to(product(own, side, moment.size(1)), moment, accept), 1 - self.options.beta)
        self._renew(load, states, accept)
        self.look(load, seen, states, accept)

    def write(
        self, states: Sequence[dict[str, Tensor]], key: str, new: Sequence[Tensor], accept: Tensor | None
    ) -> None:
        """Write an entry of those that have it.

        Args:
            states: Written to.
            key: Of the entry.
            new: Of each.
            accept: A 0-d boolean; where it is False, nothing changes. None means True.
        """
        for state, own in zip(states, new, strict=True):
            if key in state:
                state[key].copy_(masked_to(own, state[key], accept))

    def look(
        self, load: Load, gradients: Sequence[Tensor], states: Sequence[dict[str, Tensor]], accept: Tensor | None
    ) -> None:
        """Go on with the gradients, in what was made of the moments; by default nothing.

        Args:
            load: Whose gradients these are.
            gradients: (B, m, n) each, bounded.
            states: Written to.
            accept: A 0-d boolean; where it is False, no entry may change. None means True.
        """

    def after(
        self, load: Load, directions: tuple[Tensor, ...], states: Sequence[dict[str, Tensor]], accept: Tensor | None
    ) -> tuple[Tensor, ...]:
        """The second half, of the Frobenius norm of what was found; without `split` nothing.

        Args:
            load: Whose directions these are.
            directions: (B, m, n) each.
            states: Of the parameters.
            accept: Nothing changes.

        Returns:
            Likewise.
        """
        del accept
        if not self.options.split:
            return directions
        return tuple(map(of_size, self.before(load, directions, states), directions))

    def renewed(self, moments: Tensor, means: Tensor, counts: Tensor, old: Tensor, *, first: bool) -> Tensor:
        """What is made of moments.

        Args:
            moments: (B, b, b), symmetric and positive semidefinite; the largest entry of a side's is one.
            means: (B,), of the eigenvalues of the whole side that a block is of.
            counts: (B,), how many gradients they are of.
            old: Likewise, what was made of moments before.
            first: Whether these are the first, and what is old means nothing.

        Returns:
            (B, b, b).
        """
        raise NotImplementedError

    def _renew(self, load: Load, states: Sequence[dict[str, Tensor]], accept: Tensor | None) -> None:
        """Make something anew of the moments of those whose turn it is, of those of one size together."""
        turns = [(self.steps + self._places.get(p, 0)) % self.options.every == 0 for p in load.parameters]
        if not any(turns) and all(parameter in self._begun for parameter in load.parameters):
            return
        alike: dict[tuple[int, bool], list[tuple[Tensor, Tensor, Tensor]]] = {}
        started = dict.fromkeys(range(len(load.parameters)), True)
        counts = load.pieces_of_batches([state[self.count] for state in states], lambda m, n: ())
        for side in SIDES:
            moments, made = self.pieces(load, states, side), self.pieces(load, states, side, f"_{self.made}")
            for batch, places in enumerate(_places(load)):
                for number, place in enumerate(places):
                    moment, own, count = moments[batch][number], made[batch][number], counts[batch][number]
                    if load.parameters[place] in self._begun:
                        due = {False: torch.ones(len(own), dtype=torch.bool, device="cpu")} if turns[place] else {}
                    else:  # looked at, once per step, until all have begun: a first one may have been masked
                        alive, filled = (count > 0).cpu(), _filled(own).cpu()
                        due = {True: alive & ~filled, False: alive & filled & turns[place]}
                        started[place] &= bool((alive & filled).all())
                    for first, chosen in due.items():
                        for one in chosen.nonzero().flatten().tolist():
                            alike.setdefault((own.size(-1), first), []).append((moment[one], own[one], count[one]))
        self._begun.update(load.parameters[place] for place, every in started.items() if every)
        for (_, first), triples in alike.items():
            seen = [relative(moment[None])[0] for moment, _, _ in triples]
            means = [own.diagonal(dim1=-2, dim2=-1).mean().expand(len(own)) for own in seen]
            ages = [count.expand(len(own)) for _, own, count in triples]
            old = torch.cat([own for _, own, _ in triples])
            new = self.renewed(torch.cat(seen), torch.cat(means), torch.cat(ages), old, first=first)
            old = torch.where(_filled(old)[:, None, None], old, identity(old))
            new = torch.where(new.isfinite().all(-1).all(-1)[:, None, None], new, old)
            for (_, own, _), part in zip(triples, new.split([len(own) for _, own, _ in triples]), strict=True):
                own.copy_(masked_to(part, own, accept))

    def passed(self, *, skipped: bool, idle: Callable[[], bool]) -> None:
        """A step is over; one that was passed over was nobody's turn."""
        del idle
        self.steps += not skipped

    def load(self, states: States, groups: Sequence[Mapping[str, Any]]) -> None:
        """Go on with the turns of a loaded state."""
        del states
        self.steps = max((int(group.get(STEPS_TAKEN, 0)) for group in groups), default=0)


def blocks_of(length: int, block_size: int) -> int:
    """Into how many equal blocks of at most that size a side is cut: the fewest that divide it.

    Args:
        length: Of the side.
        block_size: At least 1.
    """
    return next((c for c in range(-(-length // block_size), length) if length % c == 0), length)


def product(gradient: Tensor, side: str, count: int) -> Tensor:
    """G Gᵀ or Gᵀ G, on its diagonal blocks.

    Args:
        gradient: G, (B, m, n).
        side: "left" or "right".
        count: c, of the blocks.

    Returns:
        (B, c, b, b).
    """
    rows = (gradient if side == "left" else gradient.mT).unflatten(1, (count, -1))
    return rows @ rows.mT


def times(matrices: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """L M R, with L and R zero beside their diagonal blocks.

    Args:
        matrices: M, (B, m, n).
        left: (B, c, b, b), or with B = 1 for all.
        right: Likewise.

    Returns:
        (B, m, n).
    """
    matrices = (left @ matrices.unflatten(1, (left.size(1), -1))).flatten(1, 2)
    columns = matrices.unflatten(2, (right.size(1), -1)).transpose(1, 2)
    return (columns @ right).transpose(1, 2).flatten(2)


def between(
    batches: Sequence[Tensor], lefts: Sequence[Sequence[Tensor]], rights: Sequence[Sequence[Tensor]]
) -> tuple[Tensor, ...]:
    """`times` for batches whose L and R lie apart.

    Args:
        batches: (B, m, n) each.
        lefts: For each batch, those of each parameter.
        rights: Likewise.

    Returns:
        Like the batches.
    """
    return tuple(
        torch.cat([times(*own) for own in zip(batch.split(left[0].size(0)), left, right, strict=True)])
        for batch, left, right in zip(batches, lefts, rights, strict=True)
    )


def transposed(pieces: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """Of `pieces`, each matrix transposed."""
    return [[own.mT for own in part] for part in pieces]


def masked_to(new: Tensor, old: Tensor, accept: Tensor | None) -> Tensor:
    """What is new, or where that is not accepted, what is there.

    Args:
        new: Any shape.
        old: Likewise.
        accept: A 0-d boolean; None means True.
    """
    return new if accept is None else torch.where(accept, new, old)


def _filled(matrices: Tensor) -> Tensor:
    """(B,), whether a matrix has anything in it."""
    return matrices.flatten(1).any(-1)


def _places(load: Load) -> list[range]:
    """For each batch, which parameters of the load it is of."""
    found: list[range] = []
    first = 0
    for bucket in load.buckets:
        found += [range(first, first + len(bucket.parameters))] * len(bucket.blocks)
        first += len(bucket.parameters)
    return found


def identity(like: Tensor) -> Tensor:
    """One for a whole batch.

    Args:
        like: (..., k, k).
    """
    return torch.eye(like.size(-1), dtype=like.dtype, device=like.device)


def relative(moments: Tensor) -> Tensor:
    """Moments with a largest entry of one, so that products with them stay in range; zero stays zero.

    Args:
        moments: (B, c, b, b).
    """
    largest = moments.abs().amax((-3, -2, -1), keepdim=True)
    return moments / torch.where(largest == 0, 1.0, largest)
