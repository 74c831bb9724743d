"""What objects that stand beside an optimizer do with weights: lend them other numbers for a while, and load their own.

What is lent comes back bit for bit, so that nothing that looks at weights, such as Momo, finds that somebody was there.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from steepest.checks import number, refusal, whole
from steepest.names import near_miss
from steepest.ranks import laid_out, local

MOST = 2**53  # steps, so that their number is exact
Contents = Tensor | Callable[[Tensor], Tensor]


def count(name: str, value: object) -> int:
    """Check for a number of steps.

    Args:
        name: Of the option.
        value: What was given.

    Raises:
        ValueError: If it is below 0 or very large.
        TypeError: If it is no whole number.
    """
    found: int = whole(0)(name, value)
    if found >= MOST:
        raise ValueError(refusal(name, "below 2^53", value))
    return found


@contextmanager
def lent(who: str, weights: Sequence[Tensor], contents: Sequence[Contents], model: nn.Module | None) -> Generator[None]:
    """Within it weights hold something else; afterwards, also after an error, what they held, bit for bit.

    Args:
        who: Lends, for the message.
        weights: What this rank keeps of them.
        contents: For each a tensor that changes places with it, or a function of the weight, which is then copied.
        model: Of the weights, if it is known.

    Raises:
        RuntimeError: If somebody wrote to the weights inside.
    """
    undo: list[tuple[Tensor, Tensor, bool]] = []  # weight, where its bits are, whether those of the other are in it
    written = False
    give_back(model)
    try:
        with torch.no_grad():
            for weight, other in zip(weights, contents, strict=True):
                own = weight.clone()
                if isinstance(other, Tensor):
                    undo.append((weight, other, True))
                    _exchange_(weight, other, own)
                else:
                    undo.append((weight, own, False))
                    weight.copy_(other(own))
        versions = [weight._version for weight in weights]
        yield
        written = versions != [weight._version for weight in weights]
    finally:
        with torch.no_grad():
            for weight, bits, exchanged in undo:
                if exchanged:
                    _exchange_(weight, bits, weight.clone())
                else:
                    weight.copy_(bits)
        give_back(model)
    if written:
        raise RuntimeError(
            f"{who}: weights were written to inside, where they are not those of the training: what was written is "
            "lost, or in an average. Evaluate and save there, and train outside."
        )


def _exchange_(one: Tensor, other: Tensor, copy_of_one: Tensor) -> None:
    try:
        one.copy_(other)
    finally:  # also when Ctrl-C comes in between
        other.copy_(copy_of_one)


def give_back(model: nn.Module | None) -> None:
    """Let FSDP2 forget whole weights that it has gathered, which are not written to here.

    Args:
        model: Any; None: it is not known.
    """
    for module in model.modules() if model is not None else ():
        if any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__):
            cast(Any, module).reshard()


def checked_state(who: str, state: object, keys: Sequence[str], averages: Mapping[str, Tensor]) -> dict[str, Any]:
    """Refuse a state that is not that of these parameters.

    Args:
        who: Loads, for messages.
        state: What its `state_dict` returned, with at least "steps" and "averages".
        keys: That it must have, in order.
        averages: By names of parameters, as they are here.

    Returns:
        The state.

    Raises:
        ValueError: If a key, name or shape differs, or a number is out of range.
        TypeError: If something is of the wrong type.
    """
    if not isinstance(state, Mapping):
        raise TypeError(refusal(f"{who}: state_dict", "what state_dict() returned", state))
    found = dict(cast(Mapping[str, Any], state))
    if sorted(found) != sorted(keys):
        raise ValueError(f"{who}: a state has {', '.join(keys)}, got {', '.join(map(str, found)) or 'nothing'}.")
    found["steps"] = count(f"{who}: state_dict: steps", found["steps"])
    if not isinstance(found["averages"], Mapping):
        raise TypeError(refusal(f"{who}: state_dict: averages", "a mapping from names to tensors", found["averages"]))
    saved = cast(Mapping[str, object], found["averages"])
    for name in (*averages, *saved):
        if name not in saved or name not in averages:
            where, others = ("state", list(saved)) if name not in saved else ("model", list(averages))
            raise ValueError(f"{who}: the {where} has no parameter {name!r}.{near_miss(name, others)}")
    for name, average in averages.items():
        value = saved[name]
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError(refusal(f"{who}: average of {name!r}", "a tensor of real floating point", value))
        if value.shape != average.shape:
            raise ValueError(
                f"{who}: the average of {name!r} has shape {tuple(value.shape)} in the state, and "
                f"{tuple(average.shape)} here. Load the state of a training of the same model."
            )
    return found


def checked_number(name: str, value: object) -> float:
    """Check for a number that is at least 0, or a tensor with one.

    Args:
        name: Of what.
        value: What came.

    Raises:
        ValueError: If it is below 0 or not finite.
        TypeError: If it is no number.
    """
    return number()(name, value.item() if isinstance(value, Tensor) and value.numel() == 1 else value)


def load_averages(averages: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Write what was saved, on these ranks or others, into tensors.

    Args:
        averages: Written to, by name.
        saved: As `checked_state` found it.
    """
    for name, average in averages.items():
        local([average])[0].copy_(local([laid_out(saved[name].detach(), average)])[0])
