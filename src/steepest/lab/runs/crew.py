"""How a batch of a run is divided: among ranks that train it together, and into micro-batches.

One process that takes a batch at once is a crew of one, for which nothing is exchanged and every number is what it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import os
import re
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from steepest.lab.errors import Failure, UsageError
from steepest.lab.models.whole_batch import whole_batch_modules
from steepest.lab.runs.device import find_device

Parallel = Literal["ddp", "fsdp", "hsdp"]
Done = TypeVar("Done")
TIMEOUT_S = 300.0  # for which ranks wait for each other, if a connection stays open
_PLACES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_INSTEAD = "put `torchrun --nproc-per-node 2 -m steepest` in place of `steepest`"
# How gloo, and stores where ranks meet, tell that somebody is not there any more; NCCL has a type for it.
_LOST = ("gloo", "connection closed", "connection reset", "connection refused", "broken pipe", "timed out")


class ElsewhereError(Failure, RuntimeError):
    """Another rank failed, and says why; this one ends with it."""

    def __init__(self, told: str) -> None:
        super().__init__(f"Another rank failed: {told}")


class LostRankError(Failure, RuntimeError):
    """Another rank is gone, or did not answer in time."""


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """What stands in lists of modules, as blocks of a transformer do: each once, what is inside others first."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    found = dict.fromkeys(block for blocks in reversed(lists) for block in blocks)
    return [block for block in found if not isinstance(block, nn.ModuleList | nn.ModuleDict)]  # which nothing calls


@dataclass(frozen=True)
class Crew:
    """The ranks that train a run together, and how each takes its part of a batch.

    Args:
        layout: What each rank keeps of the model: all of it ("ddp"), a shard ("fsdp"), or a shard of one of several
            replicas ("hsdp"). None: there is one process.
        rank: Of this process.
        size: Number of ranks.
        mesh: Replicas, and shards of each, for "hsdp".
        device: Where this rank computes.
        accumulate: Micro-batches, one after the other, that a rank's part of a batch comes in.
        compiled: Whether the model is compiled: as a whole, or, where it is sharded and has blocks, block by block.
    """

    layout: Parallel | None = None
    rank: int = 0
    size: int = 1
    mesh: tuple[int, int] | None = None
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - it cannot change
    accumulate: int = 1
    compiled: bool = False

    @property
    def leads(self) -> bool:
        """Whether this rank is the one that writes."""
        return self.rank == 0

    def described(self) -> dict[str, object]:
        """What a record says of it; nothing for one process that takes a batch at once on the CPU."""
        if (self.layout, self.accumulate, self.device.type, self.compiled) == (None, 1, "cpu", False):
            return {}
        layout = f"{self.layout} {self.mesh[0]}x{self.mesh[1]}" if self.mesh else self.layout
        own = {"layout": layout, "ranks": self.size, "accumulate": self.accumulate, "device": self.device.type}
        return {"parallel": {**own, "compiled": True} if self.compiled else own}

    def check(self, batch_size: int) -> None:
        """Refuse a batch that cannot be divided evenly: means over parts would not be the mean over all.

        Args:
            batch_size: Examples of a step, on all ranks together.

        Raises:
            ValueError: If so.
        """
        parts = self.size * self.accumulate
        if self.accumulate < 1:
            raise ValueError(f"accumulate must be at least 1, got {self.accumulate}.")
        if batch_size % parts:
            known = ", ".join(str(n) for n in range(1, min(batch_size, 1024) + 1) if batch_size % n == 0)
            raise ValueError(
                f"A batch of {batch_size} examples cannot be divided evenly among {self.size} ranks with accumulate="
                f"{self.accumulate}, that is {parts} parts. Choose ranks and --accumulate whose product is one of "
                f"{known}, or give a --batch-size that is a multiple of {parts}."
            )

    def dividing(
        self, batch_size: int, *, accumulate: int | None = None, micro_batch: int | None = None, most: int | None = None
    ) -> Crew:
        """This crew, with the number of micro-batches that was asked for.

        Args:
            batch_size: Examples of a step, on all ranks together.
            accumulate: Micro-batches of a rank's part; None: as follows.
            micro_batch: Examples of each; None: as follows.
            most: Examples that each has at most: as few micro-batches as can be evenly. None: one.

        Raises:
            ValueError: If a batch cannot be divided so.
        """
        if accumulate is not None and micro_batch is not None:
            raise ValueError(
                f"--accumulate {accumulate} and --micro-batch {micro_batch} both say how a batch is divided. Give one."
            )
        if accumulate is not None:
            return dataclasses.replace(self, accumulate=accumulate)
        dataclasses.replace(self, accumulate=1).check(batch_size)
        part = batch_size // self.size
        if micro_batch is None:
            wanted = part if most is None else most
            return dataclasses.replace(self, accumulate=next(n for n in _divisors(part) if part // n <= wanted))
        if part % micro_batch:
            raise ValueError(
                f"--micro-batch {micro_batch}: of a batch of {batch_size} examples, each of {self.size} ranks has "
                f"{part}, which that does not divide. Choose one of {', '.join(map(str, _divisors(part)))}, or another "
                "--batch-size."
            )
        return dataclasses.replace(self, accumulate=part // micro_batch)

    def check_model(self, model: nn.Module, *, shared: bool = True) -> None:
        """Refuse micro-batches for a model that looks at a batch as a whole.

        Args:
            model: Of the task.
            shared: Whether ranks can train on the task together.

        Raises:
            ValueError: If so.
        """
        if self.accumulate > 1 and whole_batch_modules(model):
            instead = ", or share the batch among more ranks" if shared else ""
            raise ValueError(
                f"The model has batch norms, whose statistics are those of the whole batch: it cannot come in "
                f"{self.accumulate} micro-batches. Leave out --accumulate and --micro-batch{instead}."
            )

    def micro_batches(self, examples: Tensor) -> Sequence[Tensor]:
        """Which examples of a batch this rank takes: ranks have disjoint runs of them, in order.

        Args:
            examples: Of all ranks (B,), the same on each.
        """
        return examples.chunk(self.size)[self.rank].chunk(self.accumulate)

    def spread(self, model: nn.Module) -> nn.Module:
        """The model as this rank keeps it, on its device.

        Args:
            model: The same on all ranks. The parameters of a sharded one are DTensors from then on; its blocks, which
                are what stands in a `ModuleList`, come together one after the other.
        """
        for module in whole_batch_modules(model):
            module.rank, module.ranks = self.rank, self.size
        if self.compiled and self.layout in (None, "ddp"):
            model.compile()
        if self.layout is None:
            return model.to(self.device)
        if self.layout == "ddp":
            return nn.parallel.DistributedDataParallel(model.to(self.device))
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        kind = self.device.type
        if self.layout == "fsdp":
            mesh = init_device_mesh(kind, (self.size,), mesh_dim_names=("shard",))
        else:
            mesh = init_device_mesh(kind, cast("tuple[int, ...]", self.mesh), mesh_dim_names=("replica", "shard"))
        blocks = blocks_of(model)
        for compiled in (blocks or [model]) if self.compiled else ():
            compiled.compile()
        for block in blocks:
            fully_shard(block, mesh=mesh)
        return cast("nn.Module", fully_shard(model, mesh=mesh))

    @contextlib.contextmanager
    def passing(self, model: nn.Module, *, last: bool) -> Generator[None]:
        """Around forward and backward of a micro-batch: what ranks exchange at the last one only.

        Gradients of whole models are summed up first. Those of shards are reduced to shards at each micro-batch, so
        that none is whole for longer, and only replicas wait for the last one.

        Args:
            model: What `spread` returned.
            last: Whether it is the last one of its batch.
        """
        if self.layout == "ddp" and not last:
            with cast("nn.parallel.DistributedDataParallel", model).no_sync():
                yield
            return
        if self.layout == "hsdp":
            cast("Any", model).set_requires_all_reduce(last)
        with warnings.catch_warnings():
            if self.layout is not None:  # nobody writes to what the model returns
                warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
            yield

    def mean(self, number: float) -> float:
        """The mean over ranks, added up in one and the same order: equal on all to the last bit."""
        return number if self.size == 1 else self._numbers(number).mean().item()

    def most(self, number: int) -> int:
        """The largest of all ranks."""
        return number if self.size == 1 else int(self._numbers(number).max().item())

    def any(self, flag: bool) -> bool:
        """Whether any rank says so."""
        return self.most(int(flag)) > 0

    def together(self, act: Callable[[], Done]) -> Done:
        """Do something on every rank before any goes on; where it fails on one, it fails on all.

        Args:
            act: What to do; it may not wait for other ranks.

        Raises:
            ElsewhereError: If another rank failed, or the first one just like this one.
        """
        if self.size == 1:
            return act()
        try:
            done = act()
        except Exception as failure:
            own = f"{type(failure).__name__}: {failure}"
            if self._gathered(own)[0] == own and not self.leads:
                raise ElsewhereError(own) from failure
            raise
        if failures := [told for told in self._gathered(None) if told is not None]:
            raise ElsewhereError(str(failures[0]))
        return done

    def told(self, act: Callable[[], Done]) -> Done:
        """Do something on the first rank, and tell all what came of it; where it fails, it fails on all.

        Args:
            act: What to do; what it returns is pickled.
        """
        done = self.together(lambda: act() if self.leads else None)
        if self.size > 1:
            box = [done]
            dist.broadcast_object_list(box, src=0)
            done = box[0]
        return cast("Done", done)

    def check_alike(self, what: str) -> None:
        """Refuse ranks that were not told the same.

        Args:
            what: Of this rank.

        Raises:
            UsageError: On all ranks, if there are two kinds.
        """
        if self.size == 1:
            return
        every = self._gathered(what)
        if (other := next((rank for rank, told in enumerate(every) if told != every[0]), None)) is not None:
            raise UsageError(
                f"Ranks were not told the same: rank 0 has {every[0]}, rank {other} has {every[other]}. Give all ranks "
                "the same command, the same data and the same version of steepest."
            )

    def share(self, act: Callable[[Tensor], Tensor], pieces: Sequence[Tensor]) -> list[Tensor]:
        """Do for every piece what one rank does for some; all have all that came of it.

        Args:
            act: From a piece (n,) to numbers (n, ...). All ranks call it equally often, as a sharded model needs.
            pieces: Of at most the length of the first one.
        """
        rounds = -(-len(pieces) // self.size)
        own = [act(pieces[min(turn * self.size + self.rank, len(pieces) - 1)]) for turn in range(rounds)]
        rows = torch.stack([_padded(numbers, len(pieces[0])) for numbers in own])
        every = [torch.empty_like(rows) for _ in range(self.size)]
        if self.size == 1:
            every = [rows]
        else:
            dist.all_gather(every, rows)
        return [every[index % self.size][index // self.size, : len(piece)] for index, piece in enumerate(pieces)]

    def _numbers(self, number: float) -> Tensor:
        own = torch.tensor([number], dtype=torch.float64, device="cpu")
        every = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(every, own)
        return torch.cat(every)

    def _gathered(self, what: str | None) -> list[str | None]:
        every: list[str | None] = [None] * self.size
        dist.all_gather_object(every, what)
        return every


def _padded(numbers: Tensor, length: int) -> Tensor:
    """With zeros behind them, up to a length of the first dimension."""
    return F.pad(numbers, (*(0, 0) * (numbers.dim() - 1), 0, length - len(numbers)))


def _divisors(number: int) -> list[int]:
    """Of a number, rising."""
    low = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*low, *(number // n for n in low)})


@contextlib.contextmanager
def assembled(
    layout: Parallel | None,
    *,
    mesh: tuple[int, int] | None = None,
    device: str = "cpu",
    accumulate: int = 1,
    compiled: bool = False,
    environment: Mapping[str, str] = os.environ,
) -> Generator[Crew]:
    """Meet the ranks that `torchrun` started, and leave them together; one process is a crew of its own.

    Args:
        layout: What each keeps of the model; None for one process.
        mesh: Replicas, and shards of each, for "hsdp"; None: machines, and the ranks of each.
        device: As `find_device` takes it.
        accumulate: As in `Crew`.
        compiled: Likewise.
        environment: In which `torchrun` says who this is.

    Raises:
        UsageError: If the layout does not go with what was started, or there is no such device.
        LostRankError: If another rank is gone, or did not answer in time.
    """
    kind = find_device(device)
    started = int(environment.get("WORLD_SIZE", "1"))
    if layout is None:
        if mesh is not None:
            raise UsageError(f"--mesh {mesh[0]}x{mesh[1]} says how ranks share a model: add --parallel hsdp.")
        if started > 1:
            raise UsageError(
                f"{started} processes were started, and without --parallel each of them would train the whole run, all "
                "in the same directory. Add --parallel ddp, fsdp or hsdp, or start one process, without torchrun."
            )
        yield Crew(device=kind, accumulate=accumulate, compiled=compiled)
        return
    if missing := [name for name in _PLACES if name not in environment]:
        raise UsageError(
            f"--parallel {layout} trains on ranks that torchrun starts, and this process was started without it "
            f"({missing[0]} is not set): {_INSTEAD}, or leave --parallel out."
        )
    if not dist.is_available():
        raise UsageError(f"--parallel {layout}: this build of torch has no torch.distributed. Install another build.")
    mesh = _checked_mesh(layout, mesh, started, int(environment["LOCAL_WORLD_SIZE"]))
    backend = "gloo"
    if kind.type != "cpu":
        kind = torch.device(kind.type, int(environment["LOCAL_RANK"]))
        torch.accelerator.set_device_index(kind.index)
        backend = f"cpu:gloo,{kind.type}:{dist.get_default_backend_for_device(kind.type)}"
    with _telling_who_is_lost():
        dist.init_process_group(backend, timeout=timedelta(seconds=TIMEOUT_S))
        try:
            yield Crew(layout, dist.get_rank(), dist.get_world_size(), mesh, kind, accumulate, compiled)
            gc.collect()  # a module that synchronises its gradients may not outlive what it does it by
            dist.barrier()
        finally:
            dist.destroy_process_group()


@contextlib.contextmanager
def _telling_who_is_lost() -> Generator[None]:
    try:
        yield
    except (Failure, UsageError):
        raise
    except RuntimeError as problem:
        text = re.sub(r"^\[[^]]*\] ", "", next(iter(str(problem).splitlines()), "")).partition(". This is")[0]
        if not isinstance(problem, dist.DistError) and not any(sign in str(problem).lower() for sign in _LOST):
            raise
        raise LostRankError(
            f"Another rank ended, or did not answer within {TIMEOUT_S:g} s ({text}). All ranks end; start them again, "
            "and the run goes on from its last checkpoint."
        ) from problem


def _checked_mesh(
    layout: Parallel, mesh: tuple[int, int] | None, ranks: int, of_machine: int
) -> tuple[int, int] | None:
    """Replicas and shards, whose product is the number of ranks; None for layouts without."""
    if layout != "hsdp":
        if mesh is not None:
            raise UsageError(f"--mesh {mesh[0]}x{mesh[1]} is for --parallel hsdp, not for {layout}. Leave it out.")
        return None
    if mesh is None and 1 < of_machine < ranks and ranks % of_machine == 0:
        return ranks // of_machine, of_machine
    if mesh is None or mesh[0] * mesh[1] != ranks:
        given = "" if mesh is None else f", not {mesh[0]}x{mesh[1]} = {mesh[0] * mesh[1]}"
        meshes = " or ".join(f"{n}x{ranks // n}" for n in range(1, ranks + 1) if ranks % n == 0)
        raise UsageError(f"--parallel hsdp on {ranks} ranks needs --mesh {meshes} (replicas x shards){given}.")
    return mesh
