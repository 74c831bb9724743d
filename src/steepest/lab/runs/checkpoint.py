"""Checkpoints: written at once, checked byte by byte when read, and loaded without running code from the file.

What one must say to be that of a run at its step is checked, too: it may have been put in place of ours.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import warnings
import zipfile
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import msgspec
import torch
from msgspec import Meta
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from steepest.lab.disk.fields import Count, Seconds
from steepest.lab.disk.files import RecordError, one_line, open_to_read, write_whole
from steepest.lab.errors import Failure
from steepest.lab.runs.records import Final
from steepest.lab.runs.schedule import SMOOTHED
from steepest.lab.tasks.held_out import Evaluation
from steepest.lab.tasks.order import ExampleOrder

_REMEDY = "Delete this file and repeat the command: the run starts again from step 0, nothing else is lost."


class CheckpointError(Failure, RuntimeError):
    """A checkpoint cannot be used; the text says why and what to do."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(one_line(f"{path}: the checkpoint cannot be used ({problem}). {_REMEDY}"))


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Replace the checkpoint at once, on disk before this returns.

    Args:
        path: The file.
        state: Tensors, numbers, strings, and lists and dicts of them.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_whole(path, buffer.getvalue(), durable=True)


def load_checkpoint(path: Path, *, keys: set[str]) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, onto the CPU.

    Args:
        path: The file.
        keys: What must be in it, no more and no less.

    Raises:
        CheckpointError: If the file is damaged, would run code, or holds something else.
    """
    try:
        with open_to_read(path, remedy=_REMEDY, most=None) as file:
            with zipfile.ZipFile(file) as archive:
                _check_sizes(path, archive, os.fstat(file.fileno()).st_size)
                damaged = archive.testzip()  # torch.load itself does not look at the checksums
            if damaged is not None:
                raise CheckpointError(path, f"the checksum of {damaged} is wrong")
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except RecordError as problem:
        raise CheckpointError(path, problem.problem) from None
    except Exception as problem:  # there is no list of what damaged pickles and archives raise
        raise CheckpointError(path, _first_line(problem)) from problem
    if not isinstance(state, dict) or set(state) != keys:
        raise CheckpointError(path, f"it must hold {sorted(keys)}")
    return state


def _check_sizes(path: Path, archive: zipfile.ZipFile, size: int) -> None:
    """Refuse what is packed: a small file may then unfold to any size, and ours are not."""
    entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or sum(e.file_size for e in entries) > size:
        raise CheckpointError(path, "its content is packed, which ours is not")


def _first_line(problem: Exception) -> str:
    return (str(problem).splitlines() or [type(problem).__name__])[0]


MOST_THREADS = 4096
# of a group; what is not among them an optimizer counts itself
_OPTIONS = frozenset(
    (
        "lr",
        "initial_lr",
        "momentum",
        "beta2",
        "betas",
        "eps",
        "weight_decay",
        "nesterov",
        "norm",
        "role",
        "view",
        "ns_coefficients",
        "ns_steps",
        "adjust_lr_fn",
        "dampening",
        "amsgrad",
        "maximize",
    )
)
_LIKE_WEIGHTS = ("exp_avg", "exp_avg_sq", "momentum_buffer", "second_moment")


def finite(weights: Mapping[str, Tensor]) -> bool:
    """Whether every weight is a finite number."""
    return all(bool(torch.isfinite(weight).all()) for weight in weights.values())


class Counters(msgspec.Struct, forbid_unknown_fields=True):
    """What has been done and what it took; seconds go on counting after an interruption."""

    step: Count = 0
    near: bool = False  # the target, by the training loss
    forward_backward_s: Seconds = 0.0
    optimizer_s: Seconds = 0.0
    peak_memory_bytes: Count = 0


class Saved(msgspec.Struct):
    """How far a run is: counters, losses of the last evaluations, threads, and the last evaluations themselves."""

    counters: Counters
    diverged: bool
    losses: Annotated[list[float], Meta(max_length=SMOOTHED)]
    threads: Annotated[int, Meta(ge=1, le=MOST_THREADS)]
    evaluation: Evaluation | None
    final: Final | None


def read_saved(state: Mapping[str, Any], order: ExampleOrder, *, steps: int, batch_size: int) -> Saved:
    """How far the run of a checkpoint is.

    Args:
        state: Of the checkpoint.
        order: Of the run.
        steps: Of the whole run.
        batch_size: Of the run.

    Raises:
        ValueError: If a value is of another type or out of range, or two of them contradict each other.
    """
    try:
        saved = msgspec.convert({name: state[name] for name in Saved.__struct_fields__}, Saved)
    except msgspec.ValidationError as problem:
        raise ValueError(str(problem)) from None
    done, place = saved.counters.step, state["order"]
    seen = place["epoch"] * order.size + place["position"]
    if done > steps or seen != done * batch_size:
        raise ValueError(f"{seen} examples were seen in {done} of {steps} steps of {batch_size}")
    return saved


def check_weights(saved: Mapping[str, Tensor], model: nn.Module) -> None:
    """Check names, types and shapes of weights, and that they are finite, as those of every saved run are.

    Raises:
        ValueError: If one differs; it is named.
    """
    own = model.state_dict()
    if saved.keys() != own.keys():
        raise ValueError(f"the weights {sorted(saved.keys() ^ own.keys())[:3]} are missing or unknown")
    for name, weight in own.items():
        _same_kind(name, saved[name], weight)
    if (lost := next((name for name, weight in saved.items() if not finite({name: weight})), None)) is not None:
        raise ValueError(f"{lost} holds numbers that are not finite, with which no run is saved")


def check_optimizer(
    state: Mapping[str, Any],
    optimizer: Optimizer,
    scheduler: LRScheduler,
    factor: Callable[[int], float],
    *,
    fresh: Mapping[str, Any],
) -> None:
    """Check the optimizer's options against those that the run's config gives it, and its rates against the schedule.

    Args:
        state: Of the checkpoint.
        optimizer: Of the run, fresh.
        scheduler: Likewise.
        factor: What the rate is multiplied by at a step.
        fresh: The state dict of the optimizer, for which ranks may have to meet.

    Raises:
        ValueError: If an option, a rate, or the type or shape of an average is another one.
    """
    planned, step = state["scheduler"], state["counters"]["step"]
    at = planned["last_epoch"]
    if at not in ({step, step - 1} if state["diverged"] else {step}):
        raise ValueError(f"last_epoch is {at!r}")
    if planned["base_lrs"] != scheduler.base_lrs:
        raise ValueError(f"the learning rates are {planned['base_lrs']}, the config says {scheduler.base_lrs}")
    given, parts = _parts(state["optimizer"]), _parts(fresh)
    groups = [group for part in given for group in part["param_groups"]]
    own = [group for part in parts for group in part["param_groups"]]
    if len(given) != len(parts) or len(groups) != len(own):
        raise ValueError(f"it has {len(groups)} parameter groups, the run has {len(own)}")
    for number, (group, expected) in enumerate(zip(groups, own, strict=True)):
        _check_group(number, group, {**expected, "lr": scheduler.base_lrs[number] * factor(at)})
    for part, live in zip(given, _optimizers(optimizer), strict=True):
        _check_averages(part["state"], [p for group in live.param_groups for p in group["params"]])


def _check_group(number: int, group: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for key in expected.keys() & _OPTIONS:
        if group[key] != expected[key]:
            problem = f"{key} of group {number} is {group[key]!r}, the config and the step make it {expected[key]!r}"
            raise ValueError(problem)


def _check_averages(state: Mapping[int, Mapping[str, Any]], parameters: Sequence[Tensor]) -> None:
    for index, own in state.items():
        if not 0 <= index < len(parameters):
            raise ValueError(f"the optimizer's state is of parameter {index!r}, the run has {len(parameters)}")
        for key in _LIKE_WEIGHTS:
            if own.get(key) is not None:
                _same_kind(f"{key} of parameter {index}", own[key], parameters[index])


def _parts(state: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return list(state["parts"]) if "parts" in state else [state]


def gathered(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Weights and the optimizer's state whole, as one process would save them; all ranks take part.

    Args:
        model: Of this rank, as it keeps it.
        optimizer: Of its parameters.

    Returns:
        "model" and "optimizer", on the CPU; empty ones on other ranks than the first.
    """
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

    parts = _optimizers(optimizer)
    with _no_notices():
        weights = get_model_state_dict(model, options=_whole())
        named = cast("dict[str, Any]", get_optimizer_state_dict(model, parts, options=_whole()))
    if not weights:
        return {"model": {}, "optimizer": {}}
    groups = iter(named["param_groups"])
    states: list[dict[str, Any]] = []
    for part in parts:
        own = list(itertools.islice(groups, len(part.param_groups)))
        places = {name: place for place, name in enumerate(name for group in own for name in group["params"])}
        state = {place: named["state"][name] for name, place in places.items() if name in named["state"]}
        own = [{**group, "params": [places[name] for name in group["params"]]} for group in own]
        states.append({"state": state, "param_groups": own})
    return {"model": weights, "optimizer": {"parts": states} if hasattr(optimizer, "parts") else states[0]}


def parted(model: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Load what `gathered` returned, whatever the ranks keep now; all of them take part.

    Args:
        model: Of this rank, as it keeps it.
        optimizer: Of its parameters.
        state: As `gathered` returned it, on the first rank; of others it is not looked at.
    """
    from torch.distributed.checkpoint.state_dict import set_model_state_dict, set_optimizer_state_dict

    parts = _optimizers(optimizer)
    named: dict[str, Any] = {}
    if state:
        names = {parameter: name.removeprefix("module.") for name, parameter in model.named_parameters()}
        named = {"state": {}, "param_groups": []}
        for part, saved in zip(parts, _parts(state["optimizer"]), strict=True):
            own = [names[parameter] for group in part.param_groups for parameter in group["params"]]
            named["state"] |= {own[place]: entries for place, entries in saved["state"].items()}
            for group in saved["param_groups"]:
                named["param_groups"].append({**group, "params": [own[place] for place in group["params"]]})
    with _no_notices():
        set_model_state_dict(model, dict(state.get("model", {})), options=_whole(sent=True))
        set_optimizer_state_dict(model, parts, named, options=_whole(sent=True))


def _whole(*, sent: bool = False) -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(full_state_dict=True, cpu_offload=not sent, broadcast_from_rank0=sent)


@contextlib.contextmanager
def _no_notices() -> Generator[None]:
    """Without what torch's own code says about itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _optimizers(optimizer: Optimizer) -> tuple[Optimizer, ...]:
    return getattr(optimizer, "parts", (optimizer,))


def _same_kind(name: str, saved: object, own: Tensor) -> None:
    if not isinstance(saved, Tensor) or (saved.dtype, saved.shape) != (own.dtype, own.shape):
        found = (saved.dtype, tuple(saved.shape)) if isinstance(saved, Tensor) else type(saved).__name__
        raise ValueError(f"{name} is {found}, the run has {own.dtype, tuple(own.shape)}")
