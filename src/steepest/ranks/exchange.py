"""Boxes of tensors to those who work on them, and back: one packed all-to-all each way.

A route says who keeps which box of a tensor, which part of it is worked on as a whole, and by whom. Out, each box goes
once, from the nearest rank that keeps it, unless the owner keeps it itself; back, the owner sends every other rank the
box that it keeps. With K the volume of what is worked on, and k_r that of rank r's box in it, the numbers that move are

    out:   K - k_owner                back:   Σ over ranks r other than the owner of k_r.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steepest.ranks.boxes import Box, sizes, volume, within
from steepest.ranks.team import Team


@dataclass(frozen=True)
class Route:
    """What one owner works on.

    Args:
        owner: Rank that works on it.
        whole: Of the tensor, what it works on.
        boxes: Of each rank, what it keeps of that; None: nothing.
    """

    owner: int
    whole: Box
    boxes: tuple[Box | None, ...]

    def out(self) -> list[tuple[int, Box]]:
        """Who sends which box to the owner."""
        own = self.boxes[self.owner]
        keepers: dict[Box, list[int]] = {}
        for rank, box in enumerate(self.boxes):
            if box is not None and box != own:
                keepers.setdefault(box, []).append(rank)
        return [(min(ranks, key=lambda rank: (abs(rank - self.owner), rank)), box) for box, ranks in keepers.items()]

    def back(self) -> list[tuple[int, Box]]:
        """Whom the owner sends which box."""
        return [(rank, box) for rank, box in enumerate(self.boxes) if box is not None and rank != self.owner]

    def numbers(self) -> tuple[int, int]:
        """How many numbers move out, and back, over all ranks."""
        return sum(volume(box) for _, box in self.out()), sum(volume(box) for _, box in self.back())


class Pending:
    """An exchange that is under way.

    Args:
        finish: Waits for it, and puts things together.
    """

    def __init__(self, finish: Callable[[], list[Tensor | None]]) -> None:
        self._finish = finish

    def wait(self) -> list[Tensor | None]:
        """What came, one entry for each route; None where this rank has no part in it."""
        return self._finish()


class Exchange:
    """Packs what goes over several routes into one exchange.

    Args:
        team: Whose ranks these are.
        routes: In the same order on all ranks.
        wire: Type of the numbers on their way; None: as they are.
        always: Whether to exchange even where this rank knows of nothing to move, as others may.

    Attributes:
        sent_bytes: By this rank, so far.
    """

    def __init__(
        self, team: Team, routes: Sequence[Route], wire: torch.dtype | None = None, *, always: bool = False
    ) -> None:
        self.team = team
        self.routes = tuple(routes)
        self.sent_bytes = 0
        self._wire = wire
        own = team.own
        self._sends: dict[bool, list[list[tuple[int, Box]]]] = {}
        self._takes: dict[bool, list[list[tuple[int, Box]]]] = {}
        self._moves: dict[bool, bool] = {}
        for back in (False, True):
            sends: list[list[tuple[int, Box]]] = [[] for _ in range(team.size)]
            takes: list[list[tuple[int, Box]]] = [[] for _ in range(team.size)]
            moves = always
            for index, route in enumerate(self.routes):
                for rank, box in route.back() if back else route.out():
                    moves = True
                    source, target = (route.owner, rank) if back else (rank, route.owner)
                    if source == own:
                        sends[target].append((index, box))
                    if target == own:
                        takes[source].append((index, box))
            self._sends[back], self._takes[back], self._moves[back] = sends, takes, moves

    @property
    def gives(self) -> set[int]:
        """Routes by which this rank sends something out."""
        return {index for own in self._sends[False] for index, _ in own}

    @property
    def moves(self) -> bool:
        """Whether something goes out, on any rank."""
        return self._moves[False]

    def gather(self, parts: Sequence[Tensor]) -> Pending:
        """Bring together what is worked on.

        Args:
            parts: For each route, what this rank keeps of its tensor; of one dtype and device.

        Returns:
            Tells the wholes of those that this rank owns; where it keeps all of one, that is the part itself.
        """
        arrived = self._start(False, lambda index, box: parts[index])

        def finish() -> list[Tensor | None]:
            came = arrived()
            found: list[Tensor | None] = []
            for index, route in enumerate(self.routes):
                if route.owner != self.team.own:
                    found.append(None)
                    continue
                mine = route.boxes[route.owner]
                if mine == route.whole:
                    found.append(parts[index])
                    continue
                whole = parts[index].new_empty(sizes(route.whole))
                if mine is not None:
                    whole[within(mine, route.whole)] = parts[index]
                for box, tensor in came.get(index, ()):
                    whole[within(box, route.whole)] = tensor
                found.append(whole)
            return found

        return Pending(finish)

    def scatter(self, wholes: Sequence[Tensor | None], like: Tensor) -> Pending:
        """Give every rank what it keeps.

        Args:
            wholes: For each route, what the owner has, on the owner.
            like: Of the dtype and device of all.

        Returns:
            Tells, for each route, what this rank keeps of it.
        """
        if self._wire is not None and self._moves[True]:  # all who keep a copy must see the same numbers
            wholes = [None if whole is None else whole.to(self._wire).to(whole.dtype) for whole in wholes]

        def part(index: int, box: Box) -> Tensor:
            whole = wholes[index]
            assert whole is not None, "the owner of a route has what it worked on"
            return whole[within(box, self.routes[index].whole)]

        arrived = self._start(True, part, like)

        def finish() -> list[Tensor | None]:
            came = arrived()
            found: list[Tensor | None] = []
            for index, route in enumerate(self.routes):
                box = route.boxes[self.team.own]
                if box is None:
                    found.append(None)
                elif route.owner == self.team.own:
                    found.append(part(index, box))
                else:
                    ((_, tensor),) = came[index]
                    found.append(tensor)
            return found

        return Pending(finish)

    def _start(
        self, back: bool, part: Callable[[int, Box], Tensor], like: Tensor | None = None
    ) -> Callable[[], Mapping[int, list[tuple[Box, Tensor]]]]:
        """Send, and return what waits for the others' boxes."""
        if not self._moves[back]:
            return dict
        sends, takes = self._sends[back], self._takes[back]
        like = part(0, ()) if like is None else like
        wire = self._wire or like.dtype
        pieces = [part(index, box).reshape(-1) for to in sends for index, box in to]
        given = torch.cat(pieces).to(wire) if pieces else like.new_empty(0, dtype=wire)
        lengths = [sum(volume(box) for _, box in own) for own in takes]
        got = like.new_empty(sum(lengths), dtype=wire)
        sent = [sum(volume(box) for _, box in own) for own in sends]
        self.sent_bytes += given.numel() * given.element_size()
        work: Any = torch.distributed.all_to_all_single(got, given, lengths, sent, group=self.team.group, async_op=True)
        kept = [given]  # until it has arrived

        def finish() -> Mapping[int, list[tuple[Box, Tensor]]]:
            work.wait()
            kept.clear()
            came: dict[int, list[tuple[Box, Tensor]]] = {}
            numbers = got.to(like.dtype)
            entries = [entry for own in takes for entry in own]
            for (index, box), flat in zip(entries, numbers.split([volume(box) for _, box in entries]), strict=True):
                came.setdefault(index, []).append((box, flat.view(sizes(box))))
            return came

        return finish
