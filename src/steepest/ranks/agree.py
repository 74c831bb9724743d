"""Numbers that all data-parallel ranks must agree on; without a process group every function returns what it was given.

The group is torch's default one, and that of a sharded tensor's mesh where there is one.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def world_size() -> int:
    """Ranks of the default group; 1 without one."""
    available = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if available else 1


def exchange_device(preferred: torch.device) -> torch.device:
    """Where ranks can exchange numbers: a device that the default group has a backend for.

    Args:
        preferred: Taken if there is one for it.
    """
    backends = [entry.partition(":")[0] for entry in torch.distributed.get_backend_config().split(",")]
    return preferred if preferred.type in backends else torch.device(backends[0])


def decide(
    fine: bool | Tensor,
    numbers: Sequence[Tensor | float | None],
    device: torch.device,
    parts: Sequence[Any],
    *,
    ask: bool,
) -> tuple[bool | Tensor, Sequence[Tensor | float | None]]:
    """What ranks must know of each other before a step: whether all can take it, and numbers that they share.

    The only exchange before a step writes; no rank may leave a step without it, an error included.

    Args:
        fine: Whether this rank can take the step; 0-d if that is not read.
        numbers: Of this rank; None where it has none.
        device: Of the parameters; an accelerator is not waited for.
        parts: Sharded parameters, the same on all ranks that keep a part: these agree in any case.
        ask: Whether all ranks of the default group take part.

    Returns:
        Whether all can, 0-d where that is not read; the mean of each number over the ranks that have it, the same
        number on each of them. What was given, where there is nobody to ask.
    """
    unread = isinstance(fine, Tensor) or device.type != "cpu"
    if parts:
        flag = agree(torch.full((), fine, device=device) if isinstance(fine, bool) else fine, parts)
        fine = flag if unread else bool(flag)
    if not ask or world_size() == 1:
        return fine, numbers
    where = exchange_device(device)
    refused = ~fine if isinstance(fine, Tensor) else not fine
    pairs = [entry for number in numbers for entry in ((0.0, 0.0) if number is None else (number, 1.0))]
    sums = torch.stack([_exchanged(entry, where) for entry in (*pairs, refused)])
    torch.distributed.all_reduce(sums)
    means = sums[:-2:2] / sums[1:-1:2]
    wide = torch.float32 if device.type == "mps" else torch.float64
    shared = [None if own is None else mean.to(device, wide) for own, mean in zip(numbers, means, strict=True)]
    flag = sums[-1] == 0
    return flag.to(device) if unread else bool(flag), shared


def _exchanged(number: Tensor | float, where: torch.device) -> Tensor:
    if isinstance(number, Tensor):
        return number.detach().to(where, torch.float64)
    return torch.full((), float(number), dtype=torch.float64, device=where)


def agree(flag: Tensor, sharded: Sequence[Any]) -> Tensor:
    """Whether a flag is set on all ranks that keep a part of one of some tensors.

    Args:
        flag: 0-d boolean, of this rank.
        sharded: The tensors, alike on all these ranks; none: nobody is asked.
    """
    meshes = list(dict.fromkeys(tensor.device_mesh for tensor in sharded))
    groups = [mesh.get_group(dimension) for mesh in meshes for dimension in range(mesh.ndim)]
    if not groups:
        return flag
    number = flag.to(torch.int32)
    for group in groups * len(meshes):  # so that an answer passes from one mesh to another
        torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MIN, group=group)
    return number.bool()


def summed(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Sums over ranks, in one exchange per dtype and device.

    Args:
        tensors: The same shapes on every rank, in the same order.

    Returns:
        New tensors, or the given ones if there is one rank.
    """
    if world_size() == 1 or not tensors:
        return list(tensors)
    alike: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for index, tensor in enumerate(tensors):
        alike.setdefault((tensor.dtype, tensor.device), []).append(index)
    result = list(tensors)
    for places in alike.values():
        packed = torch.cat([tensors[index].reshape(-1) for index in places])
        torch.distributed.all_reduce(packed)
        parts = packed.split([tensors[index].numel() for index in places])
        for index, part in zip(places, parts, strict=True):
            result[index] = part.view(tensors[index].shape)
    return result


def unanimous(numbers: Sequence[int], device: torch.device) -> list[int | None]:
    """What all ranks say.

    Args:
        numbers: One per question, in the same order on every rank.
        device: Where ranks exchange tensors.

    Returns:
        The number where all ranks have the same one, else None.
    """
    if world_size() == 1 or not numbers:
        return list(numbers)
    own = torch.tensor(numbers, dtype=torch.int64, device=device)
    both = torch.cat([own, -own])
    torch.distributed.all_reduce(both, op=torch.distributed.ReduceOp.MAX)
    most, least = both[: len(own)].tolist(), (-both[len(own) :]).tolist()
    return [high if high == low else None for high, low in zip(most, least, strict=True)]
