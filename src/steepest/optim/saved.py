"""Whether a state dict can be gone on from: all of it is looked at before anything changes."""

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, cast

import torch
from torch import Tensor

from steepest.geometry import Norm
from steepest.geometry.text import text_of
from steepest.optim.groups import Group, plain
from steepest.optim.options import (
    FOREIGN_KEYS,
    GROUP_KEYS,
    INPUT_OPTIONS,
    INPUT_STEPS,
    METHOD,
    STEPS_TAKEN,
    check_group,
)
from steepest.optim.state import DUAL, MOMENTUM, SECOND, STEP, input_entry
from steepest.optim.step_size import MODEL_KEYS

DAMAGED = "The checkpoint is damaged: use another one, or start with fresh state instead."
# What tells whose a state is, where it is not ours.
PEERS = {
    "ns_coefficients": "torch.optim.Muon",
    "use_muon": "Muon of KellerJordan/Muon",
    "dampening": "torch.optim.SGD",
    "amsgrad": "torch.optim's Adam or AdamW",
}
COUNTS = ("skipped_steps", STEPS_TAKEN, INPUT_STEPS, "momo_steps", "momo_calls")
CHECKED = {*GROUP_KEYS, *FOREIGN_KEYS} - {"params", "norm", "view", "name", "betas", "param_names", "role", METHOD}
RATES = ("initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum")  # of schedulers
NUMBERS = ("lr", "momentum", "weight_decay", "beta2")  # may be tensors while training

QUOTES = "'\""

Shapes = Mapping[str, torch.Size]


def check_saved(
    saved: Any,
    groups: Sequence[Group],
    norms: Sequence[Norm],
    names: Sequence[str],
    others: Callable[[Tensor], Shapes],
) -> None:
    """Refuse a state dict that does not belong to these groups or holds what cannot be, before anything of it is used.

    Args:
        saved: The state dict.
        groups: Of the optimizer.
        norms: Of the groups.
        names: Of its parameters, in order.
        others: Entries that a parameter may have besides our own, with their shapes.

    Raises:
        ValueError: If a number of groups or parameters, a role, a kind of norm, a key, a shape or a value is wrong, or
            the state is of another optimizer.
        TypeError: If something is of the wrong type.
    """
    given, states = _parts(saved)
    indices = _indices(given, groups)
    _refuse_foreign(given, states)
    for place, (old, group, norm) in enumerate(zip(given, groups, norms, strict=True)):
        _check_kind(place, old, group, norm)
        _check_numbers(place, old, group)
    if strange := [index for index in states if index not in set(indices)]:
        raise ValueError(f"The state has an entry for {strange[0]!r}, which is in no parameter group. {DAMAGED}")
    members = [parameter for group in groups for parameter in group["params"]]
    adapts = [norm.adapts for group, norm in zip(groups, norms, strict=True) for _ in group["params"]]
    for index, parameter, name, own in zip(indices, members, names, adapts, strict=True):
        _check_state(states.get(index, {}), parameter, name, others(parameter), adapts=own)


def check_mapping(saved: object) -> None:
    """Refuse what is no state dict.

    Raises:
        TypeError: If it is no dictionary.
    """
    if not isinstance(saved, dict):
        raise TypeError(f"load_state_dict takes what state_dict() returned, a dictionary, got {_short(saved)}.")


def _parts(saved: Any) -> tuple[list[dict[str, Any]], Mapping[Any, Any]]:
    check_mapping(saved)
    for key, kind, what in (("param_groups", (list, tuple), "a list"), ("state", Mapping, "a dictionary")):
        if key not in saved:
            inner = [k for k, v in saved.items() if isinstance(v, Mapping) and {"state", "param_groups"} <= v.keys()]
            place = f", here the entry {inner[0]!r}" if inner else ""
            raise ValueError(
                f"The state dict has no {key!r}; it has {', '.join(map(_short, saved)) or 'nothing'}. Pass what the "
                f"optimizer's state_dict() returned{place}."
            )
        if not isinstance(saved[key], kind):
            raise TypeError(f"{key!r} of the state dict must be {what}, got {_short(saved[key])}. {DAMAGED}")
    for place, group in enumerate(cast(Sequence[object], saved["param_groups"])):
        if not isinstance(group, dict) or not isinstance(cast(Group, group).get("params"), list | tuple):
            raise TypeError(
                f"Parameter group {place} of the state must be a dictionary with a list 'params', got {_short(group)}. "
                f"{DAMAGED}"
            )
    return saved["param_groups"], saved["state"]


def _indices(given: Sequence[Group], groups: Sequence[Group]) -> list[Any]:
    """What the state calls the parameters, in order."""
    counts = [len(group["params"]) for group in given], [len(group["params"]) for group in groups]
    if len(given) != len(groups) or counts[0] != counts[1]:
        what = "parameter groups" if len(given) != len(groups) else "parameters in its groups"
        raise ValueError(
            f"The state has a different number of {what} than the optimizer: groups of {counts[0]} parameters, here "
            f"{counts[1]}. Build the optimizer as it was built when the state was saved."
        )
    indices = [index for group in given for index in group["params"]]
    seen: set[int | str] = set()
    for index in indices:
        if isinstance(index, bool) or not isinstance(index, int | str) or index in seen:
            raise ValueError(f"The state calls a parameter {_short(index)}, which is no name of one alone. {DAMAGED}")
        seen.add(index)
    return indices


def _refuse_foreign(given: Sequence[Group], states: Mapping[Any, Any]) -> None:
    """Refuse the state of another library's optimizer, and say whose it is."""
    if not given or any("role" in group for group in given):
        return
    keys = {key: None for group in given for key in group if key != "params"}
    whose = next((peer for key, peer in PEERS.items() if key in keys), "another optimizer")
    entries = {key: None for state in states.values() if isinstance(state, Mapping) for key in cast(Group, state)}
    unknown = next((key for key in entries if key not in (STEP, MOMENTUM, SECOND, DUAL)), None)
    found = (
        f"has the entry {unknown!r}, which is of another optimizer"
        if unknown is not None
        else "is of another optimizer: its groups have no 'role' and no 'norm'"
    )
    raise ValueError(
        f"The state {found} (it looks like that of {whose}; groups with {', '.join(map(_short, keys)) or 'nothing'}). "
        "Its averages, counts and rates mean something else here. Build this optimizer with rates of its own and start "
        "with fresh state instead; averages fill again within about 1 / (1 - momentum) steps."
    )


def _check_kind(place: int, old: Group, group: Group, norm: Norm) -> None:
    here = kind_of(text_of(norm))
    for what, there, own in (
        ("role", old.get("role"), group["role"]),
        ("norm", kind_of(str(old.get("norm", here))), here),
    ):
        if there not in (None, own):
            raise ValueError(
                f"Parameter group {place} was saved with the {what} {there!r} but has {own!r} here. Build the "
                "optimizer as it was built when the state was saved."
            )
    if (there := old.get(METHOD, group[METHOD])) != group[METHOD]:
        raise ValueError(
            f"The state is of another method, {_short(there).strip(QUOTES)}, whose learning rates mean something else; "
            f"here it is {group[METHOD]}. Build the optimizer as it was built when the state was saved. To go on with "
            "its averages alone, under the options of this one, load "
            "{**state, 'param_groups': optimizer.state_dict()['param_groups']}."
        )


def kind_of(text: str) -> str:
    """The class that a norm's text names, without its options; of a scaled norm, that of the norm within, too."""
    name, _, options = text.partition("(")
    name = name.rpartition(".")[2]  # of a class within another
    return f"{name}({kind_of(options.removeprefix('norm='))})" if name == "Scaled" else name


def _check_numbers(place: int, old: Group, group: Group) -> None:
    """Every option of a saved group, by the checks that hold when an optimizer is built."""
    where = f"parameter group {place} of the state"
    options = {key: plain(value, f"{where}: {key}") for key, value in old.items() if key in CHECKED}
    for key in NUMBERS:  # a tensor is read, wherever it is
        value = options.get(key)
        if isinstance(value, Tensor) and value.ndim == 0 and value.is_floating_point():
            options[key] = value.item()
    own = {key: group[key] for key in (*GROUP_KEYS, *FOREIGN_KEYS) if key in group and key not in MODEL_KEYS}
    try:
        check_group({**own, **options, "view": None}, where=where)
    except (ValueError, TypeError) as problem:
        raise type(problem)(f"{problem} {DAMAGED}") from problem
    for key in RATES:
        number = options.get(key)
        if isinstance(number, Real) and not 0 <= float(number) < math.inf:
            raise ValueError(f"{where}: {key} must be finite and at least 0, got {number!r}. {DAMAGED}")
    for key in COUNTS:
        if key not in MODEL_KEYS and key in options and not _counts(options[key]):
            raise ValueError(f"{where}: {key} must be a whole number of at least 0, got {options[key]!r}. {DAMAGED}")
    if not isinstance(options.get(INPUT_OPTIONS, ""), str | None):
        raise TypeError(f"{where}: {INPUT_OPTIONS} must be a text, got {options[INPUT_OPTIONS]!r}. {DAMAGED}")
    for key in MODEL_KEYS:
        number = options.get(key, 0.0)
        lowest = key == "momo_bound" and number == -math.inf  # of Momo(-inf)
        if not (_finite(number) or lowest) or (key in COUNTS and number < 0) or (key in old) != (MODEL_KEYS[0] in old):
            raise ValueError(
                f"Parameter group {place} was saved with {key}={old.get(key)!r}, but a finite number is needed: the "
                "checkpoint is damaged. Start with fresh state instead."
            )


def _check_state(state: Any, parameter: Tensor, name: str, more: Shapes, *, adapts: bool) -> None:
    """Every entry of one parameter."""
    if not isinstance(state, Mapping):
        raise TypeError(f"The state of {name!r} must be a dictionary, got {_short(state)}. {DAMAGED}")
    for key, value in cast(Mapping[Any, Any], state).items():
        if not isinstance(key, str):
            raise TypeError(f"The state of {name!r} has the entry {_short(key)}, but names are texts. {DAMAGED}")
        if input_entry(key) and not more:
            continue  # moments that nobody reads here; they are dropped
        if key == STEP:
            _check_count(value, name)
        elif key in (MOMENTUM, SECOND, DUAL) or input_entry(key):
            _check_tensor(key, value, parameter, name, more)
        else:  # somebody's own; it comes back as it was put there
            plain(value, f"The entry {key!r} of the state of {name!r}")
    needed = (STEP, MOMENTUM, *((SECOND,) if adapts else ()))
    missing = [key for key in needed if key not in state]
    if missing and any(key in state for key in (STEP, MOMENTUM, SECOND)):
        raise ValueError(
            f"The state of {name!r} has {', '.join(map(repr, state))}, but {missing[0]!r} is missing, without which "
            f"the others mean nothing. {DAMAGED}"
        )


def _check_count(value: Any, name: str) -> None:
    what = f"The state {STEP!r} of {name!r}"
    if isinstance(value, Tensor):
        if value.shape != torch.Size(()):
            raise ValueError(f"{what} has shape {tuple(value.shape)}, but () is needed. {DAMAGED}")
        if value.is_meta:
            return
        value = value.item()
    if not _counts(plain(value, what)):
        raise ValueError(f"{what} is {_short(value)}, but a whole number of at least 0 is needed. {DAMAGED}")


def _check_tensor(key: str, value: Any, parameter: Tensor, name: str, more: Shapes) -> None:
    what = f"The state {key!r} of {name!r}"
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = value.dtype if isinstance(value, Tensor) else _short(value)
        raise TypeError(f"{what} is {kind}, but a tensor of real floating point is needed. {DAMAGED}")
    if key not in more and input_entry(key):
        raise ValueError(f"{what} is not known here; known are {', '.join(more)}. {DAMAGED}")
    shape = value.shape[:1] if key == DUAL else parameter.shape
    expected = more.get(key, shape)
    if value.shape != expected:
        raise ValueError(
            f"{what} has shape {tuple(value.shape)}, but {tuple(expected)} is needed. The checkpoint is of another "
            "model or of another order of parameters."
        )
    local = cast(Tensor, getattr(value, "to_local", lambda: value)())
    if local.is_meta or not local.numel() or key.startswith(("input_sum", "input_leader")):
        return  # which are looked at where they are used
    low, high = (float(end) for end in torch.aminmax(local.detach()))
    if key == SECOND and low >= 0 and high == math.inf:
        return  # a gradient whose square is out of range
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"{what} holds numbers that are not finite. {DAMAGED}")
    if low < 0 and key in (SECOND, DUAL, "input_mass"):
        raise ValueError(f"{what} holds {low:g}, but it cannot be below 0. {DAMAGED}")


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _counts(value: object) -> bool:
    return _finite(value) and cast(float, value) >= 0 and float(cast(float, value)).is_integer()


def _short(value: object) -> str:
    """What was given, for a message."""
    text = repr(value) if isinstance(value, str | int | float | bool | None) else f"a {type(value).__name__}"
    return text if len(text) <= 120 else f"{text[:117]}..."
