"""The ranks that take each step together, and what they tell each other."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from steepest.ranks.boxes import Layout, boxes, full, is_sharded, local, sizes, volume

_GROUPS: dict[tuple[int, ...], tuple[Any, Any]] = {}  # made here, by their ranks, of which default group: an exchange


def _world() -> set[int]:
    return set(range(torch.distributed.get_world_size()))


def _root_ranks(mesh: Any) -> set[int]:
    """Ranks of the mesh that a mesh was cut out of; all, where this build of torch does not tell."""
    root = getattr(mesh, "_get_root_mesh", None)
    return _world() if root is None else set(root().mesh.flatten().tolist())


class Team:
    """Ranks that keep parts or copies of the same parameters; a process alone is a team of one, which never exchanges.

    Args:
        group: The process group; None: this process alone.

    Attributes:
        group: The process group.
        ranks: Numbers of its ranks in the default group.
        own: This process' place among them.
        agreed_bytes: Payload of this rank's sums since somebody set it to zero.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.ranks: tuple[int, ...] = (0,) if group is None else tuple(torch.distributed.get_process_group_ranks(group))
        self.own = 0 if group is None else torch.distributed.get_rank(group)
        self.agreed_bytes = 0

    @property
    def size(self) -> int:
        """How many ranks."""
        return len(self.ranks)

    @classmethod
    def of(cls, parameters: Sequence[Any], groups: Sequence[Any]) -> "Team":
        """The smallest one known that holds all ranks which keep something of some parameters.

        Args:
            parameters: Plain or sharded.
            groups: Process groups that keep copies of plain ones.
        """
        meshes = list(dict.fromkeys(p.device_mesh for p in parameters if is_sharded(p)))
        known: list[tuple[set[int], Any]] = []
        for group in dict.fromkeys(groups):
            known.append((set(torch.distributed.get_process_group_ranks(group)), group))
        for mesh in meshes:
            ranks = set(mesh.mesh.flatten().tolist())
            known.append((ranks, mesh.get_group() if mesh.ndim == 1 else None))
        everyone = set[int]().union(*(ranks for ranks, _ in known))
        if len(everyone) <= 1:
            return cls()
        for ranks, group in known:
            if ranks == everyone and group is not None:
                return cls(group)
        if not any(ranks == everyone for ranks, _ in known):  # others know of ranks that this one does not
            roots = [_root_ranks(mesh) for mesh in meshes]
            everyone = min((ranks for ranks in roots if ranks >= everyone), key=len, default=_world())
        if everyone == _world():
            return cls(torch.distributed.group.WORLD)
        key, world = tuple(sorted(everyone)), torch.distributed.group.WORLD
        if key not in _GROUPS or _GROUPS[key][0] is not world:
            _GROUPS[key] = world, torch.distributed.new_group(list(key), use_local_synchronization=True)
        return cls(_GROUPS[key][1])

    def check_device(self, name: str, parameter: Tensor) -> None:
        """Refuse a parameter on a device for which the group has no backend.

        Args:
            name: Of the parameter.
            parameter: Plain or sharded.

        Raises:
            ValueError: If so.
        """
        if self.size == 1:
            return
        config = torch.distributed.get_backend_config(self.group)
        devices = [entry.partition(":")[0] for entry in config.split(",")]
        device = local([parameter])[0].device.type
        if device not in devices:
            raise ValueError(
                f"{name!r} of shape {tuple(parameter.shape)} is on {device}, but its process group exchanges tensors "
                f"on {', '.join(devices)} only. Start with init_process_group('cpu:gloo,cuda:nccl'), which has a "
                "backend for each, so that nothing has to be moved between devices."
            )

    def places(self, group: Any) -> tuple[int, ...]:
        """Where the ranks of a process group stand in this team.

        Args:
            group: All of whose ranks are in it.
        """
        ranks = torch.distributed.get_process_group_ranks(group)
        return tuple(self.ranks.index(rank) for rank in ranks)

    def layout(self, name: str, tensor: Any, *, copies: Sequence[int] | None = None) -> Layout:
        """Which box each rank keeps.

        Args:
            name: Of the tensor, for messages.
            tensor: Plain or sharded.
            copies: Places of the ranks that have a copy each of a plain one; None: it is this rank's alone.

        Raises:
            ValueError: If the placements are not known here, or hold parts of a sum.
        """
        shape = tuple(tensor.shape)
        if not is_sharded(tensor):
            members = (self.own,) if copies is None else tuple(copies)
            whole = full(shape)
            return Layout(shape, tuple(whole if rank in members else None for rank in range(self.size)), members)
        mesh, placements = tensor.device_mesh, tuple(tensor.placements)
        told = f"{name!r} of shape {shape} is a DTensor with placements {placements} on a mesh of {tuple(mesh.shape)}"
        try:
            found = boxes(shape, tuple(mesh.shape), placements)
        except ValueError as problem:
            raise ValueError(
                f"{told}, and {problem}. Reduce it first, with tensor.redistribute(placements=[Replicate()])."
            ) from problem
        place = {rank: index for index, rank in enumerate(self.ranks)} if self.size > 1 else {}
        kept: list[Any] = [None] * self.size
        members = tuple(place.get(rank, 0) for rank in mesh.mesh.flatten().tolist())
        for rank, box in zip(members, found, strict=True):
            if volume(box):
                kept[rank] = box
        mine, part = kept[self.own], tuple(tensor.to_local().shape)
        if (math.prod(part) if mine is None else 0) or (mine is not None and sizes(mine) != part):
            raise ValueError(
                f"{told}, of which this rank should keep {'nothing' if mine is None else sizes(mine)} but keeps "
                f"{part}. Shard it with fully_shard, parallelize_module or distribute_tensor."
            )
        return Layout(shape, tuple(kept), members)

    def summed(self, numbers: Tensor) -> Tensor:
        """The sum over ranks.

        Args:
            numbers: The same shape on every rank; may be written to.
        """
        return self.sum_later(numbers)()

    def sum_later(self, numbers: Tensor) -> Callable[[], Tensor]:
        """Begin to add up over ranks, and return what waits for the sum.

        Args:
            numbers: The same shape on every rank; may be written to.
        """
        if self.size == 1 or not numbers.numel():
            return lambda: numbers
        self.agreed_bytes += numbers.numel() * numbers.element_size()
        work: Any = torch.distributed.all_reduce(numbers, group=self.group, async_op=True)

        def finish() -> Tensor:
            work.wait()
            return numbers

        return finish

    def sum_to(self, owners: Sequence[int], tensors: Sequence[Tensor]) -> list[Tensor | None]:
        """Sums over ranks, each for one of them: one exchange per rank that gets something.

        Args:
            owners: Who gets the sum of each.
            tensors: The same shapes, type and device on every rank.

        Returns:
            The sums that this rank gets, None for others.
        """
        if self.size == 1:
            return list(tensors)
        found: list[Tensor | None] = [None] * len(tensors)
        for owner in sorted(set(owners)):
            places = [place for place, one in enumerate(owners) if one == owner]
            packed = torch.cat([tensors[place].reshape(-1) for place in places])
            torch.distributed.reduce(packed, self.ranks[owner], group=self.group)
            if owner == self.own:
                parts = packed.split([tensors[place].numel() for place in places])
                for place, part in zip(places, parts, strict=True):
                    found[place] = part.view(tensors[place].shape)
        return found

    def every(self, flag: bool | Tensor, device: torch.device) -> bool | Tensor:
        """Whether a flag is set on all ranks.

        Args:
            flag: Of this rank; 0-d where it is not read.
            device: On which ranks exchange.
        """
        if self.size == 1:
            return flag
        missing = (~flag).to(torch.int32) if isinstance(flag, Tensor) else torch.full((), int(not flag), device=device)
        found = self.summed(missing) == 0
        return found if isinstance(flag, Tensor) else bool(found)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Team":
        """A process group is of processes, not of objects."""
        return Team(self.group)

    def __reduce__(self) -> Any:
        """Whoever unpickles it is alone."""
        return Team, ()
