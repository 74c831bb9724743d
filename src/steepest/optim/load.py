"""Which parameters go through a step together: as many as the memory for temporaries allows."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from steepest.anatomy import PlanRow, View
from steepest.checks import optional, whole
from steepest.geometry import Norm
from steepest.optim.bucket import Bucket

T = TypeVar("T")
Present = Sequence[tuple[Mapping[str, Any], Sequence[Tensor]]]
# Of the memory for temporaries, what a load's directions are computed from takes a quarter, these another, and what the
# norm needs besides the rest.
SHARES = 4
# What temporaries may take, relative to the largest bucket, and at least: below, a load is in the cache anyway.
LARGEST_BUCKETS = 1.5
SMALLEST_CAP = 6 * 2**20


class Load:
    """Buckets of one group, dtype and device.

    Args:
        buckets: At least one.
    """

    def __init__(self, buckets: Sequence[Bucket]) -> None:
        self.buckets = tuple(buckets)
        self.parameters = tuple(parameter for bucket in buckets for parameter in bucket.parameters)

    def matrices(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Gather tensors shaped like the parameters into batches, bucket by bucket.

        Args:
            tensors: One per parameter.

        Returns:
            One batch (B, m, n) per bucket and block of its view.
        """
        parts = _split(tensors, [len(bucket.parameters) for bucket in self.buckets])
        return tuple(batch for bucket, own in zip(self.buckets, parts, strict=True) for batch in bucket.matrices(own))

    def parameter_shaped(self, batches: Sequence[Tensor]) -> list[Tensor]:
        """The inverse of `matrices`; may share memory with the batches."""
        parts = _split(batches, [len(bucket.blocks) for bucket in self.buckets])
        return [
            tensor for bucket, own in zip(self.buckets, parts, strict=True) for tensor in bucket.parameter_shaped(own)
        ]

    @property
    def batches(self) -> int:
        """Number of batches that `matrices` returns."""
        return sum(len(bucket.blocks) for bucket in self.buckets)

    def per_matrix(self, numbers: Tensor) -> Tensor:
        """Repeat the number of a parameter for each of its matrices.

        Args:
            numbers: One per parameter.

        Returns:
            One per matrix, batch after batch.
        """
        counts = [sum(block[0] for block in bucket.blocks) for bucket in self.buckets for _ in bucket.parameters]
        return self.numbers_of_batches([number.expand(count) for number, count in zip(numbers, counts, strict=True)])

    def numbers_of_parameters(self, numbers: Tensor) -> list[Tensor]:
        """Give every parameter the numbers of its matrices.

        Args:
            numbers: One per matrix, batch after batch.

        Returns:
            One vector per parameter, block after block.
        """
        result: list[Tensor] = []
        for bucket, own in zip(self.buckets, numbers.split(self._sizes()), strict=True):
            count = len(bucket.parameters)
            batches = own.split([count * block[0] for block in bucket.blocks])
            of_block = [batch.chunk(count) for batch in batches]
            result.extend(torch.cat(of_parameter) for of_parameter in zip(*of_block, strict=True))
        return result

    def numbers_of_batches(self, numbers: Sequence[Tensor]) -> Tensor:
        """The inverse of `numbers_of_parameters`."""
        parts = _split(numbers, [len(bucket.parameters) for bucket in self.buckets])
        result: list[Tensor] = []
        for bucket, own in zip(self.buckets, parts, strict=True):
            counts = [block[0] for block in bucket.blocks]
            chunks = [vector.split(counts) for vector in own]
            result.extend(part for of_block in zip(*chunks, strict=True) for part in of_block)
        return torch.cat(result)

    def _sizes(self) -> list[int]:
        return [len(bucket.parameters) * sum(block[0] for block in bucket.blocks) for bucket in self.buckets]


def find_buckets(parameters: Sequence[Tensor], rows: Mapping[Tensor, PlanRow], *, matrix: bool) -> list[Bucket]:
    """Parameters of one group, together where they have one layout.

    Args:
        parameters: Of the group.
        rows: Of the plan.
        matrix: Whether the group's norm is one of matrices.

    Returns:
        Buckets, those with the same short side next to each other.
    """
    alike: dict[tuple[object, ...], list[Tensor]] = {}
    for parameter in parameters:
        view = rows[parameter].view if matrix else None
        key = (parameter.shape, view, parameter.dtype, parameter.device)
        alike.setdefault(key, []).append(parameter)
    found = [Bucket(tuple(members), cast(View | None, view)) for (_, view, *_), members in alike.items()]
    return sorted(found, key=lambda bucket: (_kind(bucket), *sorted(bucket.blocks[0][1:])))


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
            if taken and (_kind(taken[0]) != _kind(bucket) or (room is not None and used + size > room)):
                yield Load(taken)
                taken, used = [], 0
            fitting = len(parameters) if room is None else max(1, (room - used) // size)
            part, parameters = parameters[:fitting], parameters[fitting:]
            taken.append(Bucket(part, bucket.view))
            used += len(part) * size
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
        self._found: tuple[list[list[Load]], int | None] = ([], None)

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
        self, present: Present, rows: Mapping[Tensor, PlanRow], norms: Sequence[Norm], *, bounded: bool
    ) -> tuple[list[list[Load]], int | None]:
        """Loads of each group, and the cap that they keep.

        Args:
            present: What `fits` was last asked about.
            rows: Of the plan.
            norms: Of the groups.
            bounded: Whether loads are finished one after the other, so that small ones save memory; the same always.
        """
        if self._key is None or self._asked != self._key:
            found = [
                find_buckets(members, rows, matrix=norm.matrix)
                for (_, members), norm in zip(present, norms, strict=True)
            ]
            cap = (self.memory_cap or default_cap([one for own in found for one in own])) if bounded else None
            packed = [
                list(loads(own, memory_cap=cap, adapts=norm.adapts)) for own, norm in zip(found, norms, strict=True)
            ]
            self._found = packed, cap
            self._key = self._asked
        return self._found

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle, whose parameters are others."""
        return {"memory_cap": self.memory_cap, "_key": None, "_asked": None, "_found": ([], None)}


def default_cap(buckets: Sequence[Bucket]) -> int:
    """Bytes that temporaries may take where nobody said.

    Args:
        buckets: All of the optimizer's.
    """
    sizes = [len(bucket.parameters) * _bytes(bucket.parameters[0]) for bucket in buckets]
    return max(SMALLEST_CAP, int(LARGEST_BUCKETS * max(sizes, default=0)))


def _bytes(parameter: Tensor) -> int:
    """Of a copy in float32 or wider, twice in half precision: gradients and weights are copied too."""
    return parameter.numel() * (parameter.element_size() if parameter.element_size() >= 4 else 8)


def _kind(bucket: Bucket) -> tuple[str, str]:
    first = bucket.parameters[0]
    return str(first.dtype), str(first.device)


def _split(items: Sequence[T], sizes: Sequence[int]) -> list[Sequence[T]]:
    ends = [0]
    for size in sizes:
        ends.append(ends[-1] + size)
    return [items[start:end] for start, end in itertools.pairwise(ends)]
