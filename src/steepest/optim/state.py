"""What the optimizer keeps of a parameter: one schema, of its own entries and those that its stages declare.

step              number of gradients averaged so far: float32 would stop at 2^24
momentum_buffer   average of gradients; of several the first, the others are momentum_buffer_2, momentum_buffer_3, ...
second_moment     average of squared gradients, for norms that adapt
dual_norm         of the last step, one number per matrix, where duals are stale
radius            Frobenius norm of each matrix in its first step, where it is kept; infinity: of one that was zero
weight_low_bits   of the float32 weight, what does not fit into the bfloat16 one, where it is kept
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steepest.anatomy import PlanRow
from steepest.notices import warn
from steepest.optim.storage import Storage
from steepest.ranks import is_sharded, laid_out, local
from steepest.stages import KNOWN, Entry, Stage
from steepest.stages.stage import state_dtype

STEP, MOMENTUM, SECOND, DUAL = "step", "momentum_buffer", "second_moment", "dual_norm"
LOW, RADIUS = "weight_low_bits", "radius"
FURTHER = re.compile(rf"{MOMENTUM}_\d+")

Schema = Mapping[str, Entry]


def momenta(count: int) -> list[str]:
    """Keys of so many averages of gradients, the first of which has the key that a single one has.

    Examples:
        >>> momenta(3)
        ['momentum_buffer', 'momentum_buffer_2', 'momentum_buffer_3']
    """
    return [MOMENTUM, *(f"{MOMENTUM}_{place}" for place in range(2, count + 1))]


def schema(
    row: PlanRow,
    *,
    adapts: bool,
    stages: Iterable[Stage],
    storage: Storage,
    averages: int = 1,
    radii: int = 0,
) -> Schema:
    """What may be kept of a parameter, by key.

    Args:
        row: Of the plan.
        adapts: Whether the group's norm needs the second moment.
        stages: That work on the group.
        storage: What is kept in 16 bits.
        averages: How many of gradients.
        radii: Of how many matrices the radius is kept.

    Raises:
        ValueError: If a stage declares an entry under a name that is not its own.
    """
    matrices = sum(count for count, _, _ in row.blocks()) or 1
    own = (
        Entry(STEP, torch.Size(()), dtype=torch.int64, least=0.0, divided=False),
        *(Entry(key, dtype=storage.momentum_dtype) for key in momenta(averages)),
        Entry(SECOND, least=0.0, infinite=True, eager=adapts),
        Entry(DUAL, torch.Size((matrices,)), least=0.0, eager=False, divided=False),
    )
    found = {entry.key: entry for entry in own}
    if storage.keeps(row.parameter):
        found[LOW] = Entry(LOW, dtype=torch.int16)
    if radii:
        found[RADIUS] = Entry(RADIUS, torch.Size((radii,)), least=0.0, infinite=True, divided=False)
    for stage in stages:
        for entry in stage.entries(row):
            if not stage.prefix or not entry.key.startswith(stage.prefix) or entry.key in found:
                raise ValueError(
                    f"{stage!r}: the entry {entry.key!r} must begin with the stage's prefix, which is "
                    f"{stage.prefix!r}, and be declared once. Set prefix to a text of its own, such as 'mine_'."
                )
            found[entry.key] = entry
    return found


def allocate(state: dict[str, Tensor], parameter: Tensor, entries: Schema) -> None:
    """Make the entries that are there from the first step on.

    Args:
        state: Of the parameter, written to; what is there stays.
        parameter: Any shape.
        entries: Of the parameter.
    """
    eager = [entry for entry in entries.values() if entry.eager]
    missing = [entry for entry in eager if entry.key not in state]
    if not missing:
        return
    # One without the others means nothing.
    if any(entry.key in (STEP, MOMENTUM) or FURTHER.fullmatch(entry.key) for entry in missing):
        missing = eager
    with torch.inference_mode(False):  # else no later step could write to it
        state.update({entry.key: entry.zeros(parameter) for entry in missing})


def forget_untouched(state: dict[str, Tensor], parameter: Tensor, entries: Schema) -> None:
    """Take out what was made for a parameter that has changed since, if nothing was ever averaged into it.

    Args:
        state: Of the parameter, written to.
        parameter: As it is now.
        entries: Of the parameter as it was, or is.
    """
    momentum, count = state.get(MOMENTUM), state.get(STEP)
    if momentum is None or not isinstance(count, Tensor) or count.is_meta:
        return
    dtype = entries[MOMENTUM].dtype or state_dtype(parameter)
    complete = not _missing_momenta(state, entries) and (SECOND in state or not entries[SECOND].eager)
    here = (momentum.shape, momentum.device, momentum.dtype, complete)
    if here != (parameter.shape, parameter.device, dtype, True) and int(count) == 0:
        for key in entries:
            state.pop(key, None)


def check_state(state: Mapping[str, Tensor], parameter: Tensor, entries: Schema, *, adapts: bool, row: PlanRow) -> None:
    """Refuse a parameter that is not what it was when its state was made, or, before that, when it was routed.

    Args:
        state: Of the parameter.
        parameter: Any shape.
        entries: Of the parameter.
        adapts: Whether the group's norm needs the second moment.
        row: Of the plan.

    Raises:
        ValueError: If the parameter has another shape, dtype or device, or the norm did not adapt then.
    """
    momentum = state.get(MOMENTUM)
    if momentum is None:
        if parameter.shape != torch.Size(row.shape):
            raise ValueError(
                f"{row.name!r} had shape {tuple(row.shape)} when the optimizer was built and has "
                f"{tuple(parameter.shape)} now; build the optimizer after the model has its final shape."
            )
        return
    if momentum.dtype != (entries[MOMENTUM].dtype or state_dtype(parameter)):
        raise ValueError(
            f"{row.name!r} of shape {tuple(parameter.shape)} became {parameter.dtype} after its state was made. "
            "Convert the model first, then build the optimizer and load its state dict."
        )
    if adapts and SECOND not in state:
        raise ValueError("A norm that adapts cannot replace another one after a step; build a new optimizer.")
    if missing := _missing_momenta(state, entries):
        raise ValueError(
            f"The state of {row.name!r} of shape {tuple(parameter.shape)} has no {missing[0]!r}: it is of another "
            "number of averages. Delete optimizer.state[parameter] for a fresh one, or build the optimizer with the "
            "momentum that the state was made with."
        )
    if momentum.shape != parameter.shape or momentum.device != parameter.device:
        raise ValueError(
            f"{row.name!r} has shape {tuple(parameter.shape)} on {parameter.device}, and its state was made for "
            f"{tuple(momentum.shape)} on {momentum.device}. Change the model first, then build the optimizer and load "
            "its state dict."
        )


def _missing_momenta(state: Mapping[str, Tensor], entries: Schema) -> list[str]:
    """Averages of gradients that are not there, besides the first."""
    return [key for key in entries if FURTHER.fullmatch(key) and key not in state]


def check_fits(state: dict[str, Tensor], parameter: Tensor, name: str, entries: Schema) -> None:
    """Refuse a state that was made for another shape, where a parameter was replaced or has grown.

    Args:
        state: Of the parameter; a count that is a number becomes a tensor.
        parameter: Any shape.
        name: Of the parameter, for the message.
        entries: Of the parameter as it is now.

    Raises:
        ValueError: If an entry has another shape, or the count is missing.
    """
    state.pop(DUAL, None)  # of another parameter's last step
    forget_untouched(state, parameter, entries)
    for key, entry in entries.items():
        expected = parameter.shape if entry.shape is None else entry.shape
        if key != STEP and key in state and state[key].shape != expected:
            raise ValueError(
                f"{name!r} has shape {tuple(parameter.shape)}, but its state {key!r} has {tuple(state[key].shape)}: it "
                "was replaced or changed without add_param_group. Change the state alike, or delete "
                "optimizer.state[parameter] for a fresh one."
            )
    if MOMENTUM in state and STEP not in state:
        raise ValueError(
            f"{name!r} came without add_param_group and with a state that has no {STEP!r}, the number of gradients "
            "averaged so far. Set it, or delete optimizer.state[parameter] for a fresh one."
        )
    if STEP in state:
        state[STEP] = torch.as_tensor(state[STEP], dtype=torch.int64, device=parameter.device)


def exchangeable(key: str, value: Any) -> Any:
    """An entry as state dicts hold it: neither gloo nor NCCL sends int16, as torch does to make one state of parts.

    Args:
        key: Of the entry.
        value: The entry.
    """
    return value.to(torch.int32) if key == LOW and isinstance(value, Tensor) else value


def restored(saved: Mapping[str, Any], parameter: Tensor, entries: Schema) -> dict[str, Any]:
    """State of one parameter as it was saved, in its own precision on the parameter's device.

    torch's own loading casts every floating-point tensor to the parameter's dtype, which would round float32 moments
    of a bfloat16 model.

    Args:
        saved: Entries of a state dict for this parameter; the count may be a number.
        parameter: The parameter.
        entries: Of the parameter.

    Returns:
        New tensors.
    """
    state: dict[str, Any] = {}
    for key, value in saved.items():
        dtype = (entries[key].dtype or state_dtype(parameter)) if key in entries else None
        if isinstance(value, Tensor) or dtype is not None:
            tensor = value if isinstance(value, Tensor) else torch.tensor(value, device=parameter.device)
            if key in entries and (is_sharded(parameter) or is_sharded(tensor)):
                tensor = laid_out(tensor.detach(), entries[key].like(parameter))
            device = local([parameter])[0].device
            state[key] = tensor.detach().to(device=device, dtype=dtype, copy=True)
        else:  # somebody's own
            state[key] = value
    return state


def drop_unknown(states: Sequence[tuple[dict[str, Tensor], Schema]], stages: Sequence[Stage]) -> None:
    """Forget entries of stages that do not work here; warns of those that the optimizer was not built with.

    Args:
        states: Of the parameters, as loaded, and what may be kept of each; written to.
        stages: The optimizer's.
    """
    lost = [state.pop(LOW) for state, entries in states if LOW in state and LOW not in entries]
    if lost:
        warn(
            "The state holds the lower bits of bfloat16 weights, which this optimizer does not keep: they are dropped. "
            "Build it with rounding='kept' to go on with them."
        )
    if [state.pop(RADIUS) for state, entries in states if RADIUS in state and RADIUS not in entries]:
        warn(
            "The state holds radii that weights are kept at, which they are not here: they are dropped. Build the "
            "optimizer with weight_decay=Sphere() to go on with them."
        )
    running = {stage.prefix for stage in stages}
    for kind in KNOWN:
        dropped = False
        for state, entries in states:
            for key in [key for key in state if key.startswith(kind.prefix) and key not in entries]:
                del state[key]
                dropped = True
        if dropped and kind.prefix not in running:
            warn(
                f"The state holds {kind.kept}, which this optimizer does not use: they are dropped. Build it with "
                f"{kind.option} to go on with them."
            )
