"""Which parameters go through a step together: as many as the memory for temporaries allows."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from steepest.anatomy import Bucket, Load, PlanRow
from steepest.anatomy.batches import find_buckets, kind
from steepest.checks import optional, whole
from steepest.geometry import Norm
from steepest.optim.sharing import Portion, Sharing
from steepest.stages import Stage

Present = Sequence[tuple[Mapping[str, Any], Sequence[Tensor]]]
# Of the memory for temporaries, what a load's directions are computed from takes a quarter, these another, and what the
# norm needs besides the rest.
SHARES = 4
# What temporaries may take, relative to the largest bucket, and at least: below, a load is in the cache anyway.
LARGEST_BUCKETS = 1.5
SMALLEST_CAP = 6 * 2**20


def loads(buckets: Sequence[Bucket], *, memory_cap: int | None, adapts: bool = False) -> Iterator[Load]:
    """Pack the buckets of one group; a bucket that is too large is divided, a parameter is not.

    Args:
        buckets: In order.
        memory_cap: Bytes that temporaries may take; None for no bound.
        adapts: Whether the group's norm does, which takes twice as many.
    """
    room = None if memory_cap is None else memory_cap // SHARES
    taken: list[Bucket] = []
    used = 0
    for bucket in buckets:
        parameters, size = bucket.parameters, _bytes(bucket.parameters[0]) * (1 + adapts)
        while parameters:
            if taken and (kind(taken[0]) != kind(bucket) or (room is not None and used + size > room)):
                yield Load(taken)
                taken, used = [], 0
            fitting = len(parameters) if room is None else max(1, (room - used) // size)
            part, parameters = parameters[:fitting], parameters[fitting:]
            taken.append(Bucket(part, bucket.view))
            used += len(part) * size
    if taken:
        yield Load(taken)


def shared_loads(
    buckets: Sequence[Bucket], sharing: Sharing, *, memory_cap: int | None, adapts: bool = False
) -> Iterator[Load]:
    """Likewise for several ranks, alike on each: what counts is what the busiest one has to work on.

    A rank that has nothing of a load yet takes a parameter of any size: else the others would wait for it each time.

    Args:
        buckets: In order.
        sharing: Who works on what.
        memory_cap: Bytes that temporaries of one rank may take; None for no bound.
        adapts: Whether the group's norm does.
    """
    room = None if memory_cap is None else memory_cap // SHARES
    taken: list[Bucket] = []
    used: dict[int, float] = {}
    for bucket in buckets:
        for parameter in bucket.parameters:
            size = _bytes(parameter) * (1 + adapts)
            more = {rank: part * size for rank, part in sharing.burden(parameter).items()}
            over = room is not None and any(rank in used and used[rank] + part > room for rank, part in more.items())
            if taken and (over or kind(taken[0]) != kind(bucket)):
                yield Load(taken)
                taken, used = [], {}
            if taken and taken[-1].view == bucket.view and taken[-1].shape == bucket.shape:
                taken[-1] = Bucket((*taken[-1].parameters, parameter), bucket.view)
            else:
                taken.append(Bucket((parameter,), bucket.view))
            for rank, part in more.items():
                used[rank] = used.get(rank, 0) + part
    if taken:
        yield Load(taken)


class Packing:
    """Remembers how the parameters of a step are packed, until others move.

    Args:
        memory_cap: Bytes that temporaries may take; None for a default by size.

    Raises:
        ValueError: If the cap is not positive.
        TypeError: If it is no whole number.
    """

    def __init__(self, memory_cap: int | None) -> None:
        self.memory_cap: int | None = optional(whole(1))("memory_cap", memory_cap)
        self._key: object = None
        self._asked: object = None
        self._duties: object = None
        self._found: tuple[list[list[Portion]], int | None] = ([], None)

    def fits(self, present: Present) -> bool:
        """Whether the same parameters, of the same shapes, move as when they were packed.

        Args:
            present: Groups, and which of their parameters move.
        """
        self._asked = [
            (group["norm"], [(id(p), p.shape, p.dtype, p.device) for p in members]) for group, members in present
        ]
        return self._asked == self._key

    def of(
        self,
        present: Present,
        rows: Mapping[Tensor, PlanRow],
        norms: Sequence[Norm],
        stages: Sequence[Sequence[Stage]],
        sharing: Sharing,
        *,
        bounded: bool,
    ) -> tuple[list[list[Portion]], int | None]:
        """Loads of each group, what this rank does of them, and the cap that they keep.

        Args:
            present: What `fits` was last asked about.
            rows: Of the plan.
            norms: Of the groups.
            stages: That work on each group.
            sharing: Who works on what.
            bounded: Whether loads are finished one after the other, so that small ones save memory; the same always.
        """
        if self._key is None or self._asked != self._key or self._duties is not sharing.duties:
            self._duties = sharing.duties
            found = [
                find_buckets(members, rows, matrix=norm.matrix)
                for (_, members), norm in zip(present, norms, strict=True)
            ]
            cap = (self.memory_cap or default_cap([one for own in found for one in own], sharing)) if bounded else None
            self._found = (
                [
                    [
                        Portion(sharing, load, rows, norm, around)
                        for load in (
                            loads(own, memory_cap=cap, adapts=norm.adapts)
                            if sharing.team.size == 1
                            else shared_loads(own, sharing, memory_cap=cap, adapts=norm.adapts)
                        )
                    ]
                    for own, norm, around in zip(found, norms, stages, strict=True)
                ],
                cap,
            )
            self._key = self._asked
        return self._found

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle, whose parameters are others."""
        return {"memory_cap": self.memory_cap, "_key": None, "_asked": None, "_duties": None, "_found": ([], None)}


def default_cap(buckets: Sequence[Bucket], sharing: Sharing | None = None) -> int:
    """Bytes that temporaries may take where nobody said.

    Args:
        buckets: All of the optimizer's.
        sharing: Who works on what; None: this process on everything.
    """
    if sharing is None or sharing.team.size == 1:
        sizes = [len(bucket.parameters) * _bytes(bucket.parameters[0]) for bucket in buckets]
    else:
        sizes = []
        for bucket in buckets:
            used: dict[int, float] = {}
            for parameter in bucket.parameters:
                for rank, part in sharing.burden(parameter).items():
                    used[rank] = used.get(rank, 0) + part * _bytes(parameter)
            sizes.append(max(used.values()))
    return max(SMALLEST_CAP, int(LARGEST_BUCKETS * max(sizes, default=0)))


def _bytes(parameter: Tensor) -> int:
    """Of a copy in float32 or wider, twice in half precision: gradients and weights are copied too."""
    return parameter.numel() * (parameter.element_size() if parameter.element_size() >= 4 else 8)
