"""What the optimizer keeps per parameter: names, shapes and types, in one place.

step              0-d, number of gradients averaged so far
momentum_buffer   like the parameter, float32 or wider: average of gradients
second_moment     like the parameter, float32 or wider: average of squared gradients, for norms that adapt
dual_norm         one number per matrix, float32 or wider: of the last step, where duals are stale

Moments of layer inputs have keys of their own, see `refresh` and `input_moments`; parameters that share a moment hold
the same tensors.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steepest.optim.step_size import MODEL_KEYS

STEP, MOMENTUM, SECOND, DUAL = "step", "momentum_buffer", "second_moment", "dual_norm"


def state_dtype(parameter: Tensor) -> torch.dtype:
    """float64 for float64 parameters, else float32: an average in half precision stops moving."""
    return torch.promote_types(parameter.dtype, torch.float32)


def ensure_state(state: dict[str, Tensor], parameter: Tensor, *, adapts: bool) -> None:
    """Allocate what is missing, as zeros.

    Args:
        state: Of the parameter, written to.
        parameter: Any shape.
        adapts: Whether the group's norm needs the second moment.

    Raises:
        ValueError: If the parameter has another dtype than when its state was made, or the norm did not adapt then.
    """
    dtype = state_dtype(parameter)
    if MOMENTUM in state and state[MOMENTUM].dtype != dtype:
        raise ValueError(
            f"A parameter of shape {tuple(parameter.shape)} became {parameter.dtype} after its state was made. Convert "
            "the model first, then build the optimizer and load its state dict."
        )
    if MOMENTUM in state and adapts and SECOND not in state:
        raise ValueError("A norm that adapts cannot replace another one after a step; build a new optimizer.")
    if STEP not in state:
        state[STEP] = torch.zeros((), dtype=dtype, device=parameter.device)
        state[MOMENTUM] = torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format)
        if adapts:
            state[SECOND] = torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format)


def check_saved(
    saved: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    others: Callable[[Tensor], Mapping[str, torch.Size]],
) -> None:
    """Refuse a state dict that does not belong to these groups, before anything of it is used.

    Args:
        saved: The state dict.
        groups: Of the optimizer.
        names: Of its parameters, in order.
        others: Entries that a parameter may have besides those above, with their shapes.

    Raises:
        ValueError: If a role, a kind of norm, a key or a shape does not match. Numbers of groups and parameters are
            left to torch, which compares them.
    """
    for index, (old, group) in enumerate(zip(saved["param_groups"], groups, strict=False)):
        kind = type(group["norm"]).__name__
        for what, there, here in (
            ("role", old.get("role"), group["role"]),
            ("norm", str(old.get("norm", kind)).partition("(")[0], kind),
        ):
            if there not in (None, here):
                raise ValueError(
                    f"Parameter group {index} was saved with the {what} {there!r} but has {here!r} here. Build the "
                    "optimizer as it was built when the state was saved."
                )
        for key in MODEL_KEYS:
            number = old.get(key, 0.0)
            if (
                not isinstance(number, float | int)
                or not math.isfinite(number)
                or (key in old) != (MODEL_KEYS[0] in old)
            ):
                raise ValueError(
                    f"Parameter group {index} was saved with {key}={old.get(key)!r}, but a finite number is needed: "
                    "the checkpoint is damaged. Start with fresh state instead."
                )
    indices = [index for group in saved["param_groups"] for index in group["params"]]
    members = [parameter for group in groups for parameter in group["params"]]
    for index, parameter, name in zip(indices, members, names, strict=False):
        more = others(parameter)
        for key, value in saved["state"].get(index, {}).items():
            if key.startswith("input_") and not more:
                continue  # moments that nobody reads here; they are dropped
            if key not in (STEP, MOMENTUM, SECOND, DUAL, *more):
                known = ", ".join((STEP, MOMENTUM, SECOND, DUAL, *more))
                raise ValueError(
                    f"The state of {name!r} has the entry {key!r}, which is of another optimizer; {known} are known "
                    "here. Start with fresh state instead."
                )
            plain = torch.Size(()) if key == STEP else value.shape[:1] if key == DUAL else parameter.shape
            expected = more.get(key, plain)
            if value.shape != expected:
                raise ValueError(
                    f"The state {key!r} of {name!r} has shape {tuple(value.shape)}, but {tuple(expected)} is needed. "
                    "The checkpoint is of another model or of another order of parameters."
                )


def restored(saved: Mapping[str, Tensor], parameter: Tensor) -> dict[str, Tensor]:
    """State of one parameter as it was saved, in its own precision on the parameter's device.

    torch's own loading casts every floating-point tensor to the parameter's dtype, which would round float32 moments
    of a bfloat16 model.

    Args:
        saved: Entries of a state dict for this parameter.
        parameter: The parameter.

    Returns:
        New tensors.
    """
    device, dtype = parameter.device, state_dtype(parameter)
    return {key: value.detach().to(device=device, dtype=dtype, copy=True) for key, value in saved.items()}
