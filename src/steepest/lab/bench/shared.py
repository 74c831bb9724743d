"""What a step takes where processes share it, beside one process alone and beside every rank doing everything."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from steepest.lab.bench.shapes import Shape
from steepest.lab.bench.timing import Quartiles, paired_ratio, quartiles, take_turns
from steepest.lab.disk.files import read_bytes, write_whole
from steepest.optim import Muon
from steepest.optim.sharing import Summary

WARM_UP = 2
# What is measured, and beside what: how often the work is done twice is the difference.
BESIDE = {"alone": "alone", "ddp": "alone", "everything": "everything", "fsdp": "everything"}


@dataclass(frozen=True)
class SharedRow:
    """One way to take the step.

    Args:
        way: "alone": one process, while the others wait; "ddp": each has copies; "fsdp": each keeps rows of every
            matrix; "everything": likewise, but each rank gathers all gradients and does all the work.
        milliseconds: Of a step; of the slowest rank.
        ratio: To the way that it is compared with, within rounds.
        beside: That way.
        sent_bytes: By all ranks, in a step.
        imbalance: Operations of the rank with most, relative to the mean.
    """

    way: str
    milliseconds: Quartiles
    ratio: Quartiles
    beside: str
    sent_bytes: int
    imbalance: float


def measure_shared(
    shapes: Sequence[Shape], *, ranks: int, rounds: int
) -> tuple[list[SharedRow], dict[str, list[float]]]:
    """Time the ways in turns, in processes of one thread each that are started for it.

    Args:
        shapes: Of all matrices.
        ranks: How many processes.
        rounds: That count.

    Returns:
        A row for each way, and the seconds of each by round.

    Raises:
        RuntimeError: If a process fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            torch.multiprocessing.spawn(_rank, args=(folder, ranks, list(shapes), rounds), nprocs=ranks)
        except Exception as problem:
            raise RuntimeError(f"bench ranks: a process of {ranks} failed: {problem}") from problem
        found = msgspec.json.decode(read_bytes(Path(folder) / "found.json"))
    seconds: dict[str, list[float]] = found["seconds"]
    rows = [
        SharedRow(
            way,
            quartiles([1e3 * one for one in own]),
            paired_ratio(own, seconds[BESIDE[way]]),
            BESIDE[way],
            found["sent"].get(way, 0),
            found["imbalance"].get(way, 1.0),
        )
        for way, own in seconds.items()
    ]
    return rows, seconds


def _rank(rank: int, folder: str, ranks: int, shapes: list[Shape], rounds: int) -> None:
    torch.set_num_threads(1)
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=ranks)
    summaries: dict[str, Callable[[], Summary]] = {}
    works = {
        "alone": _alone(shapes, rank),
        "ddp": _copies(shapes, summaries),
        "everything": _everything(shapes),
        "fsdp": _sharded(shapes, summaries),
    }
    seconds = take_turns({way: _slowest(work) for way, work in works.items()}, rounds=rounds, warm_up=WARM_UP)
    sent = {way: _total(summary().sent_bytes) for way, summary in summaries.items()}
    if rank == 0:
        imbalance = {way: summary().imbalance for way, summary in summaries.items()}
        found = {"seconds": seconds, "sent": sent, "imbalance": imbalance}
        write_whole(Path(folder) / "found.json", msgspec.json.encode(found))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads now and then abort a process that takes its objects apart


def _slowest(work: Callable[[], object]) -> Callable[[], float]:
    """Starts on all ranks at once, and takes as long as the last of them."""

    def clocked() -> float:
        torch.distributed.barrier()
        start = time.perf_counter()
        work()
        took = torch.tensor([time.perf_counter() - start], dtype=torch.float64, device="cpu")
        torch.distributed.all_reduce(took, op=torch.distributed.ReduceOp.MAX)
        return float(took)

    return clocked


def _total(count: int) -> int:
    number = torch.tensor([count], dtype=torch.int64, device="cpu")
    torch.distributed.all_reduce(number)
    return int(number)


def _drawn(shapes: Sequence[Shape]) -> list[nn.Parameter]:
    """The same on all ranks, with gradients."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    parameters = [nn.Parameter(torch.randn(tuple(shape), generator=generator, device="cpu")) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator, device="cpu")
    return parameters


def _alone(shapes: Sequence[Shape], rank: int) -> Callable[[], object]:
    if rank > 0:
        return lambda: None
    return Muon(_drawn(shapes)).step


def _copies(shapes: Sequence[Shape], summaries: dict[str, Callable[[], Summary]]) -> Callable[[], object]:
    optimizer = Muon(_drawn(shapes), process_group=torch.distributed.group.WORLD)
    summaries["ddp"] = lambda: optimizer.sharing
    return optimizer.step


def _rows(tensors: Sequence[Tensor]) -> list[Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    return [distribute_tensor(tensor.detach(), mesh, [Shard(0)], src_data_rank=None) for tensor in tensors]


def _sharded(shapes: Sequence[Shape], summaries: dict[str, Callable[[], Summary]]) -> Callable[[], object]:
    drawn = _drawn(shapes)
    parameters = [nn.Parameter(one) for one in _rows(drawn)]
    for parameter, gradient in zip(parameters, _rows([one.grad for one in drawn if one.grad is not None]), strict=True):
        parameter.grad = gradient
    optimizer = Muon(parameters)
    summaries["fsdp"] = lambda: optimizer.sharing
    return optimizer.step


def _everything(shapes: Sequence[Shape]) -> Callable[[], object]:
    """What is done without owners: all ranks gather all gradients, and each finds all directions."""
    drawn = _drawn(shapes)
    kept, gradients = _rows(drawn), _rows([one.grad for one in drawn if one.grad is not None])
    optimizer = Muon(drawn)
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def step() -> None:
        for whole, gradient in zip(drawn, gradients, strict=True):
            whole.grad = gradient.full_tensor()
        optimizer.step()
        for whole, own in zip(drawn, kept, strict=True):
            own.to_local().copy_(whole.detach().chunk(ranks)[rank])

    return step
