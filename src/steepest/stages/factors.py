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
from steepest.stages.sizes import bounded
from steepest.stages.stage import Entry, Stage, States

SIDES = ("left", "right")
STEPS_TAKEN = "steps_taken"  # in the groups of a state, by the optimizer
TURN, FIRST = 1, 2


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

    def of_batches(self, load: Load, states: Sequence[dict[str, Tensor]], side: str, end: str = "") -> list[Tensor]:
        """A side's moments, or what is made of them.

        Args:
            load: Of the parameters.
            states: Of these.
            side: "left" or "right".
            end: Of the key.

        Returns:
            (B, c, b, b) for each batch.
        """
        return load.parts_of_batches([state[f"{self.prefix}{side}{end}"] for state in states], self.shape_of(side))

    def made_of(self, load: Load, states: Sequence[dict[str, Tensor]], side: str) -> list[Tensor]:
        """What is made of a side's moments; the identity for a matrix that had no gradient yet.

        Args:
            load: Of the parameters.
            states: Of these.
            side: "left" or "right".
        """
        found = self.of_batches(load, states, side, f"_{self.made}")
        if all(parameter in self._begun for parameter in load.parameters):
            return found
        return [torch.where(batch.flatten(1).any(-1)[:, None, None, None], batch, identity(batch)) for batch in found]

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
            old = self.of_batches(load, states, side)
            new = [
                torch.lerp(product(gradient, side, own.size(1)), own, self.options.beta)
                for gradient, own in zip(seen, old, strict=True)
            ]
            self.write(states, f"{self.prefix}{side}", load.rows_of_parameters(new), accept)
        turns = self._turns(load, states)
        if turns is not None:
            self._renew(load, states, turns, accept)
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
                state[key].copy_(own if accept is None else torch.where(accept, own, state[key]))

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

    def renewed(self, moments: Tensor, means: Tensor, old: Tensor, *, first: bool) -> Tensor:
        """What is made of moments.

        Args:
            moments: (B, b, b), symmetric and positive semidefinite; the largest entry of a side's is one.
            means: (B,), of the eigenvalues of the whole side that a block is of.
            old: Likewise, what was made of moments before.
            first: Whether these are the first, and what is old means nothing.

        Returns:
            (B, b, b).
        """
        raise NotImplementedError

    def _turns(self, load: Load, states: Sequence[dict[str, Tensor]]) -> Mapping[str, list[list[int]]] | None:
        """For each side and batch, which matrices have their turn, or nothing made of them yet; None: none at all."""
        turns = [(self.steps + self._places.get(p, 0)) % self.options.every == 0 for p in load.parameters]
        if not any(turns) and all(parameter in self._begun for parameter in load.parameters):
            return None
        flags = load.numbers_of_batches(
            [
                torch.full(state[self.count].shape, TURN * turn, dtype=torch.int64, device="cpu")
                for turn, state in zip(turns, states, strict=True)
            ]
        )
        found = dict.fromkeys(SIDES, flags)
        if not all(parameter in self._begun for parameter in load.parameters):
            alive = (load.numbers_of_batches([state[self.count] for state in states]) > 0).cpu()
            for side in SIDES:
                made = self.of_batches(load, states, side, f"_{self.made}")
                blank = torch.cat([~batch.flatten(1).any(-1) for batch in made]).cpu()
                found[side] = torch.where(alive, torch.where(blank, FIRST, flags), 0)
            begun = alive & (found["left"] != FIRST) & (found["right"] != FIRST)
            for parameter, own in zip(load.parameters, load.numbers_of_parameters(begun), strict=True):
                if bool(own.all()):  # else it is looked at again: a first one may have been masked
                    self._begun.add(parameter)
        if not any(bool(own.any()) for own in found.values()):
            return None
        return {side: [own.tolist() for own in found[side].split(load.counts)] for side in SIDES}

    def _renew(
        self,
        load: Load,
        states: Sequence[dict[str, Tensor]],
        turns: Mapping[str, Sequence[Sequence[int]]],
        accept: Tensor | None,
    ) -> None:
        """Make something anew of the moments of those whose turn it is, of those of one size together."""
        moments = {side: self.of_batches(load, states, side) for side in SIDES}
        made = {side: self.of_batches(load, states, side, f"_{self.made}") for side in SIDES}
        alike: dict[tuple[int, int], list[tuple[str, int, list[int]]]] = {}
        for side in SIDES:
            for number, (batch, own) in enumerate(zip(moments[side], turns[side], strict=True)):
                for kind in (TURN, FIRST):
                    chosen = [place for place, flag in enumerate(own) if flag == kind]
                    if chosen:
                        alike.setdefault((batch.size(-1), kind), []).append((side, number, chosen))
        for (_, kind), pieces in alike.items():
            old = torch.cat([made[side][number][chosen].flatten(0, 1) for side, number, chosen in pieces])
            seen = [relative(moments[side][number][chosen]) for side, number, chosen in pieces]
            means = [own.diagonal(dim1=-2, dim2=-1).mean((-2, -1)).repeat_interleave(own.size(1)) for own in seen]
            kept = torch.cat([own.flatten(0, 1) for own in seen])
            new = self.renewed(kept, torch.cat(means), old, first=kind == FIRST)
            old = torch.where(old.flatten(1).any(-1)[:, None, None], old, identity(old))
            new = torch.where(new.isfinite().all(-1).all(-1)[:, None, None], new, old)
            parts = new.split([len(chosen) * made[side][number].size(1) for side, number, chosen in pieces])
            for (side, number, chosen), part in zip(pieces, parts, strict=True):
                whole = made[side][number]
                places = part.new_tensor(chosen, dtype=torch.int64)
                made[side][number] = whole.index_copy(0, places, part.view(len(chosen), *whole.shape[1:]))
        for side in SIDES:
            self.write(states, f"{self.prefix}{side}_{self.made}", load.rows_of_parameters(made[side]), accept)

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
