"""A model that a user brings: a function that is named on the command line, and what it returns."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]
from torch.nn.modules.dropout import _DropoutNd  # pyright: ignore[reportPrivateUsage]

from steepest.lab.errors import UsageError

CONTRACT = (
    "a module; or (module, loss, batches), where loss(module, batch) is the mean over a batch, and every tensor of a "
    "batch has its examples in the first dimension; or these and parallelize(module, mesh) as a fourth"
)
Loss = Callable[[nn.Module, Any], Tensor]
Parallelize = Callable[[nn.Module, Any], object]


@dataclass
class Brought:
    """What the function has made.

    Args:
        model: As it is trained.
        loss: Of the model and a batch; None: the function returned a model alone.
        batches: At least one where there is a loss.
        parallelize: Divides the model over a mesh; None: the function returned none.
    """

    model: nn.Module
    loss: Loss | None = None
    batches: list[Any] | tuple[Any, ...] = ()
    parallelize: Parallelize | None = None

    def fingerprint(self) -> str:
        """Hash of all weights and batches."""
        digest = hashlib.sha256()
        for tensor in itertools.chain(self.model.state_dict().values(), *map(leaves, self.batches)):
            if isinstance(tensor, Tensor):
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def to(self, device: torch.device, *, float64: bool) -> Brought:
        """Likewise on a device, and all that is floating-point in float64 if that is asked for."""

        def moved(x: Tensor) -> Tensor:
            return x.to(device, torch.float64) if float64 and x.is_floating_point() else x.to(device)

        model = self.model.double() if float64 else self.model
        batches = [mapped(moved, batch) for batch in self.batches]
        return Brought(model.to(device), self.loss, batches, self.parallelize)


def found_function(target: str) -> Callable[[], Any]:
    """The function that was named; modules of the current directory are found after all others.

    Args:
        target: "package.module:function".

    Raises:
        UsageError: If there is none.
    """
    module, colon, name = target.partition(":")
    if not colon or not module or not name:
        raise UsageError(f"--model {target}: write package.module:function, a function that takes nothing.")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what it prints is no result of a command
            found = importlib.import_module(module)
    except ModuleNotFoundError as missing:
        if missing.name is None or not f"{module}.".startswith(f"{missing.name}."):
            raise
        raise UsageError(f"--model {target}: there is no module {missing.name!r} here or on PYTHONPATH.") from None
    function = getattr(found, name, None)
    if not callable(function):
        raise UsageError(f"--model {target}: {found.__name__} has no function {name!r}.")
    return function


def brought(target: str, *, batches: int) -> Brought:
    """What the function of that name returns.

    Args:
        target: "package.module:function".
        batches: The most that are taken.

    Raises:
        UsageError: If there is no such function, or it returned something else than `CONTRACT` says.
    """
    made = found_function(target)()
    parts: tuple[Any, ...] = made if isinstance(made, tuple) else (made,)
    if len(parts) not in (1, 3, 4) or not isinstance(parts[0], nn.Module) or not all(map(callable, parts[1::2])):
        kinds = ", ".join(type(part).__name__ for part in parts)
        raise UsageError(f"--model {target} returned ({kinds}). It must return {CONTRACT}.")
    if len(parts) == 1:
        return Brought(parts[0])
    given: Any = parts[2]
    taken = list(itertools.islice(cast("Iterable[Any]", given), batches)) if isinstance(given, Iterable) else []
    if not any(True for batch in taken for _ in leaves(batch)):
        raise UsageError(f"--model {target} returned no batches with tensors. It must return {CONTRACT}.")
    return Brought(parts[0], parts[1], taken, *parts[3:])


def refuse_chance(target: str, model: nn.Module) -> None:
    """Refuse what is drawn in a forward pass, or taken of a whole batch: it is not the same on one rank and on many.

    Args:
        target: What was named.
        model: As it is trained.

    Raises:
        UsageError: If there is such a part.
    """
    for name, module in model.named_modules():
        drops = isinstance(module, _DropoutNd) and module.p > 0
        if module.training and (drops or isinstance(module, _BatchNorm)):
            what = "dropout" if drops else "a batch norm"
            raise UsageError(
                f"--model {target}: {name!r} is {what} in training, with which ranks differ from one process by "
                "design. Return the model without it, or after .eval() of that module; the others train on."
            )


def share(target: str, batch: Any, *, part: int, parts: int) -> Any:
    """One of equal parts of a batch.

    Args:
        target: What was named.
        batch: A tensor, or tuples, lists and mappings of tensors and others.
        part: Which, from 0.
        parts: Of how many.

    Raises:
        UsageError: If the batch cannot be divided.
    """
    sizes = sorted({leaf.size(0) for leaf in leaves(batch) if leaf.dim()})
    if len(sizes) != 1 or sizes[0] % parts:
        shown = ", ".join(map(str, sizes)) or "no"
        raise UsageError(
            f"--model {target}: tensors of a batch have {shown} examples in their first dimension. All must have one "
            f"number, a multiple of {parts}, as the ranks share them out."
        )
    own = sizes[0] // parts
    return mapped(lambda x: x[part * own : (part + 1) * own] if x.dim() else x, batch)


def leaves(batch: Any) -> Iterator[Tensor]:
    """Its tensors."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping | tuple | list):
        every: Iterable[Any] = batch.values() if isinstance(batch, Mapping) else batch
        for value in every:
            yield from leaves(value)


def mapped(change: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """A batch of the same form, with other tensors."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {name: mapped(change, value) for name, value in cast("Mapping[Any, Any]", batch).items()}
    if isinstance(batch, tuple | list):
        values = [mapped(change, value) for value in cast("Iterable[Any]", batch)]
        kind = cast("Any", type(batch))
        return kind(*values) if hasattr(kind, "_fields") else kind(values)
    return batch
