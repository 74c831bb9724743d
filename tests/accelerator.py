"""An accelerator that is none: tensors that say they are elsewhere, with numbers in the memory of the CPU.

Whatever an accelerator waits for is an error: reading a number, shapes that depend on numbers, and copies between the
processor's memory and the device's. What is done can be taped and played again, as a CUDA graph is: the same operations
on the same memory, without Python.
"""

import contextlib

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")  # the one besides the CPU that torch needs no driver for
aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense.default: "reads a number",
    aten.item.default: "reads a number",
    aten.is_nonzero.default: "reads a truth value",
    aten.equal.default: "reads a truth value",
    aten.nonzero.default: "has a shape that depends on numbers",
    aten.masked_select.default: "has a shape that depends on numbers",
}


class WaitedError(AssertionError):
    """The device would have been waited for."""


class Away(Tensor):
    """On the accelerator; its numbers are `here`."""

    @staticmethod
    def __new__(cls, here):
        return Tensor._make_wrapper_subclass(
            cls,
            here.size(),
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=DEVICE,
        )

    def __init__(self, here):
        self.here = here

    def data_ptr(self):
        return self.here.data_ptr()

    def untyped_storage(self):
        return self.here.untyped_storage()

    def __repr__(self):
        return f"Away({tuple(self.shape)})"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} outside of an Accelerator")


class Accelerator(TorchDispatchMode):
    """Within it, tensors that are `Away` can be worked with."""

    def __init__(self):
        super().__init__()
        self.tape = None
        self.unguarded = False
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        given, _ = tree_flatten((args, kwargs))
        away = [one for one in given if isinstance(one, Away)]
        target = kwargs.get("device")
        on_device = target is not None and torch.device(target).type == DEVICE.type
        if not away and not on_device:
            return func(*args, **kwargs)
        self.operations += 1
        if not self.unguarded:
            self._guard(func, given, away, target, on_device)
        if on_device:
            kwargs["device"] = torch.device("cpu")
        inner = tree_map(lambda one: one.here if isinstance(one, Away) else one, (args, kwargs))
        out = func(*inner[0], **inner[1])
        if self.tape is not None:
            self.tape.append((func, *inner, out))
        if target is not None and not on_device:
            return out
        return tree_map(lambda one: self._wrapped(one, away), out)

    def _guard(self, func, given, away, target, on_device):
        if func in WAITS:
            raise WaitedError(f"{func} {WAITS[func]}")
        elsewhere = [one for one in given if isinstance(one, Tensor) and not isinstance(one, Away)]
        if target is not None and (elsewhere or not on_device):
            raise WaitedError(f"{func} copies between processor and device")
        if func is aten.copy_.default and len(away) < 2:
            raise WaitedError(f"{func} copies between processor and device")
        if any(one.ndim for one in elsewhere):
            raise WaitedError(f"{func} takes a tensor from the processor")

    def _wrapped(self, one, away):
        known = [own for own in away if own.here is one]  # written to in place
        return known[0] if known else Away(one) if isinstance(one, Tensor) else one

    def put(self, tensor):
        """A tensor on the accelerator."""
        return Away(tensor.detach().clone())

    @contextlib.contextmanager
    def taped(self):
        """A tape of what is done within."""
        self.tape = tape = []
        try:
            yield tape
        finally:
            self.tape = None


def play(tape):
    """Do again what is on a tape, on the same memory."""
    for func, args, kwargs, before in tape:
        again = func(*args, **kwargs)
        shared = [returned.alias_info is not None for returned in func._schema.returns]
        pairs = zip(tree_flatten(before)[0], tree_flatten(again)[0], strict=True)
        if any(shared):
            continue
        for old, new in pairs:
            if isinstance(old, Tensor):
                old.copy_(new)
