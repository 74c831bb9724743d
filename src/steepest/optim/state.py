"""What the optimizer keeps per parameter: names, shapes and types, in one place.

step              0-d, int64, number of gradients averaged so far: float32 would stop at 2^24
momentum_buffer   like the parameter, float32 or wider: average of gradients
second_moment     like the parameter, float32 or wider: average of squared gradients, for norms that adapt
dual_norm         one number per matrix, float32 or wider: of the last step, where duals are stale

Moments of layer inputs have keys of their own, see `refresh` and `input_moments`; parameters that share a moment hold
the same tensors.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from steepest.anatomy import PlanRow

STEP, MOMENTUM, SECOND, DUAL = "step", "momentum_buffer", "second_moment", "dual_norm"


def state_dtype(parameter: Tensor) -> torch.dtype:
    """float64 for float64 parameters, else float32: an average in half precision stops moving."""
    return torch.promote_types(parameter.dtype, torch.float32)


def input_entry(key: str) -> bool:
    """Whether an entry is of the moments of layer inputs."""
    return key.startswith("input_")


def check_state(state: Mapping[str, Tensor], parameter: Tensor, *, adapts: bool, row: PlanRow) -> None:
    """Refuse a parameter that is not what it was when its state was made, or, before that, when it was routed.

    Args:
        state: Of the parameter.
        parameter: Any shape.
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
    if momentum.dtype != state_dtype(parameter):
        raise ValueError(
            f"{row.name!r} of shape {tuple(parameter.shape)} became {parameter.dtype} after its state was made. "
            "Convert the model first, then build the optimizer and load its state dict."
        )
    if adapts and SECOND not in state:
        raise ValueError("A norm that adapts cannot replace another one after a step; build a new optimizer.")
    if momentum.shape != parameter.shape or momentum.device != parameter.device:
        raise ValueError(
            f"{row.name!r} has shape {tuple(parameter.shape)} on {parameter.device}, and its state was made for "
            f"{tuple(momentum.shape)} on {momentum.device}. Change the model first, then build the optimizer and load "
            "its state dict."
        )


def ensure_state(state: dict[str, Tensor], parameter: Tensor, *, adapts: bool) -> None:
    """Allocate what is missing, as zeros.

    Args:
        state: Of the parameter, written to.
        parameter: Any shape.
        adapts: Whether the group's norm needs the second moment.
    """
    dtype = state_dtype(parameter)
    if STEP in state and MOMENTUM in state:
        return
    with torch.inference_mode(False):  # else no later step could write to it
        state[STEP] = torch.zeros((), dtype=torch.int64, device=parameter.device)
        state[MOMENTUM] = torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format)
        if adapts:
            state[SECOND] = torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format)


def check_fits(state: dict[str, Tensor], parameter: Tensor, name: str) -> None:
    """Refuse a state that was made for another shape, where a parameter was replaced or has grown.

    Args:
        state: Of the parameter; a count that is a number becomes a tensor.
        parameter: Any shape.
        name: Of the parameter, for the message.

    Raises:
        ValueError: If an entry has another shape, or the count is missing.
    """
    for key in (MOMENTUM, SECOND):
        if key in state and state[key].shape != parameter.shape:
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
    state.pop(DUAL, None)  # of another parameter's last step


def restored(saved: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
    """State of one parameter as it was saved, in its own precision on the parameter's device.

    torch's own loading casts every floating-point tensor to the parameter's dtype, which would round float32 moments
    of a bfloat16 model.

    Args:
        saved: Entries of a state dict for this parameter; the count may be a number.
        parameter: The parameter.

    Returns:
        New tensors.
    """
    device, dtype = parameter.device, state_dtype(parameter)
    state: dict[str, Any] = {}
    for key, value in saved.items():
        if key == STEP:
            count = value if isinstance(value, Tensor) else torch.tensor(value, device=device)
            state[key] = count.detach().to(device=device, dtype=torch.int64, copy=True)
        elif key in (MOMENTUM, SECOND, DUAL) or input_entry(key):
            state[key] = value.detach().to(device=device, dtype=dtype, copy=True)
        else:  # somebody's own
            state[key] = value.detach().to(device=device, copy=True) if isinstance(value, Tensor) else value
    return state
