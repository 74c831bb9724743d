"""What the optimizer keeps per parameter: names, shapes and types, in one place.

step              0-d, number of gradients averaged so far
momentum_buffer   like the parameter, float32 or wider: average of gradients
second_moment     like the parameter, float32 or wider: average of squared gradients, for norms that adapt
"""

from collections.abc import Mapping

import torch
from torch import Tensor

STEP, MOMENTUM, SECOND = "step", "momentum_buffer", "second_moment"


def state_dtype(parameter: Tensor) -> torch.dtype:
    """float64 for float64 parameters, else float32: an average in half precision stops moving."""
    return torch.promote_types(parameter.dtype, torch.float32)


def ensure_state(state: dict[str, Tensor], parameter: Tensor, *, adapts: bool) -> None:
    """Allocate what is missing, as zeros.

    Args:
        state: Of the parameter, written to.
        parameter: Any shape.
        adapts: Whether the group's norm needs the second moment.
    """
    dtype = state_dtype(parameter)
    if STEP not in state:
        state[STEP] = torch.zeros((), dtype=dtype, device=parameter.device)
    if MOMENTUM not in state:
        state[MOMENTUM] = torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format)
    if adapts and SECOND not in state:
        state[SECOND] = torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format)


def restored(saved: Mapping[str, object], parameter: Tensor, *, name: str) -> dict[str, object]:
    """State of one parameter as it was saved, in its own precision on the parameter's device.

    torch's own loading casts every floating-point tensor to the parameter's dtype, which would round float32 moments
    of a bfloat16 model.

    Args:
        saved: Entries of a state dict for this parameter.
        parameter: The parameter.
        name: For the message.

    Returns:
        New tensors; entries that are no tensors are passed on.

    Raises:
        ValueError: If a saved tensor has another shape than the parameter.
    """
    result: dict[str, object] = {}
    for key, value in saved.items():
        if not isinstance(value, Tensor):
            result[key] = value
            continue
        expected = torch.Size(()) if key == STEP else parameter.shape
        if key in (STEP, MOMENTUM, SECOND) and value.shape != expected:
            raise ValueError(
                f"The state {key!r} of {name!r} has shape {tuple(value.shape)}, but {tuple(expected)} is needed. "
                "The checkpoint is of another model or of another order of parameters."
            )
        result[key] = value.detach().to(device=parameter.device, dtype=state_dtype(parameter), copy=True)
    return result
