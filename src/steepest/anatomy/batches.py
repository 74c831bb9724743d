"""Parameters worked on together, as batches of matrices, and what belongs to matrices, rows and parameters."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor

from steepest.anatomy.plan import PlanRow
from steepest.anatomy.views import LINEAR, View

T = TypeVar("T")


@dataclass(frozen=True)
class Bucket:
    """Parameters of one group with the same shape, view, dtype and device.

    Args:
        parameters: At least one.
        view: How one of them is a set of matrices. None: a bag of entries, one row.
        part: Shape of what is worked on of each; None: all of it.
    """

    parameters: tuple[Tensor, ...]
    view: View | None
    part: torch.Size | None = None

    @property
    def shape(self) -> torch.Size:
        """Of what is worked on of one parameter."""
        return self.parameters[0].shape if self.part is None else self.part

    def matrices(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Gather tensors shaped like the parameters into batches, parameter by parameter.

        Args:
            tensors: One per parameter.

        Returns:
            One batch (P·B, m, n) per block of the view, P the number of parameters.
        """
        if self.view is None:
            rows = [tensor.reshape(1, -1) for tensor in tensors]
            return (torch.stack(rows) if len(rows) > 1 else rows[0].unsqueeze(0),)
        if self._plain:
            return (torch.stack(list(tensors)) if len(tensors) > 1 else tensors[0].unsqueeze(0),)
        split = [self.view.split_tensor(tensor) for tensor in tensors]
        if len(split) == 1:
            return split[0]
        return tuple(torch.cat(part) for part in zip(*split, strict=True))

    def parameter_shaped(self, batches: Sequence[Tensor]) -> list[Tensor]:
        """The inverse of `matrices`.

        Args:
            batches: As `matrices` returns them.

        Returns:
            One tensor per parameter; may share memory with the batches.
        """
        shape = self.shape
        if self.view is None or self._plain:
            rows = batches[0].unbind()
            return list(rows) if self._plain else [row.reshape(shape) for row in rows]
        view, count = self.view, len(self.parameters)
        pieces = [batch.chunk(count) if count > 1 else (batch,) for batch in batches]
        return [view.merge(blocks, shape) for blocks in zip(*pieces, strict=True)]

    @property
    def blocks(self) -> tuple[tuple[int, int, int], ...]:
        """Shapes (B, m, n) of one parameter's batches."""
        shape = self.shape
        return ((1, 1, shape.numel()),) if self.view is None else self.view.blocks(shape)

    @property
    def _plain(self) -> bool:
        return self.view == LINEAR and len(self.shape) == 2


class Load:
    """Buckets of one group, dtype and device.

    Args:
        buckets: Those of one process at least one; a rank may have none to work on.
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
        parts = _split(batches, self._blocks())
        return [
            tensor for bucket, own in zip(self.buckets, parts, strict=True) for tensor in bucket.parameter_shaped(own)
        ]

    @property
    def batches(self) -> int:
        """Number of batches that `matrices` returns."""
        return sum(self._blocks())

    @property
    def counts(self) -> list[int]:
        """Matrices of each batch."""
        return [len(bucket.parameters) * block[0] for bucket in self.buckets for block in bucket.blocks]

    def bucket_of(self, place: int) -> Bucket:
        """The bucket that holds a parameter.

        Args:
            place: Of the parameter.
        """
        for bucket in self.buckets:
            if place < len(bucket.parameters):
                return bucket
            place -= len(bucket.parameters)
        raise IndexError(place)

    def blocks_of(self, place: int) -> tuple[tuple[int, int, int], ...]:
        """Shapes (B, m, n) of one parameter's batches.

        Args:
            place: Of the parameter.
        """
        return self.bucket_of(place).blocks

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
        return self.rows_of_parameters(numbers.split(self.counts))

    def numbers_of_batches(self, numbers: Sequence[Tensor]) -> Tensor:
        """The inverse of `numbers_of_parameters`."""
        return torch.cat(self._of_batches(numbers, [(b, 1) for bucket in self.buckets for b, _, _ in bucket.blocks]))

    def rows_of_parameters(self, batches: Sequence[Tensor]) -> list[Tensor]:
        """Give every parameter what belongs to the rows of its matrices.

        Args:
            batches: (B, m) for each batch of `matrices`.

        Returns:
            One vector per parameter, matrix after matrix, block after block.
        """
        result: list[Tensor] = []
        for bucket, own in zip(self.buckets, _split(batches, self._blocks()), strict=True):
            pieces = [batch.chunk(len(bucket.parameters)) for batch in own]
            result.extend(torch.cat([piece.flatten() for piece in of_one]) for of_one in zip(*pieces, strict=True))
        return result

    def rows_of_batches(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """The inverse of `rows_of_parameters`."""
        return self.parts_of_batches(vectors, lambda m, n: (m,))

    def parts_of_batches(self, vectors: Sequence[Tensor], shape: Callable[[int, int], tuple[int, ...]]) -> list[Tensor]:
        """Likewise for what has another shape, which `rows_of_parameters` makes vectors of just as well.

        Args:
            vectors: One per parameter, matrix after matrix, block after block.
            shape: Of what belongs to a matrix m x n.

        Returns:
            (B, *shape) for each batch of `matrices`.
        """
        return [torch.cat(own) for own in self.pieces_of_batches(vectors, shape)]

    def pieces_of_batches(
        self, vectors: Sequence[Tensor], shape: Callable[[int, int], tuple[int, ...]]
    ) -> list[list[Tensor]]:
        """What `parts_of_batches` puts together, parameter by parameter, where it lies.

        Args:
            vectors: As there.
            shape: As there.

        Returns:
            For each batch, one per parameter: (B of that parameter, *shape), which shares its memory with the vector.
        """
        shapes = [(b, shape(m, n)) for bucket in self.buckets for b, m, n in bucket.blocks]
        return [
            [piece.view(count, *own) for piece in pieces]
            for pieces, (count, own) in zip(
                self._pieces(vectors, [(b, math.prod(own)) for b, own in shapes]), shapes, strict=True
            )
        ]

    def _of_batches(self, vectors: Sequence[Tensor], shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Vectors of parameters as one vector for each batch, of whose part in each parameter the size is known."""
        return [torch.cat(pieces) for pieces in self._pieces(vectors, shapes)]

    def _pieces(self, vectors: Sequence[Tensor], shapes: Sequence[tuple[int, int]]) -> list[tuple[Tensor, ...]]:
        """For each batch, the piece of each parameter's vector."""
        parts = _split(vectors, [len(bucket.parameters) for bucket in self.buckets])
        result: list[tuple[Tensor, ...]] = []
        for own, sizes in zip(parts, _split(shapes, self._blocks()), strict=True):
            lengths = [count * width for count, width in sizes]
            chunks = [vector.split(lengths) for vector in own]
            result.extend(zip(*chunks, strict=True))
        return result

    def _blocks(self) -> list[int]:
        return [len(bucket.blocks) for bucket in self.buckets]


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
    return sorted(found, key=lambda bucket: (kind(bucket), *sorted(bucket.blocks[0][1:])))


def gains(batches: Sequence[Tensor], moves: Sequence[Tensor], *, wide: bool = False) -> Tensor:
    """What each direction is predicted to gain per unit of length, -<M, D>.

    Args:
        batches: Momenta, (B, m, n) each.
        moves: Directions, likewise.
        wide: Whether to add up in float64, so that it does not matter in which parts.

    Returns:
        One number per matrix, batch after batch.
    """
    wide = wide and batches[0].device.type != "mps"
    return torch.cat(
        [-(m * d).sum(dim=(-2, -1), dtype=torch.float64 if wide else None) for m, d in zip(batches, moves, strict=True)]
    )


def kind(bucket: Bucket) -> tuple[str, str]:
    """What parameters of one load have in common."""
    first = bucket.parameters[0]
    return str(first.dtype), str(first.device)


def _split(items: Sequence[T], sizes: Sequence[int]) -> list[Sequence[T]]:
    ends = [0]
    for size in sizes:
        ends.append(ends[-1] + size)
    return [items[start:end] for start, end in itertools.pairwise(ends)]
