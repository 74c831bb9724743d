"""Which matrices this rank works on, and how they get to it and back to the ranks that keep them.

Elementwise norms work on what a rank keeps. For the others a parameter has an owner, or several, where what ranks keep
are whole matrices of the view; owners are chosen once, costliest first, and stay, as stages keep things with them.
"""

import functools
import inspect
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from steepest.anatomy import Bucket, Load, PlanRow
from steepest.anatomy.views import View
from steepest.geometry import Norm
from steepest.geometry.norm import completed
from steepest.ranks import (
    Box,
    Duties,
    Exchange,
    Layout,
    Pending,
    Route,
    Team,
    assign,
    exchange_device,
    is_sharded,
    local,
    scalar_type,
    unanimous,
    volume,
)
from steepest.ranks.boxes import full, own_box, sizes
from steepest.stages import Entry, Stage


def pieces(layout: Layout, row: PlanRow, norm: Norm, stages: Sequence[Stage]) -> dict[Box, list[int]]:
    """What of a parameter is worked on as one, and the ranks that may do it.

    Args:
        layout: Of the parameter.
        row: Of the plan.
        norm: Of its group; one that is not of matrices sees the parameter as one vector, whatever the view.
        stages: That work on it.

    Returns:
        The boxes that ranks keep, if each is a whole number of the view's matrices and stages keep nothing that is not
        divided alike; else the whole parameter, for all ranks that keep something of it.
    """
    distinct = layout.distinct
    if norm.matrix and row.view is not None and all(row.view.within(row.shape, box) is not None for box in distinct):
        entries = [entry for stage in stages for entry in stage.entries(row) if entry.shape is not None]
        if len(distinct) == 1 or not entries or (len(row.blocks()) == 1 and _alike(layout, row, entries)):
            return distinct
    return {full(layout.shape): [rank for rank, box in enumerate(layout.boxes) if box is not None]}


def _alike(layout: Layout, row: PlanRow, entries: Sequence[Entry]) -> bool:
    """Whether what stages keep is divided as its matrices are: by equal parts of the first dimension."""
    parts = sorted(layout.distinct)
    equal = all(stop - start == parts[0][0][1] for (start, stop), *_ in parts) and parts[-1][0][1] == row.shape[0]
    cut = all(part[1:] == full(layout.shape)[1:] for part in parts)
    return (
        equal and cut and all(entry.travels and entry.shape and entry.shape[0] % row.shape[0] == 0 for entry in entries)
    )


def _check_entries(row: PlanRow, stages: Sequence[Stage]) -> None:
    """Refuse an entry of which ranks cannot know whether it is there."""
    for stage in stages:
        for entry in stage.entries(row):
            if entry.travels and not entry.eager:
                raise ValueError(
                    f"{stage!r}: the entry {entry.key!r} of {row.name!r} comes when there is something to keep, and "
                    "other ranks cannot know when. Make it eager; or give it travels=False, and see to it in refresh()."
                )


def _takes_company(norm: Norm) -> bool:
    """Whether a norm wants to know what is worked on elsewhere; one of a user may not."""
    taken = inspect.signature(norm.lmos).parameters.values()
    return any(one.name == "company" or one.kind is one.VAR_KEYWORD for one in taken)


def work_of(norm: Norm, row: PlanRow, box: Box) -> float:
    """Operations that the directions of a part of a parameter take.

    Args:
        norm: Of its group.
        row: Of the plan.
        box: Of the parameter.
    """
    norm, shape = completed(norm), sizes(box)
    view = row.view.within(row.shape, box) if row.view is not None and norm.matrix else None
    blocks = ((1, 1, volume(box)),) if view is None else view.blocks(shape)
    return sum(count * norm.work(m, n) for count, m, n in blocks)


PLACES, FRACTION = 251, 2.0**-38  # of parts that are told apart; sums of 16,384 ranks stay exact in float64


def turn_of(row: PlanRow) -> tuple[tuple[int, ...], str]:
    """Sorts what is in one load together, before it is shared out: ranks wait for each other's part of a load.

    Args:
        row: Of a parameter.
    """
    return tuple(row.shape), str(row.view)


@dataclass
class Summary:
    """How the work of an optimizer is shared, and what the last step sent.

    Args:
        ranks: How many share it.
        owners: Of each parameter's name, the ranks that work on it, places in the team; None: each on what it keeps.
        flops: Operations that each rank's directions take in a step, as far as this one knows: of parameters that only
            a part of the ranks shares, those of its own part.
        sent_bytes: By this rank, in the last step that was taken: averages to their owners, and directions back; what
            stages exchange when they refresh is not counted.
        agreed_bytes: Payload of what this rank summed with others in the last step.
        orthogonalised: How many matrices this rank found directions of in the last step, elementwise norms not counted.
    """

    ranks: int = 1
    owners: Mapping[str, tuple[int, ...] | None] = field(default_factory=dict[str, tuple[int, ...] | None])
    flops: tuple[float, ...] = (0.0,)
    sent_bytes: int = 0
    agreed_bytes: int = 0
    orthogonalised: int = 0

    @property
    def imbalance(self) -> float:
        """Operations of the rank with most, relative to the mean; 1 if there are none."""
        mean = sum(self.flops) / len(self.flops)
        return max(self.flops) / mean if mean else 1.0


class Sharing:
    """Who works on the parameters of one optimizer.

    Args:
        group: Process group whose ranks keep copies of all plain parameters; None: those of
            DistributedDataParallel modules only.
        wire: Type of averages and directions on their way; None: as they are.
    """

    def __init__(self, group: Any, wire: torch.dtype | None) -> None:
        self.group = group
        self.wire = wire
        self.duties = Duties(Team())
        self.summary = Summary()
        self._known: dict[Tensor, tuple[object, ...]] = {}
        self._flops: dict[tuple[Tensor, int], float] = {}
        self._names: list[str] = []
        self._moving: list[tuple[int, bool]] = []  # parameters, and whether they are trained
        self.alike = False  # whether ranks were ever asked if they know the same parameters

    @property
    def team(self) -> Team:
        """The ranks."""
        return self.duties.team

    def knows(self, parameters: Sequence[Tensor]) -> bool:
        """Whether it is known who works on these: not in a copy, nor of one that was frozen and no longer is.

        Args:
            parameters: All of the optimizer's.
        """
        if self._known and self.team.size == 1:
            return True
        return [(id(p), p.requires_grad) for p in parameters] == self._moving

    def know(self, members: Sequence[tuple[PlanRow, Norm, Sequence[Stage]]]) -> bool:
        """Share the work on parameters that are not known yet; what is shared stays so.

        Args:
            members: All of the optimizer's parameters, the norms of their groups, and the stages that work on them.

        Returns:
            Whether something changed.

        Raises:
            ValueError: If the layout of one is not known here, or is on other ranks than the team's.
        """
        keys = {row.parameter: self._key(row, norm, stages) for row, norm, stages in members}
        self._moving = [(id(row.parameter), row.parameter.requires_grad) for row, _, _ in members]
        if keys == self._known:
            return False
        shares = [is_sharded(row.parameter) or self._group_of(row) is not None for row, _, _ in members]
        if any(shares):
            groups = [self._group_of(row) for row, _, _ in members]
            team = Team.of([row.parameter for row, _, _ in members], [group for group in groups if group is not None])
        else:
            team = Team()
        if team.ranks != self.team.ranks:
            self._known = {}
        old = self.duties if self._known else Duties(team)
        copies = frozenset(row.parameter for row, _, _ in members if self._copied(row, team))
        layouts = {
            row.parameter: team.layout(
                row.name,
                row.parameter,
                copies=team.places(self._group_of(row)) if row.parameter in copies else None,
            )
            for row, _, _ in members
        }
        routes = {p: old.routes[p] for p in keys if p in old.routes and self._known.get(p) == keys[p]}
        wide = [(p, r) for p, own in routes.items() if len(layouts[p].members) == team.size for r in own]
        fixed = [(self._flops.get((p, route.owner), 0.0), [route.owner]) for p, route in wide]
        asked: dict[tuple[bool, tuple[int, ...]], list[tuple[PlanRow, Box, float, list[int]]]] = {}
        for row, norm, stages in members:
            shared = is_sharded(row.parameter) or row.parameter in copies
            if team.size > 1 and shared:
                team.check_device(row.name, row.parameter)
            if row.parameter in routes or not shared or not row.parameter.numel() or completed(norm).elementwise:
                continue
            layout = layouts[row.parameter]
            if team.size > 1:
                _check_entries(row, stages)
            for box, ranks in pieces(layout, row, norm, stages).items():
                frozen = not row.parameter.requires_grad
                asked.setdefault((frozen, layout.members), []).append((row, box, work_of(norm, row, box), ranks))
        # What all ranks keep comes first, so that they choose alike; then what only some of them know of. What is
        # frozen is work for nobody, unless it thaws.
        for (frozen, sharers), own in sorted(asked.items(), key=lambda item: (-len(item[0][1]), item[0][0])):
            own.sort(key=lambda piece: turn_of(piece[0]))
            costs = [cost for cost, _ in fixed] + [cost for _, _, cost, _ in own]
            among = [ranks for _, ranks in fixed] + [ranks for *_, ranks in own]
            owner = {index: rank for rank, mine in enumerate(assign(costs, team.size, among)) for index in mine}
            chosen = [owner[index] for index in range(len(fixed), len(costs))]
            for (row, box, cost, _), rank in zip(own, chosen, strict=True):
                kept = layouts[row.parameter].boxes
                inside = [b if b is not None and (b == box or box == full(row.shape)) else None for b in kept]
                routes[row.parameter] = (*routes.get(row.parameter, ()), Route(rank, box, tuple(inside)))
                self._flops[row.parameter, rank] = 0.0 if frozen else cost
            if len(sharers) == team.size and not frozen:
                fixed += [(cost, [rank]) for (_, _, cost, _), rank in zip(own, chosen, strict=True)]
        self.duties = Duties(team, layouts, routes, copies)
        self._known = keys
        vars(self).pop("_parameters_known", None)
        current = {(p, route.owner) for p, own in routes.items() for route in own}
        self._flops = {key: cost for key, cost in self._flops.items() if key in current}
        flops = [0.0] * team.size
        for (_, rank), cost in self._flops.items():
            flops[rank] += cost
        names = {row.parameter: row.name for row, _, _ in members}
        self._names = list(names.values())
        owners = {name: tuple(route.owner for route in routes[p]) if p in routes else None for p, name in names.items()}
        self.summary = Summary(team.size, owners, tuple(flops))
        return True

    def __deepcopy__(self, memo: dict[int, Any]) -> "Sharing":
        """A copy has other parameters, which are found at its first step; a process group is no object to copy."""
        return Sharing(self.group, self.wire)

    def __reduce__(self) -> Any:
        """Likewise, where there is no process group."""
        return Sharing, (self.group, self.wire)

    def _key(self, row: PlanRow, norm: Norm, stages: Sequence[Stage]) -> tuple[object, ...]:
        p: Any = row.parameter
        layout = (p.device_mesh, tuple(p.placements)) if is_sharded(p) else None
        return (tuple(p.shape), p.requires_grad, row.view, norm, layout, tuple(map(id, stages)))

    def _group_of(self, row: PlanRow) -> Any:
        """The process group of which each rank has a copy of a plain parameter."""
        if is_sharded(row.parameter):
            return None
        return self.group if row.copies is None else row.copies.group

    def _copied(self, row: PlanRow, team: Team) -> bool:
        group = self._group_of(row)
        return group is not None and team.size > 1

    @functools.cached_property
    def _parameters_known(self) -> int:
        """A number that is the same where ranks know the same parameters in the same order."""
        known = [
            (
                layout.shape,
                p.dtype,
                len(layout.members),
                name if self.duties.shares(p) else None,
                str(self._known[p][3]),
            )
            + ((self.duties.routes.get(p),) if self.duties.everyone(p) else ())
            for (p, layout), name in zip(self.duties.layouts.items(), self._names, strict=True)
        ]
        return zlib.crc32(repr(known).encode())

    def fingerprint(self, memory_cap: int | None) -> int:
        """A number that is the same where ranks exchange the same: of parameters, and of what decides on packing.

        Args:
            memory_cap: Of the optimizer.
        """
        return zlib.crc32(f"{memory_cap} {self.wire}".encode(), self._parameters_known)

    def check_alike(self, device: torch.device, fingerprint: int) -> None:
        """Ask at the first step whether all ranks exchange the same; all of them take part.

        Args:
            device: On which they exchange numbers.
            fingerprint: Of this rank.

        Raises:
            ValueError: If not, on all ranks.
        """
        if not self.alike:
            (found,) = unanimous([fingerprint], exchange_device(device, self.team), self.team)
            self.alike = True
            if found is None:
                self.refuse_unlike()

    def refuse_unlike(self) -> None:
        """Say that ranks do not know the same parameters, or pack them otherwise.

        Raises:
            ValueError: Always.
        """
        shapes = [tuple(layout.shape) for layout in self.duties.layouts.values()]
        raise ValueError(
            f"The {self.team.size} ranks of this optimizer do not know the same parameters in the same order, or have "
            f"another memory_cap or exchange_dtype; this one has {len(shapes)} parameters, the first of shape "
            f"{shapes[0]}. Build the model and the optimizer alike on all ranks that share its parameters, and one "
            "optimizer for each stage of a pipeline."
        )

    def counts(self, device: torch.device, *, still: bool) -> bool:
        """Whether ranks must tell each other which parameters have a gradient, and whether one is not zero.

        On an accelerator that would mean to wait for it, which is done only where parts are worked on apart, as
        experts are: elsewhere all ranks have the same.

        Args:
            device: Of the parameters.
            still: Whether all learning rates are zero: then the step may be one that only makes the state.
        """
        if self.team.size == 1:
            return False
        return still or device.type == "cpu" or any(len(routes) > 1 for routes in self.duties.routes.values())

    def counted(self, parameter: Tensor) -> float:
        """As what a gradient on this rank counts: one, and a fraction that is zero in a sum over all copies of a part.

        Args:
            parameter: Of the optimizer.
        """
        if not self.duties.shares(parameter):
            return 1.0
        for place, keepers in enumerate(self.duties.layouts[parameter].distinct.values()):
            if self.team.own in keepers:
                others = len(keepers) - 1
                return 1.0 + (1 + place % PLACES) * (others if keepers[0] == self.team.own else -1) * FRACTION
        return 1.0

    def check_counts(self, rows: Sequence[PlanRow], counts: Sequence[float]) -> None:
        """Refuse a gradient that only some have of those who keep copies of the same part, which would part.

        Args:
            rows: Of all parameters.
            counts: What `counted` is on the ranks where each has a gradient, added up.

        Raises:
            ValueError: If so.
        """
        for row, count in zip(rows, counts, strict=True):
            keepers = self.duties.layouts[row.parameter].distinct.values()
            copies = min(map(len, keepers), default=1) if self.duties.shares(row.parameter) else 1
            if row.parameter.numel() and (round(count) % copies or count != round(count)):
                raise ValueError(
                    f"{row.name!r} of shape {tuple(row.shape)} has a gradient on {count:.0f} of the {self.team.size} "
                    f"ranks, but each part of it has copies on {copies}. Let DistributedDataParallel or FSDP average "
                    "gradients, with find_unused_parameters=True where some ranks do not use all layers, or give zeros."
                )

    def note(self, portions: Sequence["Portion"], before: int) -> None:
        """Take note of what a step sent.

        Args:
            portions: Of the step.
            before: What these had sent before it.
        """
        self.summary = replace(
            self.summary,
            sent_bytes=sum(portion.sent_bytes for portion in portions) - before,
            agreed_bytes=self.team.agreed_bytes,
            orthogonalised=sum(portion.matrices for portion in portions),
        )

    def burden(self, parameter: Tensor) -> dict[int, float]:
        """The part of a parameter that each rank works on; of what all work on alike, the largest for each.

        Args:
            parameter: Any shape.
        """
        whole = max(1, parameter.numel())
        routes = self.duties.routes.get(parameter)
        if routes and not self.duties.everyone(parameter):  # others have other owners, and must pack alike
            return dict.fromkeys(range(self.team.size), self.duties.part(parameter))
        if routes:
            return {route.owner: volume(route.whole) / whole for route in routes}
        layout = self.duties.layouts[parameter]
        part = max((volume(box) for box in layout.distinct), default=0) / whole
        return dict.fromkeys(range(self.team.size), part)


class Portion:
    """A load of all ranks, and what this one does of it.

    Args:
        sharing: Who works on what.
        load: Parameters of one group, dtype and device, by their whole shapes.
        rows: Of the plan.
        norm: Of the group.
        stages: That work on the group.

    Attributes:
        load: The load; the order of its matrices is that of numbers that ranks share.
        work: What this rank finds directions of; one process: the load.
        company: Shapes of all batches of the load, where they are worked on apart.
        needed: Places in the load of the parameters whose averages this rank works on or sends to others.
    """

    def __init__(
        self,
        sharing: Sharing,
        load: Load,
        rows: Mapping[Tensor, PlanRow],
        norm: Norm,
        stages: Sequence[Stage],
    ) -> None:
        self.load = self.work = load
        self.duties = duties = sharing.duties
        self.team = duties.team
        self.company: list[tuple[int, int, int]] | None = None
        self.matrices = 0 if completed(norm).elementwise else sum(load.counts)
        self._places = list(range(len(load.parameters)))  # of what is worked on, in the load
        self.needed = self._places
        self._exchange = self._aside = None
        self._index: Tensor | None = None
        self._keys: tuple[str, ...] = ()
        if self.team.size == 1:
            return
        elementwise = completed(norm).elementwise
        shared = [duties.shares(parameter) for parameter in load.parameters]
        if not any(shared):
            self._number(list(load.parameters), [None] * len(load.parameters))
            return
        if _takes_company(completed(norm)):
            self.company = [(len(bucket.parameters) * b, m, n) for bucket in load.buckets for b, m, n in bucket.blocks]
        boxes: list[Box | None] = []
        views: list[View | None] = []
        for parameter, own in zip(load.parameters, shared, strict=True):
            view = rows[parameter].view if norm.matrix else None
            if not own:
                boxes.append(full(tuple(parameter.shape)))
            elif elementwise:
                boxes.append(duties.layouts[parameter].boxes[self.team.own])
            else:
                route = duties.own_route(parameter)
                boxes.append(None if route is None else route.whole)
            box = boxes[-1]
            views.append(None if view is None or box is None else view.within(tuple(parameter.shape), box))
        alike: dict[tuple[object, ...], list[int]] = {}
        for place, (box, view) in enumerate(zip(boxes, views, strict=True)):
            if box is not None:
                alike.setdefault((sizes(box), view), []).append(place)
        self._places = [place for places in alike.values() for place in places]
        self.work = Load(
            [
                Bucket(
                    tuple(load.parameters[place] for place in places),
                    views[places[0]],
                    torch.Size(sizes(boxes[places[0]] or ())),
                )
                for places in alike.values()
            ]
        )
        if not elementwise:
            self._routed = [
                (place, route)
                for place, parameter in enumerate(load.parameters)
                for route in duties.routes.get(parameter, ())
            ]
            self._exchange = Exchange(self.team, [route for _, route in self._routed], sharing.wire)
            self.needed = sorted({*self._places, *(self._routed[index][0] for index in self._exchange.gives)})
            self.matrices = sum(self.work.counts)
            self._entries(rows, stages)
        self._number(list(load.parameters), boxes)

    def _number(self, parameters: Sequence[Tensor], boxes: Sequence[Box | None]) -> None:
        """Where this rank's numbers stand among those of all, and how much they count in sums."""
        total = sum(self.load.counts)
        device = parameters[0].device
        by_parameter = self.load.numbers_of_parameters(torch.arange(total, device=device))
        chosen: list[Tensor] = []
        weights: list[Tensor] = []
        for place in self._places:
            parameter, box, numbers = parameters[place], boxes[place], by_parameter[place]
            routes = self.duties.routes.get(parameter, ())
            if box is not None and routes and box != full(tuple(parameter.shape)):
                numbers = _part(numbers, self.load.blocks_of(place), tuple(parameter.shape), box)
            weight = self.duties.part(parameter) if routes else self.duties.weight(parameter)
            chosen.append(numbers)
            weights.append(torch.full(numbers.shape, weight, dtype=scalar_type(device), device=device))
        self._total = total
        self._chosen = torch.tensor(self._places, dtype=torch.int64, device=device)
        empty = torch.empty(0, dtype=torch.int64, device=device)
        self._index = self.work.numbers_of_batches(chosen) if chosen else empty
        self._weights = self.work.numbers_of_batches(weights) if weights else empty.to(scalar_type(device))
        self._once = all(weight.numel() == 0 or float(weight[0]) == 1 for weight in weights)

    def _entries(self, rows: Mapping[Tensor, PlanRow], stages: Sequence[Stage]) -> None:
        """What stages keep of matrices goes to their owners and back, too."""
        keys: list[str] = []
        self._asides: list[tuple[int, str]] = []
        routes: list[Route] = []
        for place, parameter in enumerate(self.load.parameters):
            for entry in (entry for stage in stages for entry in stage.entries(rows[parameter]) if entry.travels):
                keys += [entry.key] if entry.key not in keys else []
                shape = tuple(parameter.shape) if entry.shape is None else tuple(entry.shape)
                for route in self.duties.routes.get(parameter, ()):
                    self._asides.append((place, entry.key))
                    if entry.shape is None:
                        routes.append(route)
                    elif len(self.duties.routes[parameter]) > 1:  # divided as the matrices are
                        part = full((shape[0] // len(self.duties.routes[parameter]), *shape[1:]))
                        routes.append(Route(route.owner, part, tuple(part if box else None for box in route.boxes)))
                    else:
                        members = self.duties.layouts[parameter].members
                        kept = self.team.layout(entry.key, entry.zeros(parameter), copies=members)
                        routes.append(Route(route.owner, full(shape), kept.boxes))
        self._keys = tuple(keys)
        if keys:
            self._aside = Exchange(self.team, routes)

    def gather(self, tensors: Sequence[Tensor]) -> Pending:
        """Bring averages, or what is shaped like them, to those who work on them.

        Args:
            tensors: What this rank keeps, one for each parameter of the load.

        Returns:
            Tells the wholes, one for each parameter of `work`.
        """
        if self._exchange is None:
            return Pending(lambda: [tensors[place] for place in self._places])
        pending = self._exchange.gather([tensors[place] for place, _ in self._routed])

        def finish() -> list[Tensor | None]:
            found = dict(enumerate(tensors))
            for (place, _), whole in zip(self._routed, pending.wait(), strict=True):
                if whole is not None:
                    found[place] = whole
            return [found[place] for place in self._places]

        return Pending(finish)

    def scatter(self, wholes: Sequence[Tensor], like: Sequence[Tensor]) -> Pending:
        """Bring directions to those who keep a part of them.

        Args:
            wholes: One for each parameter of `work`.
            like: What this rank keeps, one for each parameter of the load.

        Returns:
            Tells what this rank keeps of each.
        """
        mine = dict(zip(self._places, wholes, strict=True))
        pending: Pending | None = None
        if self._exchange is not None:
            own = self.team.own
            given = [mine[place] if route.owner == own else None for place, route in self._routed]
            pending = self._exchange.scatter(given, like[0])

        def finish() -> list[Tensor | None]:
            if pending is not None:
                for (place, _), part in zip(self._routed, pending.wait(), strict=True):
                    if part is not None:
                        mine[place] = part
            return [mine[place] if place in mine else torch.zeros_like(kept) for place, kept in enumerate(like)]

        return Pending(finish)

    def states(self, states: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """What stages keep of the matrices that this rank works on.

        Args:
            states: Of the load's parameters.

        Returns:
            One for each parameter of `work`; the states themselves, or their memory, on one process.
        """
        if self._aside is None:
            return [
                _here(states[place]) if is_sharded(self.load.parameters[place]) else states[place]
                for place in self._places
            ]
        parts = local([states[place][key] for place, key in self._asides])
        travelling = {place for place, _ in self._asides}
        found = {place: dict(states[place]) if place in travelling else states[place] for place in self._places}
        for (place, key), whole, part in zip(self._asides, self._aside.gather(parts).wait(), parts, strict=True):
            if whole is not None:
                found[place][key] = whole.clone() if whole is part else whole
        return [found[place] for place in self._places]

    def keep(self, states: Sequence[dict[str, Tensor]], changed: Sequence[dict[str, Tensor]]) -> None:
        """Give what stages keep back to those who keep it.

        Args:
            states: Of the load's parameters; written to.
            changed: What `states` returned, as stages left it.
        """
        if self._aside is None:
            return
        mine = dict(zip(self._places, changed, strict=True))
        for place, own in mine.items():  # what does not travel may have been put there anew
            if own is not states[place]:
                states[place].update({key: value for key, value in own.items() if key not in self._keys})
        routes = self._aside.routes
        given = [
            mine[place][key] if route.owner == self.team.own else None
            for (place, key), route in zip(self._asides, routes, strict=True)
        ]
        parts = local([states[place][key] for place, key in self._asides])
        for target, part in zip(parts, self._aside.scatter(given, parts[0]).wait(), strict=True):
            if part is not None:
                target.copy_(part)

    def chosen(self, numbers: Tensor) -> Tensor:
        """Of the numbers of all parameters, those of what this rank works on.

        Args:
            numbers: One per parameter of `load`.
        """
        return numbers if self._index is None else numbers[self._chosen]

    def size(self, batches: Sequence[Tensor], device: torch.device) -> Callable[[], Tensor]:
        """Sum of the squares of directions, over all ranks.

        Args:
            batches: Of this rank.
            device: Of the directions.

        Returns:
            What waits for the sum.
        """
        if self._index is None:
            size = torch.stack(torch._foreach_norm(list(batches))).square().sum()
            return lambda: size
        dtype = scalar_type(device)
        if not batches:
            return self.team.sum_later(torch.zeros((), dtype=dtype, device=device))
        if self._once:
            return self.team.sum_later(torch.stack(torch._foreach_norm(list(batches))).to(dtype).square().sum())
        own = torch.cat([batch.square().sum(dim=(-2, -1)) for batch in batches]).to(dtype)
        return self.team.sum_later((own * self._weights).sum())

    def spread(self, numbers: Tensor) -> Tensor:
        """Numbers of this rank's matrices among those of all: zero elsewhere, so that a sum over ranks has all.

        Args:
            numbers: One per matrix of `work`, batch after batch.

        Returns:
            One per matrix of `load`, in float64; on one process what was given.
        """
        if self._index is None:
            return numbers
        dtype = scalar_type(numbers.device)
        return torch.zeros(self._total, dtype=dtype, device=numbers.device).index_put(
            (self._index,), numbers.to(dtype) * self._weights
        )

    def own(self, numbers: Tensor) -> Tensor:
        """Of the numbers of all matrices, those of this rank's.

        Args:
            numbers: One per matrix of `load`, or 0-d.
        """
        return numbers if self._index is None or numbers.ndim == 0 else numbers[self._index]

    def products(self, one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
        """Inner products, matrix by matrix, of what this rank keeps, to be added up over ranks.

        Args:
            one: Shaped like what this rank keeps of the parameters of `load`.
            other: Likewise.

        Returns:
            One per matrix of `load`, in float64 where the device has it. Where parameters are not of all ranks, as
            many rows: each set of ranks has one of its own.
        """
        dtype = scalar_type(one[0].device)
        found = [self._of_matrices(place, a * b, dtype) for place, (a, b) in enumerate(zip(one, other, strict=True))]
        if self.shared:
            found = [own * self._first(p) for own, p in zip(found, self.load.parameters, strict=True)]
        numbers = self.load.numbers_of_batches(found)
        if self._row is None:
            return numbers
        return numbers.new_zeros(self.team.size, len(numbers)).index_put(self._row, numbers)

    def own_products(self, summed: Tensor) -> Tensor:
        """Of what `products` told, added up, the numbers of this rank's parameters.

        Args:
            summed: Over all ranks.
        """
        return summed if self._row is None else summed[self._row]

    def stretch_(self, tensors: Sequence[Tensor], factors: Tensor) -> None:
        """Multiply matrices.

        Args:
            tensors: What this rank keeps of the parameters of `load`; written to.
            factors: One per matrix of `load`.
        """
        numbers = self.load.numbers_of_parameters(factors)
        for place, (tensor, own) in enumerate(zip(tensors, numbers, strict=True)):
            own = own.to(tensor.dtype)
            if own.numel() == 1:
                tensor.mul_(own[0])
                continue
            bucket, whole = self.load.bucket_of(place), self.load.parameters[place].shape
            parts = own.split([count for count, _, _ in bucket.blocks])
            filled = [part.view(-1, 1, 1).expand(b) for part, b in zip(parts, bucket.blocks, strict=True)]
            merged = cast(View, bucket.view).merge(filled, whole)
            tensor.mul_(merged if tensor.shape == whole else merged[self._box(place)])

    def _of_matrices(self, place: int, entries: Tensor, dtype: torch.dtype) -> Tensor:
        """Sums over the entries of each matrix, as far as this rank keeps them."""
        bucket = self.load.bucket_of(place)
        if sum(count for count, _, _ in bucket.blocks) == 1:
            return entries.sum(dtype=dtype).view(1)
        whole = self.load.parameters[place].shape
        if entries.shape != whole:
            part, entries = entries, torch.zeros(whole, dtype=entries.dtype, device=entries.device)
            entries[self._box(place)] = part
        return torch.cat([part.sum((-2, -1), dtype=dtype) for part in cast(View, bucket.view).split_tensor(entries)])

    def _box(self, place: int) -> tuple[slice, ...]:
        """Where what this rank keeps of a parameter lies in it."""
        return tuple(slice(start, stop) for start, stop in own_box(self.load.parameters[place]))

    def _first(self, parameter: Tensor) -> float:
        """1 on one of the ranks that keep the same part, 0 on the others."""
        if not self.duties.shares(parameter):
            return 1.0
        return self.duties.weight(parameter) / self.duties.part(parameter)

    @functools.cached_property
    def _row(self) -> tuple[Tensor, Tensor] | None:
        """Where the numbers of each matrix stand among those of other ranks' parameters; None: all keep the same."""
        parameters = self.load.parameters
        if not self.shared or all(map(self.duties.everyone, parameters)):
            return None
        device = local(parameters[:1])[0].device
        own = [self.duties.layouts[p].members[0] if self.duties.shares(p) else self.team.own for p in parameters]
        rows = self.load.per_matrix(torch.tensor(own, dtype=torch.int64, device=device))
        return rows, torch.arange(len(rows), device=device)

    @property
    def travels(self) -> bool:
        """Whether something of this load goes over the wire before it is worked on, on any rank."""
        return self._exchange is not None and self._exchange.moves

    @property
    def shared(self) -> bool:
        """Whether numbers of this load must be added up over ranks."""
        return self._index is not None

    @property
    def sent_bytes(self) -> int:
        """By this rank, so far."""
        return sum(each.sent_bytes for each in (self._exchange, self._aside) if each is not None)


def _here(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state as plain tensors, which share its memory: of a mesh of one rank, that has all of everything."""
    return dict(zip(state, local(list(state.values())), strict=True))


def _part(numbers: Tensor, blocks: Sequence[tuple[int, int, int]], shape: tuple[int, ...], box: Box) -> Tensor:
    """Of the numbers of a parameter's matrices, block after block, those of a part that holds whole ones."""
    (size, (start, stop)), *_ = [(s, b) for s, b in zip(shape, box, strict=True) if b != (0, s)]
    parts = numbers.split([count for count, _, _ in blocks])
    return torch.cat([part[len(part) * start // size : len(part) * stop // size] for part in parts])
