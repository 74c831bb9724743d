"""Which part of a tensor this rank keeps: all of a plain one, the box that its placements say of a sharded one."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


def is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor, whose module is not there in every build of torch."""
    return type(tensor) is not Tensor and hasattr(tensor, "device_mesh")


def sharded(tensors: Iterable[Any]) -> list[Any]:
    """Those of some tensors that are sharded."""
    return [tensor for tensor in tensors if is_sharded(tensor)]


def local(tensors: Sequence[Tensor]) -> list[Tensor]:
    """What this rank has of tensors: whole ones, and shards.

    Args:
        tensors: Plain or sharded.

    Returns:
        Plain tensors, without entries where a rank has no part.
    """
    parts: Sequence[Any] = tensors
    return [part.to_local() if is_sharded(part) else part for part in parts]


def laid_out(tensor: Any, like: Any) -> Tensor:
    """A sharded tensor in the same parts as another; all ranks that keep a part take part."""
    return tensor.redistribute(like.device_mesh, like.placements) if is_sharded(like) else tensor


def check_layout(name: str, parameter: Tensor, *, whole: str | None) -> None:
    """Refuse a sharded parameter where ranks would take different steps of it, or none.

    Args:
        name: Of the parameter.
        parameter: Plain or sharded.
        whole: What needs numbers that are known of whole parameters only; None: nothing.

    Raises:
        ValueError: If so.
    """
    if not is_sharded(parameter):
        return
    dtype = parameter.dtype
    if parameter.requires_grad and dtype in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"{name!r} is a sharded DTensor of {dtype}, but sharded parameters must be of float32 or float64. Compute "
            f"in half precision with fully_shard(..., mp_policy=MixedPrecisionPolicy(param_dtype={dtype})) on a model "
            "in float32, or use DistributedDataParallel."
        )
    if whole:
        raise ValueError(
            f"{name!r} is a sharded DTensor, but {whole} needs dual norms, and those are known of whole parameters "
            "only. Use DistributedDataParallel; or constrained descent in the largest of the layers' norms without "
            "Momo, as in Muon, Scion or Adam."
        )
