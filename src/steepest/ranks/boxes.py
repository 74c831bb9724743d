"""Which box of a tensor each rank keeps: all of a plain one, what mesh and placements say of a DTensor."""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Box = tuple[tuple[int, int], ...]
"""First and one past the last index of each dimension."""


def is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor, whose module is not there in every build of torch."""
    return type(tensor) is not Tensor and hasattr(tensor, "device_mesh")


def local(tensors: Sequence[Tensor]) -> list[Tensor]:
    """What this rank has of tensors: whole ones, and shards.

    Args:
        tensors: Plain or sharded.

    Returns:
        Plain tensors, without entries where a rank has no part; they share memory with what was given.
    """
    parts: Sequence[Any] = tensors
    return [part.to_local() if is_sharded(part) else part for part in parts]


def boxes(shape: Sequence[int], mesh_shape: Sequence[int], placements: Sequence[Any]) -> list[Box]:
    """The box of each rank of a mesh, as torch divides a tensor: like `torch.chunk`, one mesh dimension after another.

    Args:
        shape: Of the whole tensor.
        mesh_shape: Ranks in each dimension of the mesh.
        placements: One for each of these: `Shard`, `Replicate` or FSDP's `_StridedShard`.

    Returns:
        One per rank, the last dimension of the mesh running fastest; boxes may be empty.

    Raises:
        ValueError: If a placement is another, or does not fit.

    Examples:
        >>> from torch.distributed.tensor import Replicate, Shard
        >>> boxes((3, 8), (2,), [Shard(0)])
        [((0, 2), (0, 8)), ((2, 3), (0, 8))]
        >>> boxes((3, 8), (2,), [Replicate()])
        [((0, 3), (0, 8)), ((0, 3), (0, 8))]
    """
    if len(mesh_shape) != len(placements):
        raise ValueError(f"A mesh of shape {tuple(mesh_shape)} needs as many placements, got {tuple(placements)}.")
    orders = [_order(dimension, len(shape), mesh_shape, placements) for dimension in range(len(shape))]
    ranges = [_ranges(size, order, mesh_shape) for size, order in zip(shape, orders, strict=True)]
    return [
        tuple(own[tuple(place[axis] for axis in order)] for own, order in zip(ranges, orders, strict=True))
        for place in itertools.product(*map(range, mesh_shape))
    ]


def _order(dimension: int, count: int, mesh_shape: Sequence[int], placements: Sequence[Any]) -> list[int]:
    """Which dimensions of the mesh divide one of the tensor, in the order in which they do.

    FSDP divides what tensor parallelism has divided before, although its dimension of the mesh comes first: a strided
    placement waits until those after it have made as many parts as its factor says.
    """
    order: list[int] = []
    waiting: list[tuple[int, int]] = []
    for axis, placement in enumerate(placements):
        if placement.is_replicate():
            continue
        where = getattr(placement, "dim", None)
        if where is None or placement.is_partial():
            raise ValueError(
                f"the placement {placement} holds parts of a sum, or what is not known here; expected are Shard, "
                "Replicate and FSDP's strided shards"
            )
        if where % count != dimension:
            continue
        factor = getattr(placement, "split_factor", 1)
        if factor > 1:
            waiting.append((axis, factor))
            continue
        order.append(axis)
        waiting = [(other, left // mesh_shape[axis]) for other, left in waiting]
        for other, left in reversed(waiting):
            if left <= 1:
                order.append(other)
        waiting = [(other, left) for other, left in waiting if left > 1]
    if waiting:
        raise ValueError(f"the placements {tuple(placements)} do not fit the mesh of shape {tuple(mesh_shape)}")
    return order


def _ranges(size: int, order: Sequence[int], mesh_shape: Sequence[int]) -> dict[tuple[int, ...], tuple[int, int]]:
    """Of one dimension, by the coordinates in those of the mesh that divide it."""
    found = {(): (0, size)}
    for axis in order:
        parts = mesh_shape[axis]
        divided: dict[tuple[int, ...], tuple[int, int]] = {}
        for place, (start, stop) in found.items():
            step = math.ceil((stop - start) / parts)
            for index in range(parts):
                first = min(start + index * step, stop)
                divided[*place, index] = (first, min(first + step, stop))
        found = divided
    return found


def own_box(tensor: Any) -> Box:
    """The box of a tensor that this rank keeps; empty where it is not on the tensor's mesh.

    Args:
        tensor: Plain, or sharded by placements that are known here.
    """
    if not is_sharded(tensor):
        return full(tensor.shape)
    place = tensor.device_mesh.get_coordinate()
    if place is None:
        return tuple((0, 0) for _ in tensor.shape)
    shape = tuple(tensor.device_mesh.shape)
    number = sum(own * math.prod(shape[axis + 1 :]) for axis, own in enumerate(place))
    return boxes(tuple(tensor.shape), shape, tensor.placements)[number]


def sizes(box: Box) -> tuple[int, ...]:
    """The shape of what is in a box."""
    return tuple(stop - start for start, stop in box)


def volume(box: Box) -> int:
    """Number of entries in a box."""
    return math.prod(sizes(box))


def full(shape: Sequence[int]) -> Box:
    """The box that holds all of a tensor."""
    return tuple((0, size) for size in shape)


def within(box: Box, outer: Box) -> tuple[slice, ...]:
    """Where a box lies in what another one holds, which contains it."""
    return tuple(slice(start - first, stop - first) for (start, stop), (first, _) in zip(box, outer, strict=True))


@dataclass(frozen=True)
class Layout:
    """Which box of a tensor each rank of a team keeps.

    Args:
        shape: Of the whole tensor.
        boxes: One per rank; None: nothing.
        members: Ranks among which it is divided or copied, as far as this one knows: others may have another such set.
    """

    shape: tuple[int, ...]
    boxes: tuple[Box | None, ...]
    members: tuple[int, ...]

    @property
    def distinct(self) -> dict[Box, list[int]]:
        """Ranks that keep the same box, for each box; together these are the tensor."""
        found: dict[Box, list[int]] = {}
        for rank, box in enumerate(self.boxes):
            if box is not None:
                found.setdefault(box, []).append(rank)
        return found


def kept_like(parameter: Any, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros that belong to a parameter but have a shape of their own, on the ranks that keep a part of it.

    Args:
        parameter: Plain or sharded.
        shape: Of the whole.
        dtype: Of the numbers.

    Returns:
        A plain tensor for a plain parameter; else a DTensor that the same dimensions of the mesh divide: along its
        first dimension, or the second where the first is shorter than there are parts.
    """
    if not is_sharded(parameter):
        return torch.zeros(tuple(shape), dtype=dtype, device=parameter.device)
    from torch.distributed.tensor import DTensor

    if not shape:
        return torch.zeros((), dtype=dtype, device=parameter.device)
    mesh = parameter.device_mesh
    own = kept_placements(shape, mesh.shape, parameter.placements)
    box = boxes(shape, mesh.shape, own)[_place(mesh)]
    zeros = torch.zeros(sizes(box), dtype=dtype, device=parameter.to_local().device)
    stride = torch.empty(tuple(shape), device="meta").stride()
    return DTensor.from_local(zeros, mesh, own, run_check=False, shape=torch.Size(shape), stride=stride)


def kept_placements(shape: Sequence[int], mesh_shape: Sequence[int], placements: Sequence[Any]) -> tuple[Any, ...]:
    """How `kept_like` lays out something that belongs to a sharded parameter.

    Args:
        shape: Of the whole, of one dimension or more.
        mesh_shape: Ranks in each dimension of the parameter's mesh.
        placements: Of the parameter.
    """
    from torch.distributed.tensor import Replicate, Shard

    parts = math.prod(size for size, one in zip(mesh_shape, placements, strict=True) if not one.is_replicate())
    along = 1 if len(shape) > 1 and shape[0] < parts else 0
    return tuple(Replicate() if one.is_replicate() else Shard(along) for one in placements)


def laid_out(tensor: Any, like: Any) -> Tensor:
    """A tensor in the same parts as another.

    Args:
        tensor: Plain, then the same on all ranks; or sharded, then all ranks that keep a part of it take part.
        like: Of its shape, plain or sharded.
    """
    if not is_sharded(tensor):
        return part_like(tensor, like)
    if not is_sharded(like):
        return whole(tensor)
    if (tensor.device_mesh, tuple(tensor.placements)) == (like.device_mesh, tuple(like.placements)):
        return tensor
    return tensor.redistribute(like.device_mesh, like.placements)


def whole(tensor: Any) -> Tensor:
    """All of a tensor; of a sharded one, all ranks that keep a part take part.

    Args:
        tensor: Plain or sharded.
    """
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def part_like(whole: Tensor, like: Any) -> Tensor:
    """A whole tensor laid out as another of its shape is: this rank takes its box.

    Args:
        whole: Plain, the same on all ranks.
        like: Plain or sharded.
    """
    if not is_sharded(like):
        return whole
    from torch.distributed.tensor import DTensor

    box = boxes(like.shape, like.device_mesh.shape, like.placements)[_place(like.device_mesh)]
    own = whole[within(box, full(like.shape))]
    own = own.clone(memory_format=torch.contiguous_format)  # or it would hold the whole, and torch.save refuse it
    return DTensor.from_local(
        own, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def _place(mesh: Any) -> int:
    """This rank's place in a mesh, the last dimension running fastest."""
    place = 0
    for size, index in zip(mesh.shape, mesh.get_coordinate(), strict=True):
        place = place * size + index
    return place


def sharded(tensors: Iterable[Any]) -> list[Any]:
    """Those of some tensors that are sharded."""
    return [tensor for tensor in tensors if is_sharded(tensor)]
