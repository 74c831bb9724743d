"""What an optimizer step takes on each of many ranks, from shapes alone: memory, work, and bytes that move.

Nothing is computed and no process is started. Who keeps which box, who works on what and how parameters are packed is
asked of the functions that the optimizer asks; what moves is counted for all ranks at once, as vectors with one number
per rank, for one parameter of each kind where a model has many.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from steepest.anatomy import LINEAR, Bucket, Load, Plan, PlanRow
from steepest.anatomy.batches import find_buckets
from steepest.geometry import Norm, Scaled, Spectral
from steepest.geometry.norm import completed
from steepest.lab.bench.cost_model import ALL_TRAFFIC
from steepest.linalg import MEMORY_CAP, get_coefficients
from steepest.linalg.iterations import product_counts
from steepest.linalg.plan import Iteration, choose
from steepest.linalg.polar import SVD_COPIES
from steepest.linalg.products import OneByOne
from steepest.names import unknown_name
from steepest.optim import SteepestDescent
from steepest.optim.groups import averages_of
from steepest.optim.packing import SHARES, default_cap, loads, shared_loads
from steepest.optim.sharing import pieces, turn_of, work_of
from steepest.optim.state import schema
from steepest.ranks import Box, Layout, assign, boxes, volume
from steepest.ranks.boxes import full, kept_placements, sizes
from steepest.stages import Entry, Stage
from steepest.stages.inputs import InputMoments
from steepest.stages.inputs.refresh import INPUT_MASS, INPUT_MOMENT
from steepest.stages.stage import state_dtype

Placed = tuple[tuple[int, ...], tuple[Any, ...]]
"""Shape of a mesh of all ranks, the last dimension running fastest, and placements."""

# Of an option, the dimensions of the mesh; outermost first.
AXES: Mapping[str, tuple[str, ...]] = {
    "ddp": ("replicate",),
    "hsdp": ("replicate", "shard"),
    "fsdp": ("shard",),
    "ep": ("ep",),
    "tp": ("tp",),
}
OPEN = "N"
# Along tensor parallelism, by the name of the module: maps whose outputs are divided, tables by rows; and whose inputs.
COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head")
ROWS = ("o_proj", "down_proj")
MOST = 2**20  # ranks
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # on the wire
# Numbers that ranks share at the start of a step, besides whether they take it: the loss, how it was clipped, what was
# seen of that, and changes of weights; with the counts of gradients, whether all know the same parameters and rest. And
# with Momo inner products with the weights.
HEARD, ALIKE, INNER = 5, 3, 4


@dataclass(frozen=True)
class Axes:
    """How ranks are arranged.

    Args:
        text: As it is typed, complete.
        plain: Whether parameters are plain tensors of which each rank has a copy.
        replicate: Copies of the shards.
        shard: Ranks that FSDP shards among.
        ep: Ranks that share out experts.
        tp: Ranks of tensor parallelism.
    """

    text: str
    plain: bool = False
    replicate: int = 1
    shard: int = 1
    ep: int = 1
    tp: int = 1

    @property
    def ranks(self) -> int:
        """All of them."""
        return self.replicate * self.shard * self.ep * self.tp

    @property
    def copies(self) -> Placed:
        """Of what each rank has a copy."""
        from torch.distributed.tensor import Replicate

        return (self.ranks,), (Replicate(),)

    def placed(self, row: PlanRow) -> Placed:
        """Mesh and placements of a parameter.

        Args:
            row: Of the plan.

        Raises:
            ValueError: If it is not known how tensor parallelism divides it.
        """
        from torch.distributed.tensor import Replicate, Shard
        from torch.distributed.tensor.placement_types import _StridedShard  # pyright: ignore[reportPrivateUsage]

        def sharded(dimension: int, after: int) -> Any:
            """FSDP divides what another dimension of the mesh has divided into so many parts before."""
            return Shard(dimension) if after == 1 else _StridedShard(dimension, split_factor=after)

        if self.plain:
            return self.copies
        if self.ep > 1 and row.view is not None and row.view.experts:
            along = 1 if self.shard * self.ep > row.shape[0] else 0
            fsdp = sharded(along, self.ep if along == 0 else 1)
            return (self.replicate, self.shard, self.ep), (Replicate(), fsdp, Shard(0))
        if self.tp == 1:
            fsdp = Shard(0) if row.shape else Replicate()
            return (self.replicate, self.shard * self.ep), (Replicate(), fsdp)
        where = self._divided(row)
        fsdp = sharded(0, self.tp if where == 0 else 1) if row.shape else Replicate()
        own = Replicate() if where is None else Shard(where)
        return (self.replicate, self.shard, self.tp), (Replicate(), fsdp, own)

    def _divided(self, row: PlanRow) -> int | None:
        """The dimension that tensor parallelism divides."""
        if row.role == "vector":
            return None
        module = row.name.split(".")[-2] if "." in row.name else ""
        if module in COLUMNS:
            return 0
        if module in ROWS:
            return 1
        raise ValueError(
            f"{row.name!r} of shape {tuple(row.shape)}: it is not known how tp divides it. Known are the modules "
            f"{', '.join(COLUMNS)} (outputs or rows) and {', '.join(ROWS)} (inputs). Leave out tp."
        )


def read_axes(text: str, world: int | None = None) -> Axes:
    """What was typed as fsdp=8,tp=2, or fsdp=N,tp=2 with a number of ranks.

    Args:
        text: Axes of `AXES`, each once.
        world: Ranks; None: as many as the axes say.

    Returns:
        The axes, all of them numbers.

    Raises:
        ValueError: If they cannot be meant, or are not so many ranks.
    """
    sizes: dict[str, str] = {}
    found: list[str] = []
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        if axis not in AXES:
            raise ValueError(unknown_name("axis of --layout", axis, AXES))
        numbers = size.split("x")
        fits = all(one == OPEN or (one.isascii() and one.isdecimal() and 1 <= int(one[:9]) <= MOST) for one in numbers)
        if axis in found or len(numbers) != len(AXES[axis]) or not fits or not sizes.keys().isdisjoint(AXES[axis]):
            form = f"{axis}={'x'.join('2' for _ in AXES[axis])}"
            raise ValueError(
                f"--layout {text}: each axis stands there once, with numbers from 1 to {MOST:,} as in {form}, or "
                f"{OPEN} in place of one; of ddp, fsdp and hsdp one at most."
            )
        found.append(axis)
        sizes |= dict(zip(AXES[axis], numbers, strict=True))
    if "ddp" in found and len(found) > 1:
        raise ValueError(f"--layout {text}: ddp copies plain parameters and stands alone; write fsdp beside tp and ep.")
    if {"ep", "tp"} <= {*found}:
        raise ValueError(f"--layout {text}: take ep or tp, each alone or with fsdp or hsdp.")
    known = math.prod(int(size) for size in sizes.values() if size != OPEN)
    missing = [axis for axis, size in sizes.items() if size == OPEN]
    if len(missing) > 1 or (missing and world is None):
        raise ValueError(f"--layout {text}: one number may be {OPEN}, which is what the others leave of --world.")
    ranks = known if world is None else world
    if ranks % known or (not missing and ranks != known):
        raise ValueError(f"--layout {text}: {known:,} {'do not divide' if missing else 'are not'} --world {ranks:,}.")
    filled = {axis: ranks // known if size == OPEN else int(size) for axis, size in sizes.items()}
    shown = ",".join(f"{axis}={'x'.join(str(filled[one]) for one in AXES[axis])}" for axis in found)
    return Axes(shown, plain="ddp" in found, **filled)


@dataclass(frozen=True)
class Kept:
    """What each rank keeps of a tensor.

    Args:
        layout: Of the tensor.
    """

    layout: Layout

    @classmethod
    def of(cls, shape: Sequence[int], placed: Placed) -> Kept:
        """By the placements on a mesh of all ranks."""
        found = boxes(shape, *placed)
        kept = tuple(box if volume(box) else None for box in found)
        return cls(Layout(tuple(shape), kept, tuple(range(len(kept)))))

    @cached_property
    def numbers(self) -> Tensor:
        """How many of each rank."""
        return torch.tensor(
            [0 if box is None else volume(box) for box in self.layout.boxes], dtype=torch.float64, device="cpu"
        )

    @cached_property
    def total(self) -> float:
        """Of all ranks."""
        return float(self.numbers.sum())

    @cached_property
    def most(self) -> float:
        """Of the rank that keeps most."""
        return float(self.numbers.max())

    @cached_property
    def distinct(self) -> Mapping[Box, list[int]]:
        """Ranks that keep the same box."""
        return self.layout.distinct

    @cached_property
    def _keepers(self) -> tuple[Tensor, Tensor]:
        """Of each distinct box, the ranks that keep it, as many columns as one has most; and its volume."""
        count = max(map(len, self.distinct.values()))
        rows = [[*ranks, *ranks[-1:] * (count - len(ranks))] for ranks in self.distinct.values()]
        sizes = [volume(box) for box in self.distinct]
        return torch.tensor(rows, device="cpu"), torch.tensor(sizes, dtype=torch.float64, device="cpu")

    def sent_out(self, owner: int) -> Tensor:
        """Numbers that each rank sends to an owner of the whole, as `Route.out` says it.

        Args:
            owner: Rank that works on it.
        """
        keepers, sizes = self._keepers
        # the nearest; of two that are as near, the lower one
        nearest = keepers.gather(1, (2 * (keepers - owner).abs() + (keepers > owner)).argmin(1, keepdim=True))[:, 0]
        sent = torch.zeros_like(self.numbers).index_add_(0, nearest, sizes)
        sent[owner] = 0
        return sent


@dataclass(frozen=True)
class Piece:
    """What one rank works on.

    Args:
        row: Of the plan.
        box: Of the parameter.
        ranks: That may work on it.
        whole: Whether each of these keeps all of it; else they keep parts.
        work: Operations.
        blocks: Shapes (B, m, n) of its matrices.
    """

    row: PlanRow
    box: Box
    ranks: Sequence[int]
    whole: bool
    work: float
    blocks: Sequence[tuple[int, int, int]] = ()


class Traffic:
    """Numbers that go over the wire, for each rank: averages out to owners, directions back.

    Args:
        ranks: How many.

    Attributes:
        needed: What each keeps of parameters that it works on or sends something of.
    """

    def __init__(self, ranks: int) -> None:
        self.out_sent, self.out_received, self.back_sent, self.back_received, self.needed = (
            torch.zeros(ranks, dtype=torch.float64, device="cpu") for _ in range(5)
        )

    def add(self, pieces: Sequence[Piece], owners: Sequence[int], kept: Kept) -> None:
        """What owners work on comes, and what they find goes: as `Route.out` and `Route.back` say it.

        Args:
            pieces: All of a parameter.
            owners: A rank for each, which works on it.
            kept: Of the parameter.
        """
        places, sizes = (
            torch.tensor(owners, device="cpu"),
            torch.tensor([volume(piece.box) for piece in pieces], dtype=torch.float64, device="cpu"),
        )
        own = kept.numbers[places]
        self.needed[places] += own
        self.back_received += kept.numbers
        self.back_received[places] -= own
        if pieces[0].whole:
            copies = torch.tensor([len(piece.ranks) - 1 for piece in pieces], device="cpu")
            self.back_sent[places] += copies * sizes
            return
        out = kept.sent_out(owners[0])
        self.out_sent += out
        self.out_received[owners[0]] += out.sum()
        self.needed += torch.where(out > 0, kept.numbers, 0)
        self.back_sent[places] += kept.total - own

    def add_all(self, other: Traffic, *, out: float, back: float) -> None:
        """Another's, so often, or in bytes.

        Args:
            other: What is added.
            out: Times of what goes out.
            back: Of what comes back.
        """
        self.out_sent += out * other.out_sent
        self.out_received += out * other.out_received
        self.back_sent += back * other.back_sent
        self.back_received += back * other.back_received


@dataclass(frozen=True)
class Member:
    """A parameter, as the optimizer knows it.

    Args:
        row: Of its plan.
        group: Its group.
        norm: Of the group.
        stages: That work on it.
        placed: Shape of its mesh, and its placements.
        kept: Of it, on each rank.
    """

    row: PlanRow
    group: Mapping[str, Any]
    norm: Norm
    stages: tuple[Stage, ...]
    placed: Placed
    kept: Kept

    @property
    def itemsize(self) -> int:
        """Bytes of a number of its averages."""
        return state_dtype(self.row.parameter).itemsize

    @property
    def entries(self) -> list[Entry]:
        """What stages keep of it."""
        return [entry for stage in self.stages for entry in stage.entries(self.row)]


@dataclass(frozen=True)
class Turn:
    """What one load takes, on each rank.

    Args:
        flops: Operations.
        moved: Bytes.
        coming: Bytes that it holds while the one before it is worked on, as it is on its way then.
        finding: Most bytes until directions are found.
        sample: Bytes of directions that are kept from then on, until the next step.
        sending: Most bytes while directions are sent.
        going: Bytes that it holds while the next one is worked on, as directions are on their way then.
    """

    flops: Tensor
    moved: Traffic
    coming: Tensor
    finding: Tensor
    sample: Tensor
    sending: Tensor
    going: Tensor


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A step; what is a vector has one number for each rank.

    Args:
        axes: Of the layout.
        parameters: Bytes of the weights that are kept.
        gradients: Bytes of theirs.
        averages: Bytes of momenta, second moments, counts, and what stages keep.
        moments: Bytes of the moments of layer inputs.
        powers: Bytes of what is made of them.
        sums: Bytes of sums of inputs between backward pass and step, where most moments are refreshed at once.
        samples: Bytes of directions that `diagnostics` looks at, kept until the next step: one of each shape.
        temporaries: Most bytes at once during the step, about; samples are among them.
        flops: Of the directions.
        sent: Bytes, averages out and directions back.
        received: Likewise.
        agreed_bytes: Payload of the sums over all ranks.
        owners: Of each parameter's name, the ranks that work on it; None: each on what it keeps.
        turns: What loads take, one after the other: all ranks exchange averages, work, and exchange directions.
    """

    axes: Axes
    parameters: Tensor
    gradients: Tensor
    averages: Tensor
    moments: Tensor
    powers: Tensor
    sums: Tensor
    samples: Tensor
    temporaries: Tensor
    flops: Tensor
    sent: Tensor
    received: Tensor
    agreed_bytes: int
    owners: Mapping[str, tuple[int, ...] | None]
    turns: Sequence[Turn]

    @property
    def kept(self) -> Tensor:
        """Bytes at any time."""
        return self.parameters + self.gradients + self.averages + self.moments + self.powers

    @property
    def memory(self) -> Tensor:
        """Most bytes, in a step or before it."""
        return self.kept + torch.maximum(self.samples + self.sums, self.temporaries)

    @property
    def imbalance(self) -> float:
        """Operations of the rank with most, relative to the mean; 1 if there are none."""
        mean = float(self.flops.mean())
        return float(self.flops.max()) / mean if mean else 1.0


def plan_ranks(optimizer: SteepestDescent, axes: Axes, *, wire: torch.dtype | None = None) -> Planned:
    """What a step of an optimizer would take, were its parameters laid out so.

    Args:
        optimizer: Of a model in one process, on any device; nothing is read but shapes.
        axes: Of the layout.
        wire: Type of averages and directions on their way; None: that of the averages.

    Raises:
        ValueError: If it is not known how a parameter is laid out.
    """
    return _Ranks(optimizer, axes, wire).planned()


@dataclass(frozen=True)
class Ranks:
    """How many, for who asks a team for it."""

    size: int


class _Ranks:
    """One plan in the making."""

    def __init__(self, optimizer: SteepestDescent, axes: Axes, wire: torch.dtype | None) -> None:
        self.optimizer = optimizer
        self.axes = axes
        self.wire = wire
        self.streams = optimizer._combine.streams
        self.momo = optimizer._losses.momo is not None
        self.team = Ranks(axes.ranks)
        self._cap: int | None = None
        self._kept: dict[tuple[object, ...], Kept] = {}
        self.members = {member.row.parameter: member for member in self._members()}
        self.pieces: dict[Tensor, list[Piece]] = {}
        self.owners: dict[Tensor, list[int]] = {}
        self.flops = self.nothing()
        self._share_out()

    def nothing(self) -> Tensor:
        """Zeros, one for each rank."""
        return torch.zeros(self.axes.ranks, dtype=torch.float64, device="cpu")

    def _members(self) -> Iterator[Member]:
        rows = iter(self.optimizer.plan)
        for group in self.optimizer.param_groups:
            norm = self.optimizer.norm_of(group)
            stages = tuple(self.optimizer.stages_of(group))
            for row in itertools.islice(rows, len(group["params"])):
                placed = self.axes.placed(row)
                yield Member(row, group, norm, stages, placed, self.kept_of(row.shape, placed))

    def kept_of(self, shape: Sequence[int], placed: Placed) -> Kept:
        """What ranks keep of a tensor that is placed so."""
        key = (tuple(shape), placed)
        if key not in self._kept:
            self._kept[key] = Kept.of(shape, placed)
        return self._kept[key]

    def kept_entry(self, member: Member, entry: Entry) -> Kept:
        """What ranks keep of what stages keep of a parameter."""
        if entry.shape is None:
            return member.kept
        mesh_shape, placements = member.placed
        if self.axes.plain or not entry.divided or not entry.shape:
            return self.kept_of(entry.shape, self.axes.copies)
        return self.kept_of(entry.shape, (mesh_shape, kept_placements(entry.shape, mesh_shape, placements)))

    def _share_out(self) -> None:
        """Pieces and their owners, by the functions by which the optimizer finds its own."""
        asked: dict[bool, list[Piece]] = {False: [], True: []}
        alike: dict[tuple[object, ...], list[Piece]] = {}
        for member in self.members.values():
            row = member.row
            if completed(member.norm).elementwise or not row.numel:
                continue
            entries = tuple((entry.shape, entry.travels) for entry in member.entries)
            key = (row.shape, row.view, member.placed, member.norm, entries)
            if key not in alike:
                found = pieces(member.kept.layout, row, member.norm, member.stages)
                alike[key] = [
                    Piece(
                        row,
                        box,
                        ranks,
                        whole=box in member.kept.distinct,
                        work=work_of(member.norm, row, box),
                        blocks=_blocks(member, box),
                    )
                    for box, ranks in found.items()
                ]
            own = [replace(piece, row=row) for piece in alike[key]]
            self.pieces[row.parameter] = own
            asked[not row.parameter.requires_grad] += own
        taken: list[tuple[float, Sequence[int]]] = []
        for frozen, own in asked.items():  # what is frozen is work for nobody, unless it thaws
            own.sort(key=lambda piece: turn_of(piece.row))
            every = [*taken, *((piece.work, piece.ranks) for piece in own)]
            shares = assign([work for work, _ in every], self.axes.ranks, [ranks for _, ranks in every])
            owners = {index: rank for rank, share in enumerate(shares) for index in share}
            for index, piece in enumerate(own, start=len(taken)):
                self.owners.setdefault(piece.row.parameter, []).append(owners[index])
                self.flops[owners[index]] += 0.0 if frozen else piece.work
            taken = [(piece.work, [owners[index]]) for index, piece in enumerate(own)]

    def planned(self) -> Planned:
        """All of it."""
        members = self.members.values()
        loads = self._packed()
        turns = self._turns(loads)
        traffic = Traffic(self.axes.ranks)
        for turn in turns:
            traffic.add_all(turn.moved, out=1, back=1)
        moments, powers, sums = self._inputs()
        return Planned(
            axes=self.axes,
            parameters=self._kept_bytes((m.kept, m.row.parameter.itemsize) for m in members),
            gradients=self._kept_bytes((m.kept, m.row.parameter.itemsize) for m in members if m.row.trainable),
            averages=self._averages(),
            moments=moments,
            powers=powers,
            sums=sums,
            samples=torch.stack([turn.sample for turn in turns]).sum(0),
            temporaries=self._temporaries(turns),
            flops=self.flops,
            sent=traffic.out_sent + traffic.back_sent,
            received=traffic.out_received + traffic.back_received,
            agreed_bytes=self._agreed(loads),
            owners={m.row.name: tuple(self.owners.get(m.row.parameter, ())) or None for m in members},
            turns=turns,
        )

    def _kept_bytes(self, parts: Iterable[tuple[Kept, int]]) -> Tensor:
        """Bytes of tensors, of which each number takes so many."""
        total = self.nothing()
        counted: dict[tuple[int, int], tuple[Kept, int, int]] = {}
        for kept, size in parts:
            _, _, count = counted.get((id(kept), size), (kept, size, 0))
            counted[id(kept), size] = (kept, size, count + 1)
        for kept, size, count in counted.values():
            total += kept.numbers * (size * count)
        return total

    def _averages(self) -> Tensor:
        """What the optimizer's schema says, but the moments of inputs."""
        parts: list[tuple[Kept, int]] = []
        for member in self.members.values():
            if not member.row.trainable:
                continue
            entries = schema(
                member.row, adapts=member.norm.adapts, stages=member.stages, storage=self.optimizer._storage
            )
            for entry in entries.values():
                if entry.eager:
                    dtype = entry.dtype or state_dtype(member.row.parameter)
                    parts.append((self.kept_entry(member, entry), dtype.itemsize))
        return self._kept_bytes(parts)

    def _inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Moments of inputs, their powers, and sums of inputs."""
        moments, powers = self.nothing(), self.nothing()
        stage = next((one for one in self.optimizer.stages if isinstance(one, InputMoments)), None)
        if stage is None:
            return moments, powers, self.nothing()
        leaders: dict[int, Member] = {}
        users: dict[int, set[int]] = {}
        for reader in stage.readers:
            leaders.setdefault(reader.group, self.members[reader.parameter])
            owners = self.owners.get(reader.parameter)  # None: each rank works on what it keeps
            users.setdefault(reader.group, set()).update(range(self.axes.ranks) if owners is None else owners[:1])
        parts: list[tuple[Kept, int]] = []
        due: dict[int, int] = {}
        for number, leader in leaders.items():
            entries = {entry.key: entry for entry in leader.entries}
            moment, mass = entries[INPUT_MOMENT], entries[INPUT_MASS]
            parts += [(self.kept_entry(leader, one), leader.itemsize) for one in (moment, mass)]
            size = math.prod(moment.shape or ()) * leader.itemsize
            powers[[*users[number]]] += size * len(stage.options.powers)
            step = stage.options.start(number, len(leaders)) % stage.options.every
            due[step] = due.get(step, 0) + size + math.prod(mass.shape or ()) * leader.itemsize
        return self._kept_bytes(parts), powers, self.nothing() + max(due.values())

    def burden(self, parameter: Tensor) -> dict[int, float]:
        """As the optimizer's; where all ranks work alike, one stands for all."""
        whole = max(1, parameter.numel())
        if parameter in self.pieces:
            pairs = zip(self.owners[parameter], self.pieces[parameter], strict=True)
            return {owner: volume(piece.box) / whole for owner, piece in pairs}
        return {0: self.members[parameter].kept.most / whole}

    def _packed(self) -> list[Load]:
        """Loads of all groups, by the functions by which the optimizer packs its own."""
        rows = {parameter: member.row for parameter, member in self.members.items()}
        found: list[tuple[Norm, list[Bucket]]] = []
        for group in self.optimizer.param_groups:
            norm = self.optimizer.norm_of(group)
            moving = [p for p in group["params"] if p.requires_grad and p.numel()]
            if moving:
                found.append((norm, find_buckets(moving, rows, matrix=norm.matrix)))
        every = [bucket for _, own in found for bucket in own]
        shared = cast(Any, self) if self.axes.ranks > 1 else None
        self._cap = cap = (self.optimizer.memory_cap or default_cap(every, shared)) if self.streams else None
        return [
            load
            for norm, own in found
            for load in (
                loads(own, memory_cap=cap, adapts=norm.adapts)
                if shared is None
                else shared_loads(own, shared, memory_cap=cap, adapts=norm.adapts)
            )
        ]

    def _turns(self, packed: Sequence[Load]) -> list[Turn]:
        """What each load takes, in their order."""
        seen: dict[tuple[object, ...], Tensor] = {}
        return [self._turn(load, [self.members[parameter] for parameter in load.parameters], seen) for load in packed]

    def _turn(self, load: Load, members: Sequence[Member], seen: dict[tuple[object, ...], Tensor]) -> Turn:
        """One load's part of a step.

        Args:
            load: Shapes.
            members: Its parameters, all of one group.
            seen: Which ranks have kept a direction of a shape in this step; written to.
        """
        first, size = members[0], members[0].itemsize
        norm, both = completed(first.norm), 1 + first.norm.adapts
        kept = self._kept_bytes((member.kept, size) for member in members)
        if norm.elementwise:
            nothing = self.nothing()
            finding = self._finding_elementwise(load, kept, ahead=self._ahead(first), adapts=norm.adapts)
            return Turn(nothing, Traffic(self.axes.ranks), nothing, finding, nothing, kept, kept)
        traffic, flops, work = Traffic(self.axes.ranks), self.nothing(), self.nothing()
        alike: dict[
            tuple[tuple[int, ...], object], list[int]
        ] = {}  # owners of what is of one shape, and so worked on as a batch
        shapes: dict[tuple[int, int], list[int]] = {}
        merged = self.nothing()
        for member in members:
            own, owners = self.pieces[member.row.parameter], self.owners[member.row.parameter]
            traffic.add(own, owners, member.kept)
            flops[owners] += torch.tensor([piece.work for piece in own], dtype=torch.float64, device="cpu")
            volumes = torch.tensor([volume(piece.box) for piece in own], dtype=torch.float64, device="cpu") * size
            work[owners] += volumes
            if member.row.view != LINEAR:  # directions are put together, where they are not whole parameters as found
                merged[owners] += volumes
            for piece, owner in zip(own, owners, strict=True):
                alike.setdefault((sizes(piece.box), member.row.view), []).append(owner)
                for _, m, n in piece.blocks:
                    shapes.setdefault((m, n), []).append(owner)
        wire = size if self.wire is None else self.wire.itemsize
        once, moved = Traffic(self.axes.ranks), self._aside(members)
        once.add_all(traffic, out=wire, back=wire)
        out, back = self._times(first)
        moved.add_all(once, out=out, back=back)
        averages = kept if norm.adapts else traffic.needed * (size * self._ahead(first))
        travels = bool(once.out_sent.any())
        coming = both * (averages + once.out_sent + once.out_received)
        stacked = self.nothing()
        for (box, _), owners in alike.items():
            counts = self.nothing().index_add_(
                0, torch.tensor(owners, device="cpu"), torch.ones(len(owners), dtype=torch.float64, device="cpu")
            )
            stacked += torch.where(counts > 1, counts, 0) * (size * math.prod(box))
        cap = MEMORY_CAP if self._cap is None else max(1, (SHARES - 2) * self._cap // SHARES)
        total, most = inner_bytes(norm, load, first.row.parameter.device, cap)
        inside = (total * work / sum(size * parameter.numel() for parameter in load.parameters)).clamp(max=most)
        # on their way, put together and side by side; then these, directions, and what those are found from
        finding = torch.maximum(coming + both * (work * travels + stacked), (both + 1) * work + inside)
        sample = self.nothing()
        for (m, n), owners in shapes.items():
            if norm.polar_scale(m, n) is not None:
                before = seen.setdefault((first.row.role, id(first.norm), m, n), self.nothing())
                now = before.clone()
                now[owners] = 1
                sample += (now - before) * (size * m * n)
                seen[first.row.role, id(first.norm), m, n] = now
        going = work + once.back_sent + once.back_received
        return Turn(flops, moved, coming * travels, finding, sample, going + merged, going)

    def _finding_elementwise(self, load: Load, kept: Tensor, *, ahead: bool, adapts: bool) -> Tensor:
        """Most bytes until the directions of what each rank keeps are found, one shape after the other."""
        several, found, most = self.nothing(), self.nothing(), self.nothing()
        for bucket in load.buckets:
            members = [self.members[parameter] for parameter in bucket.parameters]
            own = self._kept_bytes((member.kept, member.itemsize) for member in members)
            several += own if len(members) > 1 else 0
            most = torch.maximum(most, found + 2 * own)  # a root and its negative, or what becomes a direction
            found += own
        # averages, those of several parameters of one shape side by side, too; with second moments, of both kinds
        return 2 * kept + several + most if adapts else kept * ahead + several + most

    def _temporaries(self, turns: Sequence[Turn]) -> Tensor:
        """Most bytes at once: of one load with the next on its way, or, where all must be known first, of all."""
        most, samples, before = self.nothing(), self.nothing(), self.nothing()
        if self.streams:
            for turn, follower in itertools.zip_longest(turns, turns[1:]):
                coming = before if follower is None else before + follower.coming
                most = torch.maximum(most, coming + samples + turn.finding)
                samples += turn.sample
                most = torch.maximum(most, coming + samples + turn.sending)
                before = turn.going if self.axes.ranks > 1 else before
            return most
        for turn in turns:  # directions of all loads, with what is on its way back already but for what comes
            most = torch.maximum(most, before + samples + turn.finding)
            samples += turn.sample
            before = before + turn.going - turn.moved.back_sent - turn.moved.back_received
        for turn in turns:
            most = torch.maximum(most, before + samples + turn.moved.back_sent + turn.moved.back_received)
            before = before + turn.moved.back_received
        return most

    def _times(self, first: Member) -> tuple[int, int]:
        """How often averages go out, and directions back, in a step.

        Args:
            first: Of a load.
        """
        changed = any(stage.changes_gradients for stage in first.stages)
        slopes = self.momo and self._ahead(first)
        seen = any(stage.observes for stage in first.stages) + any(stage.sees_weights for stage in first.stages)
        decay = self.optimizer._decays.of(first.group)
        kept = decay.needs_directions or (self.momo and decay.keeps_norms)
        return 1 + first.norm.adapts + changed + slopes + seen, 1 + kept + changed

    def _ahead(self, member: Member) -> bool:
        return bool(member.group["nesterov"]) and not member.norm.adapts

    def _aside(self, members: Sequence[Member]) -> Traffic:
        """Bytes of what stages keep, which goes to those who work on the matrices, and back."""
        total = Traffic(self.axes.ranks)
        for member in members:
            row = member.row
            for entry in (one for one in member.entries if one.travels):
                own = self.pieces[row.parameter]
                moved, kept = Traffic(self.axes.ranks), self.kept_entry(member, entry)
                if entry.shape is not None and len(own) > 1:  # divided as the matrices are
                    part = full((entry.shape[0] // len(own), *entry.shape[1:]))
                    own = [replace(piece, box=part) for piece in own]
                elif entry.shape is not None:
                    box = full(entry.shape)
                    whole = [rank for rank, one in enumerate(kept.layout.boxes) if one == box]
                    own = [replace(own[0], box=box, ranks=whole, whole=bool(whole))]
                moved.add(own, self.owners[row.parameter], kept)
                size = (entry.dtype or state_dtype(row.parameter)).itemsize
                total.add_all(moved, out=size, back=size)
        return total

    def _agreed(self, packed: Sequence[Load]) -> int:
        """Payload of the sums over all ranks."""
        if self.axes.ranks == 1:
            return 0
        here = any(parameter.device.type == "cpu" for parameter in self.members)
        several = any(len(own) > 1 for own in self.pieces.values())
        numbers = 2 * HEARD + 1 + (len(self.members) + ALIKE if here or several else 0) + len(packed)
        if not self.streams or self.optimizer._combine.regularized:
            for load in packed:
                first = self.members[load.parameters[0]]
                numbers += sum(load.counts) * (1 + (self.momo and self._ahead(first)))
        for load in packed:
            numbers += sum(load.counts) * self._products(self.members[load.parameters[0]])
        return 8 * (numbers + INNER * self.momo)

    def _products(self, first: Member) -> int:
        """How many inner products of each matrix are added up where weights stay on spheres.

        Args:
            first: Of a load.
        """
        decay = self.optimizer._decays.of(first.group)
        if not decay.keeps_norms:
            return 0
        averages = averages_of(first.group)
        several = 0 if averages is None else 2 * len(averages)
        arc = 4 + (several or self._ahead(first))
        return 1 + (arc if self.momo else 1) + (decay.relative and first.norm.elementwise)


def _blocks(member: Member, box: Box) -> Sequence[tuple[int, int, int]]:
    """Shapes of the matrices in a part of a parameter."""
    view = member.row.view
    within = view.within(member.row.shape, box) if view is not None and member.norm.matrix else None
    return ((1, 1, volume(box)),) if within is None else within.blocks(sizes(box))


def inner_bytes(norm: Norm, load: Load, device: torch.device, cap: int) -> tuple[int, int]:
    """What finding directions takes besides.

    Args:
        norm: Not elementwise.
        load: Of matrices.
        device: Where they are.
        cap: Bytes that the norm is told to keep to.

    Returns:
        Bytes of all matrices, and the most that are taken at once.
    """
    while isinstance(norm, Scaled):
        norm = completed(norm.norm)
    blocks = [(len(bucket.parameters) * count, m, n) for bucket in load.buckets for count, m, n in bucket.blocks]
    itemsize = state_dtype(load.parameters[0]).itemsize
    if not isinstance(norm, Spectral):
        total = sum(itemsize * count * m * n for count, m, n in blocks)
        return total, total
    found: list[tuple[int, int, int]] = []  # matrices, bytes of one, and how many are worked on together
    alike: dict[int, list[tuple[int, int]]] = {}
    for count, m, n in blocks:
        alike.setdefault(min(m, n), []).append((count, max(m, n)))
    for rows, columns in alike.items():
        if norm.polar == "svd":
            sizes_of = [(count, 8 * SVD_COPIES * rows * long) for count, long in columns]
            found += [(count, size, max(1, cap // size)) for count, size in sizes_of]
            continue
        dtype = norm.dtype or torch.float32
        iteration = choose(norm.polar, get_coefficients(norm.coefficients, dtype), rows, columns, dtype, device)
        alone = isinstance(iteration.products, OneByOne)
        found += [
            (count, _of_polar(iteration, long), 1 if alone else max(1, cap // iteration.bytes_per_matrix(long)))
            for count, long in columns
        ]
    return sum(count * size for count, size, _ in found), max(size * together for _, size, together in found)


def _of_polar(iteration: Iteration, columns: int) -> int:
    """Bytes of one matrix in a polar iteration."""
    size = iteration.dtype.itemsize
    x, square = iteration.rows * columns * size, iteration.rows**2 * size
    again = product_counts(iteration.form, iteration.chosen.steps, eps=torch.finfo(iteration.dtype).eps)[1] > 1
    # brought to size in float32; the first X, X, and what is made of its Gram matrix; these, the next X, and a quotient
    return max(x + 4 * iteration.rows * columns, (1 + again) * x + 5 * square, (2 + again) * x + 3 * square)


@dataclass(frozen=True)
class Machine:
    """What the time of a step is predicted from, for each rank.

    Args:
        flops: Operations per second that training and directions reach.
        bandwidth: Bytes per second that go out, and as many come in, at the same time.
        memory_bandwidth: Bytes per second from and to its memory.
        tokens: That a training step has for each rank.
    """

    flops: float
    bandwidth: float
    memory_bandwidth: float
    tokens: float


def seconds(planned: Planned, machine: Machine, *, active: float) -> tuple[float, float]:
    """Time of an optimizer's step and of forward and backward pass, where nothing hides behind anything.

    Loads follow one another: the averages of all ranks go out, the rank with most work is waited for, and directions
    come back.

    Args:
        planned: The step.
        machine: Of each rank.
        active: Parameters that a token is multiplied with: six operations each.
    """
    step = ALL_TRAFFIC * float(planned.parameters.max()) / machine.memory_bandwidth
    for turn in planned.turns:
        moved = turn.moved
        most = sum(
            max(float(sent.max()), float(received.max()))
            for sent, received in ((moved.out_sent, moved.out_received), (moved.back_sent, moved.back_received))
        )
        step += float(turn.flops.max()) / machine.flops + most / machine.bandwidth
    return step, 6 * active * machine.tokens / machine.flops


def active_parameters(plan: Plan, experts_per_token: int | None) -> float:
    """Numbers that a token is multiplied with: of matrices and heads, and of tables that are heads, too.

    Args:
        plan: Of a model, as routed.
        experts_per_token: How many of a stack of experts; None: all.
    """
    total = 0.0
    for row in plan:
        share = 1.0
        if row.view is not None and row.view.experts and experts_per_token is not None:
            share = min(1.0, experts_per_token / row.shape[0])
        if row.role in ("matrix", "head") or (row.role == "embedding" and len(row.sites) > 1):
            total += share * row.numel
    return total
