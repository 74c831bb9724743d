"""Numbers that ranks must agree on; without others to ask, every function returns what it was given."""

from collections.abc import Sequence

import torch
from torch import Tensor

from steepest.ranks.team import Team


def scalar_type(device: torch.device) -> torch.dtype:
    """Of numbers of the whole step: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def world_size() -> int:
    """Ranks of the default group; 1 without one."""
    available = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if available else 1


def listeners(team: Team) -> Team:
    """Who shares losses and what layers read: the team, or the default group where it is not known who has copies.

    Args:
        team: Ranks that are known to keep parts or copies of the same parameters.
    """
    return team if team.size > 1 or world_size() == 1 else Team(torch.distributed.group.WORLD)


def exchange_device(preferred: torch.device, team: Team) -> torch.device:
    """Where ranks can exchange numbers: a device that their group has a backend for.

    Args:
        preferred: Taken if there is one for it.
        team: Of several ranks.
    """
    backends = [entry.partition(":")[0] for entry in torch.distributed.get_backend_config(team.group).split(",")]
    return preferred if preferred.type in backends else torch.device(backends[0])


def decide(
    fine: bool | Tensor,
    numbers: Sequence[Tensor | float | None],
    counts: Sequence[float],
    device: torch.device,
    team: Team,
) -> tuple[bool | Tensor, Sequence[Tensor | float | None], Tensor | None]:
    """What ranks must know of each other before a step: whether all can take it, and numbers that they share.

    The only exchange before a step writes; no rank may leave a step without it, an error of its own included. An error
    of the closure is not told: it may lie before or after exchanges of the model's own.

    Args:
        fine: Whether this rank can take the step; 0-d if that is not read.
        numbers: Of this rank; None where it has none.
        counts: Of this rank, to be added up.
        device: Of the parameters; an accelerator is not waited for.
        team: Who takes part.

    Returns:
        Whether all can, 0-d where that is not read; the mean of each number over the ranks that have it, the same
        number on all, None if none has it, and not a number where that is not read; and the sums of the counts, or None
        where there is nobody to ask.
    """
    if team.size == 1:
        return fine, numbers, None
    where = exchange_device(device, team)
    refused = ~fine if isinstance(fine, Tensor) else not fine
    pairs = [entry for number in numbers for entry in ((0.0, 0.0) if number is None else (number, 1.0))]
    own = torch.stack([_exchanged(entry, where) for entry in (*pairs, refused)])
    sums = team.summed(torch.cat([own, torch.tensor(counts, dtype=torch.float64, device=where)]))
    count = len(pairs)
    means = sums[:count:2] / sums[1:count:2]
    flag = sums[count] == 0
    unread = isinstance(fine, Tensor) or device.type != "cpu"
    there = [True] * len(numbers) if unread else [bool(one) for one in sums[1:count:2]]
    wide = scalar_type(device)
    shared = [mean.to(device, wide) if some else None for some, mean in zip(there, means, strict=True)]
    return flag.to(device) if unread else bool(flag), shared, sums[count + 1 :]


def _exchanged(number: Tensor | float, where: torch.device) -> Tensor:
    if isinstance(number, Tensor):
        return number.detach().to(where, torch.float64)
    return torch.full((), float(number), dtype=torch.float64, device=where)


def summed(tensors: Sequence[Tensor], team: Team) -> list[Tensor]:
    """Sums over ranks, in one exchange per dtype and device.

    Args:
        tensors: The same shapes on every rank, in the same order.
        team: Who takes part.

    Returns:
        New tensors, or the given ones if there is one rank.
    """
    if team.size == 1 or not tensors:
        return list(tensors)
    alike: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for index, tensor in enumerate(tensors):
        alike.setdefault((tensor.dtype, tensor.device), []).append(index)
    result = list(tensors)
    for places in alike.values():
        packed = team.summed(torch.cat([tensors[index].reshape(-1) for index in places]))
        parts = packed.split([tensors[index].numel() for index in places])
        for index, part in zip(places, parts, strict=True):
            result[index] = part.view(tensors[index].shape)
    return result


def unanimous(numbers: Sequence[int], device: torch.device, team: Team) -> list[int | None]:
    """What all ranks say.

    Args:
        numbers: One per question, in the same order on every rank.
        device: Where ranks exchange tensors.
        team: Who takes part.

    Returns:
        The number where all ranks have the same one, else None.
    """
    if team.size == 1 or not numbers:
        return list(numbers)
    own = torch.tensor(numbers, dtype=torch.int64, device=device)
    both = torch.cat([own, -own])
    torch.distributed.all_reduce(both, op=torch.distributed.ReduceOp.MAX, group=team.group)
    most, least = both[: len(own)].tolist(), (-both[len(own) :]).tolist()
    return [high if high == low else None for high, low in zip(most, least, strict=True)]
