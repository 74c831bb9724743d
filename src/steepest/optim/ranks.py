"""Numbers that all data-parallel ranks must agree on; without a process group every function returns what it was given.

The group is torch's default one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def world_size() -> int:
    """Ranks of the default group; 1 without one."""
    available = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if available else 1


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
