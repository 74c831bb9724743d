"""Whether many ranks take the steps of one process: a short training in a layout, and the same one without.

Both are trained from the same weights on the same batches, in processes that are started here: first one alone, then
one per rank. What is compared in the end is every weight, whole, on every rank.

Sums in another order differ in their last bits, and a polar factor of a matrix with small singular values, or Adam's
ratio of small numbers, makes more of that. How much is measured, not guessed: the one process trains once more, from
weights that are off by their last bit.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from statistics import fmean, median
from typing import Any, cast

import msgspec
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, start_processes

from steepest.lab.disk.files import exists, read_bytes, read_text, remove, write_whole
from steepest.lab.errors import Failure, UsageError
from steepest.lab.methods import build_optimizer, check_options
from steepest.lab.methods.tuned import OptionValue
from steepest.lab.models.brought import Brought, brought, found_function, refuse_chance, share
from steepest.lab.models.gpt import GPT, GPTConfig
from steepest.lab.runs.crew import blocks_of
from steepest.lab.runs.device import clocked
from steepest.names import unknown_name
from steepest.optim import SteepestDescent
from steepest.ranks import is_sharded
from steepest.ranks.boxes import part_like
from steepest.stages.inputs import InputMoments

AXES: Mapping[str, tuple[str, ...]] = {  # of an option, and the dimensions of torch's mesh; outermost first
    "ddp": ("replicate",),
    "fsdp": ("shard",),
    "hsdp": ("replicate", "shard"),
    "ep": ("ep",),
    "tp": ("tp",),
}
MOST = 64  # ranks; each is a process on this machine
POLL_S = 0.2
LEAST, ROUNDINGS = 1e-5, 10.0  # of the deviation that is allowed
LONGEST = 600  # characters of a line of somebody else's error; torch's may have tens of thousands


@dataclass(frozen=True)
class Layout:
    """How ranks share a model and its batches.

    Args:
        axes: Number of ranks by dimension of the mesh, outermost first.
    """

    axes: Mapping[str, int]

    @property
    def ranks(self) -> int:
        """All of them."""
        return math.prod(self.axes.values())

    @property
    def data(self) -> int:
        """Among how many a batch is shared out; ranks along `tp` see the same part."""
        return self.ranks // self.axes.get("tp", 1)


def read_layout(text: str) -> Layout:
    """What was typed as fsdp=2,tp=2.

    Args:
        text: Axes of `AXES`, each once.

    Returns:
        The layout.

    Raises:
        ValueError: If it cannot be meant.
    """
    sizes: dict[str, int] = {}
    found: set[str] = set()
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        if axis not in AXES:
            raise ValueError(unknown_name("axis of --mesh", axis, AXES))
        numbers = size.split("x")
        fits = all(one.isascii() and one.isdecimal() and 1 <= int(one[:9]) <= MOST for one in numbers)
        if axis in found or len(numbers) != len(AXES[axis]) or not fits:
            form = f"{axis}={'x'.join('2' for _ in AXES[axis])}"
            raise ValueError(f"--mesh {text}: each axis stands there once, with ranks of 1 to {MOST}, as in {form}.")
        found.add(axis)
        sizes |= dict(zip(AXES[axis], map(int, numbers), strict=True))
    kinds = sorted(found & {"ddp", "fsdp", "hsdp"})
    if len(kinds) > 1:
        raise ValueError(f"--mesh {text}: take one of {' and '.join(kinds)}; hsdp=2x4 is 2 replicas of 4 shards.")
    if "ddp" in found and len(found) > 1:
        raise ValueError(f"--mesh {text}: ddp copies plain parameters and stands alone; write fsdp beside tp and ep.")
    if "ep" in found and found - {"ep", "fsdp"}:
        raise ValueError(f"--mesh {text}: ep stands alone or with fsdp.")
    order = dict.fromkeys(itertools.chain.from_iterable(AXES.values()))
    layout = Layout({axis: sizes[axis] for axis in order if axis in sizes})
    if not 2 <= layout.ranks <= MOST:
        raise ValueError(f"--mesh {text} makes {layout.ranks}; it takes 2 to {MOST} ranks, each a process here.")
    return layout


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is trained.

    Args:
        model: "package.module:function", or None for a small transformer.
        method: Of the lab, one of this library's.
        options: Its options.
        layout: Of the ranks.
        steps: Optimizer steps.
        seed: Of weights and gradients.
        float64: Whether all is computed in it.
        device: "cpu" or "cuda".
        threads: CPU threads of each process.
        timeout_s: After which a process that has not ended is given up.
    """

    model: str | None
    method: str
    options: Mapping[str, OptionValue]
    layout: Layout
    steps: int
    seed: int
    float64: bool
    device: str
    threads: int
    timeout_s: float


class RankReport(msgspec.Struct, frozen=True, kw_only=True):
    """What one process found.

    Args:
        rank: Its number.
        weights: Hash of the weights that it began with, and of the batches.
        loss: Of the last step, of its own examples; None without a loss.
        step_s: Median time of the optimizer's step, without the first.
        sent_bytes: What its steps sent to others, of gradients and directions: mean.
        most_bytes: And the most of them.
        agreed_bytes: What its steps agreed on with others: mean.
        flops: Of the polar factors that are its own, per step.
        orthogonalised: Matrices that it worked on in the last step.
        imbalance: Largest number of flops of a rank over their mean.
        deviation: Largest distance of a weight from that of one process, relative to the latter; None: not finite. Of
            the one process: from itself, having begun with weights that are off by their last bit.
        parameter: Where that is.
    """

    rank: int
    weights: str
    loss: float | None = None
    step_s: float
    sent_bytes: float = 0.0
    most_bytes: int = 0
    agreed_bytes: float = 0.0
    flops: float = 0.0
    orthogonalised: int = 0
    imbalance: float = 1.0
    deviation: float | None = 0.0
    parameter: str = ""


class _Ended(msgspec.Struct):
    """How a process failed, written by it."""

    when: int
    text: str
    usage: bool


@dataclass(frozen=True)
class Verified:
    """Of all processes.

    Args:
        alone: The one without ranks.
        ranks: All ranks, in order.
    """

    alone: RankReport
    ranks: list[RankReport]

    @property
    def allowed(self) -> float:
        """How far a weight may be off: ten times what rounding does, and at least `LEAST`."""
        return max(LEAST, ROUNDINGS * (self.alone.deviation or 0.0))

    @property
    def worst(self) -> RankReport:
        """The rank that is farthest off."""
        return max(self.ranks, key=lambda one: math.inf if one.deviation is None else one.deviation)


def check_job(job: Job) -> None:
    """Refuse what can be refused before a process is started.

    Raises:
        UsageError: If the method is not one of this library or has no such option, there is no such function, or not
            as many accelerators as ranks.
    """
    try:
        options = check_options(job.method, job.options)
        optimizer = build_optimizer(job.method, GPT(GPTConfig(4, 1, 4, head_size=4)), options)
    except (ValueError, TypeError) as wrong:
        raise UsageError(str(wrong)) from wrong
    if not isinstance(optimizer, SteepestDescent):
        raise UsageError(f"--method: {job.method!r} is not a method of this library; try muon or adam.")
    if job.device == "cuda" and (there := torch.cuda.device_count()) < job.layout.ranks:
        raise UsageError(
            f"--device cuda: {job.layout.ranks} ranks need as many GPUs, and {there} are here. Take a smaller --mesh, "
            "or --device cpu, where any number of ranks share the processor."
        )
    if job.model is None and "ep" in job.layout.axes:
        raise UsageError("--mesh with ep: the small transformer has no experts. Give a --model that has.")
    if job.model is not None:
        found_function(job.model)


def verify(job: Job) -> Verified:
    """Train in one process, then on all ranks, and compare.

    Raises:
        UsageError: If the job cannot be meant.
        Failure: If a process fails, or has not ended in time.
    """
    check_job(job)
    with tempfile.TemporaryDirectory(prefix="steepest-verify-") as name:
        folder = Path(name)
        [alone] = _run(_train_alone, job, 1, folder)
        ranks = _run(_train_rank, job, job.layout.ranks, folder)
    for one in ranks:
        if one.weights != alone.weights:
            raise Failure(
                f"Rank {one.rank} began with other weights or batches than the process without ranks. The function of "
                f"--model must make the same in every process: draw from torch's generator, which --seed has set, or "
                "from one that it seeds itself."
            )
    work = sum(one.flops for one in ranks)  # which the process alone has done, too
    return Verified(msgspec.structs.replace(alone, flops=work), ranks)


# --- processes


def _run(main: Callable[[int, Job, Path], RankReport], job: Job, ranks: int, folder: Path) -> list[RankReport]:
    """Start processes, wait until they have ended, and read what they left; none is left running."""
    for old in (*folder.glob("*.json"), *folder.glob("*.at")):
        remove(old)
    own = "The process without ranks" if ranks == 1 else "Rank {}"
    deadline = time.monotonic() + job.timeout_s
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # of how the others are ended
    context = start_processes(
        _process, (main, job, folder), nprocs=ranks, join=False, daemon=True, start_method="spawn"
    )
    assert context is not None
    try:
        while not context.join(POLL_S):
            if time.monotonic() > deadline:
                raise Failure(_late(folder, ranks, own, job.timeout_s))
    except (ProcessExitedException, ProcessRaisedException) as ended:
        raise _reason(folder, own, ended) from None
    finally:
        for process in cast("Sequence[BaseProcess]", context.processes):
            process.kill()
            process.join()
    return [msgspec.json.decode(read_bytes(folder / f"{rank}.json"), type=RankReport) for rank in range(ranks)]


def _late(folder: Path, ranks: int, own: str, timeout_s: float) -> str:
    at = {rank: folder / f"{rank}.at" for rank in range(ranks) if not exists(folder / f"{rank}.json")}
    places = [f"{own.format(rank)}: {read_text(path) if exists(path) else 'start'}." for rank, path in at.items()]
    return f"Not done after {timeout_s:g} s (--timeout). {' '.join(places)}"


def _reason(folder: Path, own: str, ended: ProcessExitedException | ProcessRaisedException) -> Failure | UsageError:
    """What the first that failed has left; the others fail because of it."""
    left = {path: msgspec.json.decode(read_bytes(path), type=_Ended) for path in folder.glob("*.failed")}
    if not left:
        signal = getattr(ended, "signal_name", None)
        how = f"was ended by {signal}; memory may have been short" if signal else f"ended: {ended}"
        return Failure(f"{own.format(ended.error_index)} {how}.")
    path, first = min(left.items(), key=lambda item: item[1].when)
    if first.usage:
        return UsageError(first.text)
    return Failure(f"{own.format(path.stem)} failed:\n{first.text}")


def _process(rank: int, main: Callable[[int, Job, Path], RankReport], job: Job, folder: Path) -> None:
    """One process from beginning to end; it leaves a report, or the reason why there is none."""
    for name in ("torch.distributed.tensor", "torch.distributed.fsdp"):
        logging.getLogger(name).setLevel(logging.ERROR)  # how weights are put together here is none of the user's care
    os.dup2(2, 1)  # what the user's code prints is no result of the command
    if rank:
        warnings.simplefilter("ignore")  # the first rank says the same
    if job.model is None:  # of whose outputs none is written to
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    torch.set_num_threads(job.threads)
    code = 0
    try:
        write_whole(folder / f"{rank}.json", msgspec.json.encode(main(rank, job, folder)))
    except BaseException as error:  # noqa: BLE001 - who started this process reads it
        usage = isinstance(error, UsageError)
        text = str(error) if usage else _told(error)
        write_whole(folder / f"{rank}.failed", msgspec.json.encode(_Ended(time.time_ns(), text, usage)))
        code = 1
    sys.stderr.flush()
    os._exit(code)  # objects that hold a process group are not taken apart, which now and then aborts after gloo's end


def _told(error: BaseException) -> str:
    lines = "".join(traceback.format_exception(error, limit=-6)).strip().splitlines()
    return "\n".join(line if len(line) <= LONGEST else f"{line[:LONGEST]} [...]" for line in lines)


# --- training


def _made(job: Job, device: torch.device) -> Brought:
    """Model and batches of a process."""
    torch.manual_seed(job.seed)
    made = _small_gpt(job) if job.model is None else brought(job.model, batches=job.steps)
    refuse_chance(job.model or "", made.model)
    return made.to(device, float64=job.float64)


def _small_gpt(job: Job) -> Brought:
    """A transformer of two blocks of width 64, and random tokens."""
    model = GPT(GPTConfig(vocabulary=64, layers=2, width=64, head_size=16))
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():  # so that all have gradients from the first step on
            nn.init.normal_(parameter, std=parameter.size(1) ** -0.5)
    batches = [torch.randint(64, (2 * job.layout.data, 17), device="cpu") for _ in range(job.steps)]
    return Brought(model, _next_token, batches, _divided)


def _next_token(model: nn.Module, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def _divided(model: nn.Module, mesh: Any) -> None:
    """Over the ranks of `tp`: tables by rows, attention by heads, the MLP by its middle, norms by the sequence."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    whole = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
    norm, into, back = (
        SequenceParallel(use_local_output=True),
        ColwiseParallel(),
        RowwiseParallel(output_layouts=Shard(1)),
    )
    styles: dict[str, Any] = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "embedding_norm": norm,
        "blocks.*.attention_norm": norm,
        "blocks.*.mlp_norm": norm,
        "norm": norm,
        "blocks.*.attention": whole,
        "blocks.*.mlp": whole,
        **{f"blocks.*.{name}": into for name in ("attention.query", "attention.key", "attention.value", "mlp.up")},
        **{f"blocks.*.{name}": back for name in ("attention.proj", "mlp.proj")},
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    parallelize_module(model, mesh["tp"], styles)


def _train_alone(_: int, job: Job, folder: Path) -> RankReport:
    device = torch.device(job.device)
    example = _made(job, device)
    begun = example.fingerprint()
    trained = _train(job, example, example.model, folder / "0.at", lambda batch: batch)
    weights = {name: weight.detach().cpu() for name, weight in example.model.named_parameters()}
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise Failure(f"{name} is not finite after {job.steps} steps of one process. Lower its rate: --set lr=...")
    torch.save(weights, folder / "weights.pt")
    example = _made(job, device)
    with torch.no_grad():
        for parameter in example.model.parameters():
            signs = torch.randint(0, 2, parameter.shape, device="cpu").to(parameter) * 2 - 1
            parameter.mul_(1 + torch.finfo(parameter.dtype).eps * signs)
    _train(job, example, example.model, folder / "0.at", lambda batch: batch)
    rounding, where = _deviation(example.model, weights)
    return msgspec.structs.replace(trained, weights=begun, deviation=_finite(rounding), parameter=where)


def _train_rank(rank: int, job: Job, folder: Path) -> RankReport:
    from torch.distributed.device_mesh import init_device_mesh

    layout, device = job.layout, torch.device(f"cuda:{rank}" if job.device == "cuda" else "cpu")
    if job.device == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if job.device == "cuda" else "gloo",
        init_method=f"file://{folder}/met",
        rank=rank,
        world_size=layout.ranks,
        timeout=timedelta(seconds=job.timeout_s),
    )
    mesh = init_device_mesh(job.device, tuple(layout.axes.values()), mesh_dim_names=tuple(layout.axes))
    example = _made(job, device)
    begun = example.fingerprint()
    model = _laid_out(job, example, mesh)
    part = rank // layout.axes.get("tp", 1)
    sharing = partial(share, job.model or "", part=part, parts=layout.data)
    trained = _train(job, example, model, folder / f"{rank}.at", sharing)
    worst, where = _deviation(example.model, torch.load(folder / "weights.pt", weights_only=True))
    dist.barrier()
    return msgspec.structs.replace(trained, rank=rank, weights=begun, deviation=_finite(worst), parameter=where)


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _laid_out(job: Job, example: Brought, mesh: Any) -> nn.Module:
    """The model over the ranks: first what the function brings, then copies or shards."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    model, axes = example.model, job.layout.axes
    if "tp" in axes or "ep" in axes:
        if example.parallelize is None:
            axis = "tp" if "tp" in axes else "ep"
            raise UsageError(
                f"--mesh with {axis}: only the model's author knows which layers are divided. Return "
                f"(module, loss, batches, parallelize); parallelize(module, mesh) is called on every rank, and "
                f'mesh["{axis}"] is what parallelize_module or distribute_tensor take.'
            )
        example.parallelize(model, mesh)
    if [*axes] == ["replicate"]:
        return DistributedDataParallel(model, find_unused_parameters=True)
    if [*axes] == ["tp"]:
        return model
    outer = tuple(axis for axis in axes if axis != "tp")
    data = mesh[outer[0] if len(outer) == 1 else outer]
    experts: set[nn.Parameter] = set()
    for name, module in model.named_modules() if "ep" in axes else ():
        own = [*module.parameters(recurse=False)]
        divided = [parameter for parameter in own if is_sharded(parameter)]
        if divided and "shard" in axes:  # along which ranks keep shards of the same experts
            if len(divided) < len(own):
                raise UsageError(
                    f"--mesh with ep and fsdp: {name!r} holds experts and plain parameters, which are sharded over "
                    "other ranks than these. Give the experts a module of their own, or leave fsdp out."
                )
            fully_shard(module, mesh=mesh["shard"])
        experts |= set() if "shard" in axes else {*divided}
    for unit in (*blocks_of(model), model):
        fully_shard(unit, mesh=data, ignored_params=experts)
    return model


def _train(job: Job, example: Brought, model: nn.Module, at: Path, own: Callable[[Any], Any]) -> RankReport:
    """The loop of both."""
    optimizer = cast("SteepestDescent", build_optimizer(job.method, model, check_options(job.method, job.options)))
    if example.loss is None:
        _refuse_needs(job, optimizer)
    times: list[float] = []
    sent: list[int] = []
    agreed: list[int] = []
    loss: Tensor | None = None
    for step in range(job.steps):
        write_whole(at, f"step {step + 1}")
        if example.loss is None:
            _draw(job, example.model, step)
            loss = torch.tensor(10.0, device="cpu")  # of which methods without a use for it make none
        else:
            loss = example.loss(model, own(example.batches[step % len(example.batches)]))
            _check_loss(job, loss)
            loss.backward()
        if dist.is_initialized():
            dist.barrier()
        times.append(clocked(partial(optimizer.step, loss=loss), device=job.device))
        sent.append(optimizer.sharing.sent_bytes)
        agreed.append(optimizer.sharing.agreed_bytes)
        optimizer.zero_grad()
    sharing = optimizer.sharing
    rank = dist.get_rank() if dist.is_initialized() else 0
    return RankReport(
        rank=rank,
        weights="",
        loss=None if loss is None else loss.item(),
        step_s=median(times[1:] or times),
        sent_bytes=fmean(sent),
        most_bytes=max(sent),
        agreed_bytes=fmean(agreed),
        flops=sharing.flops[rank if sharing.ranks > 1 else 0],
        orthogonalised=sharing.orthogonalised,
        imbalance=sharing.imbalance,
    )


def _refuse_needs(job: Job, optimizer: SteepestDescent) -> None:
    if any(isinstance(stage, InputMoments) for stage in optimizer.stages):
        raise UsageError(
            f"--method {job.method} looks at layer inputs, and --model {job.model} returned a module alone, for which "
            "gradients are drawn. Return (module, loss, batches)."
        )


def _check_loss(job: Job, loss: Any) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise UsageError(
            f"--model {job.model}: loss(module, batch) must return one number, a tensor; it returned {got}."
        )


def _draw(job: Job, model: nn.Module, step: int) -> None:
    """The same gradient on all ranks, each of which keeps its part of it."""
    for index, parameter in enumerate(model.parameters()):
        if not parameter.requires_grad:
            continue
        generator = torch.Generator(device="cpu").manual_seed(
            ((job.seed * 1_000_003 + step) * 1_000_003 + index) % 2**63
        )
        whole = torch.randn(parameter.shape, generator=generator, device="cpu").to(parameter.device, parameter.dtype)
        parameter.grad = part_like(whole, parameter)


def _deviation(model: nn.Module, expected: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest over all weights, and where; all ranks take part."""
    worst, where = -1.0, ""
    for name, parameter in model.named_parameters():
        whole: Tensor = cast("Any", parameter).full_tensor() if is_sharded(parameter) else parameter
        ours, theirs = whole.detach().cpu().double(), expected[name].double()
        off, size = (ours - theirs).norm().item(), theirs.norm().item()
        relative = off / size if size else off
        if not relative <= worst:  # NaN, too
            worst, where = (relative if math.isfinite(relative) else math.inf), name
    return max(worst, 0.0), where
