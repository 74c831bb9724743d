"""Whether a state dict can be gone on from: all of it is looked at before anything changes.

What comes of it is a state dict, too, in which numbers are of the types that steps work with.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from steepest.checks import Check, instance, number, optional, refusal, shown
from steepest.geometry import Norm
from steepest.geometry.text import text_of
from steepest.optim.groups import AVERAGES, Group, averages_of, plain
from steepest.optim.momo.model import FURTHER_KEYS, MODEL_KEYS
from steepest.optim.options import (
    FOREIGN_KEYS,
    GROUP_KEYS,
    METHOD,
    NUMBERS,
    OPTIONS,
    STEPS_TAKEN,
    check_group,
    check_rate,
)
from steepest.optim.state import DUAL, FURTHER, MOMENTUM, SECOND, STEP, Schema
from steepest.ranks import local
from steepest.stages import KNOWN, Entry

DAMAGED = "The checkpoint is damaged: use another one, or start with fresh state instead."
# What tells whose a state is, where it is not ours.
PEERS = {
    "ns_coefficients": "torch.optim.Muon",
    "use_muon": "Muon of KellerJordan/Muon",
    "dampening": "torch.optim.SGD",
    "amsgrad": "torch.optim's Adam or AdamW",
}
STAGE_KEYS = {key: first for kind in KNOWN for key, first in kind.group_keys.items()}
STAGE_COUNTS = [key for key, first in STAGE_KEYS.items() if isinstance(first, int)]
COUNTS = ("skipped_steps", STEPS_TAKEN, *STAGE_COUNTS, "momo_steps", "momo_calls")
CHECKED = {*GROUP_KEYS, *FOREIGN_KEYS} - {"params", "norm", "view", "name", "betas", "param_names", "role", METHOD}
RATES = ("initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum")  # of schedulers
MOST = 2**53  # of what is counted: floats hold all whole numbers up to it
_COUNT, _FINITE = number(0, MOST, up_to=True), number(-math.inf)
# What is not counted of the model of the loss; the bound may be that of Momo(-inf).
_MODEL: Mapping[str, Check] = {
    **dict.fromkeys((*MODEL_KEYS, *FURTHER_KEYS), _FINITE),
    "momo_bound": number(-math.inf, infinite=True),
}
QUOTES = "'\""


def check_saved(
    saved: Any,
    groups: Sequence[Group],
    norms: Sequence[Norm],
    names: Sequence[str],
    schemas: Sequence[Schema],
) -> dict[str, Any]:
    """Refuse a state dict that does not belong to these groups or holds what cannot be, before anything of it is used.

    Args:
        saved: The state dict.
        groups: Of the optimizer.
        norms: Of the groups.
        names: Of its parameters, in order.
        schemas: What may be kept of each of them.

    Returns:
        The state dict, with plain numbers in its groups and counts.

    Raises:
        ValueError: If a number of groups or parameters, a role, a kind of norm, a key, a shape or a value is wrong, or
            the state is of another optimizer.
        TypeError: If something is of the wrong type.
    """
    given, states = _parts(saved)
    indices = _indices(given, groups)
    _refuse_foreign(given, states)
    taken: list[Group] = []
    for place, (old, group, norm) in enumerate(zip(given, groups, norms, strict=True)):
        _check_kind(place, old, group, norm)
        taken.append({**old, **_checked_options(place, old, group)})
    if strange := [index for index in states if index not in set(indices)]:
        raise ValueError(f"The state has an entry for {strange[0]!r}, which is in no parameter group. {DAMAGED}")
    members = [parameter for group in groups for parameter in group["params"]]
    for index, parameter, name, entries in zip(indices, members, names, schemas, strict=True):
        _check_state(states.get(index, {}), parameter, name, entries)
    counted = {index: _with_number(state) for index, state in states.items()}
    return {**saved, "param_groups": taken, "state": counted}


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
    where = f"Parameter group {place} of the state"
    for key in ("role", METHOD):
        instance(str, "a text")(f"{where}: {key}", old.get(key, ""))
    count = len(group["params"])
    told: object = old.get("param_names")
    if told is not None and not (
        isinstance(told, list | tuple) and len(told) == count and all(isinstance(one, str) for one in told)
    ):
        raise TypeError(f"{refusal(f'{where}: param_names', f'a list of {count} texts', told)} {DAMAGED}")
    here = kind_of(text_of(norm))
    for what, there, own in (
        ("role", old.get("role", group["role"]), group["role"]),
        ("norm", kind_of(str(old.get("norm", here))), here),
    ):
        if there != own:
            raise ValueError(
                f"Parameter group {place} was saved with the {what} {there!r} but has {own!r} here. Build the "
                "optimizer as it was built when the state was saved."
            )
    _check_averages(where, old, group)
    if (there := old.get(METHOD, group[METHOD])) != group[METHOD]:
        raise ValueError(
            f"The state is of another method, {_short(there).strip(QUOTES)}, whose learning rates mean something else; "
            f"here it is {group[METHOD]}. Build the optimizer as it was built when the state was saved. To go on with "
            "its averages alone, under the options of this one, load "
            "{**state, 'param_groups': optimizer.state_dict()['param_groups']}."
        )


def _check_averages(where: str, old: Group, group: Group) -> None:
    """Refuse averages that are not those of the group: what was averaged with one β is no average with another.

    The first β is the "momentum", which loads as it was saved; weights are the optimizer's own.
    """
    instance((str, type(None)), "the text of Averages(...)")(f"{where}: {AVERAGES}", old.get(AVERAGES))
    try:
        there = averages_of(old)
    except (ValueError, TypeError) as problem:
        raise ValueError(f"{where}: {AVERAGES} is {_short(old.get(AVERAGES))}. {problem} {DAMAGED}") from problem
    here = averages_of(group)
    found, own = (None if one is None else one.betas[1:] for one in (there, here))
    if found != own:
        told = [f"momentum={one or 'a number'}" for one in (there, here)]
        raise ValueError(
            f"{where} was saved with {told[0]} but has {told[1]} here, whose averages are others. Build the optimizer "
            "as it was built when the state was saved; only weights of averages and the first of betas may differ."
        )


def kind_of(text: str) -> str:
    """The class that a norm's text names, without its options; of a scaled norm, that of the norm within, too."""
    name, _, options = text.partition("(")
    name = name.rpartition(".")[2]  # of a class within another
    return f"{name}({kind_of(options.removeprefix('norm='))})" if name == "Scaled" else name


def _checked_options(place: int, old: Group, group: Group) -> Group:
    """The options of a saved group, by the checks that hold when an optimizer is built; tensors stay what they are."""
    where = f"parameter group {place} of the state"
    options = {key: plain(value, f"{where}: {key}") for key, value in old.items() if key in CHECKED}
    own = {key: group[key] for key in (*GROUP_KEYS, *FOREIGN_KEYS) if key in group and key not in _MODEL}
    checked: Group = {}
    try:
        read = {key: _read(f"{where}: {key}", value) for key, value in options.items()}
        check_group({**own, **read, "view": None}, where=where)
        for key in (*NUMBERS, *RATES):
            if key in read:
                check = OPTIONS[key] if key in OPTIONS else optional(check_rate)
                checked[key] = check(f"{where}: {key}", read[key])
        for key in STAGE_KEYS.keys() - STAGE_COUNTS:
            optional(instance(str, "a text"))(f"{where}: {key}", options.get(key, ""))
    except (ValueError, TypeError) as problem:
        raise type(problem)(f"{problem} {DAMAGED}") from problem
    for key in COUNTS:
        if key not in _MODEL and key in options:
            if (count := _count(options[key])) is None:
                raise ValueError(f"{refusal(f'{where}: {key}', _counted(options[key]), options[key])} {DAMAGED}")
            checked[key] = count
    tensors = {key: options[key].reshape(()) for key in checked if isinstance(options[key], Tensor)}
    further = [key for key in FURTHER_KEYS if key in group]
    return {**checked, **tensors, **_checked_model(place, options, [*MODEL_KEYS, *further])}


def _checked_model(place: int, options: Group, keys: Sequence[str]) -> Group:
    """What a group holds of the model of the loss: all of it, or nothing."""
    checked: Group = {}
    for key in keys if any(key in options for key in MODEL_KEYS) else ():
        value = options.get(key)
        try:
            checked[key] = (_COUNT if key in COUNTS else _MODEL[key])(key, value)
        except (ValueError, TypeError) as problem:
            raise ValueError(
                f"Parameter group {place} was saved with {key}={shown(value)}, but a finite number is needed: the "
                "checkpoint is damaged. Start with fresh state instead."
            ) from problem
    return checked


def _read(what: str, value: object) -> object:
    """The number of a tensor, wherever it is; of anything else, it itself."""
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        return value
    if value.is_meta:
        raise ValueError(f"{what} is a tensor on the meta device, which holds no number.")
    return value.item()


def _count(value: object) -> int | None:
    """A count of any kind of number; None if it is none."""
    try:
        given: float = _COUNT("", value)
    except (ValueError, TypeError):
        return None
    return int(given) if given.is_integer() else None


def _counted(value: object) -> str:
    """What a count must be, for a message about one that is none."""
    above = isinstance(value, int | float) and value > MOST
    return f"a whole number of at {'most 2^53' if above else 'least 0'}"


def _with_number(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """A parameter's state with its count as an integer, or a tensor: torch would make float32 of a float."""
    if STEP not in state or isinstance(state[STEP], Tensor):
        return state
    return {**state, STEP: _count(state[STEP])}


def _check_state(state: Any, parameter: Tensor, name: str, entries: Schema) -> None:
    """Every entry of one parameter."""
    if not isinstance(state, Mapping):
        raise TypeError(f"The state of {name!r} must be a dictionary, got {_short(state)}. {DAMAGED}")
    for key, value in cast(Mapping[Any, Any], state).items():
        if not isinstance(key, str):
            raise TypeError(f"The state of {name!r} has the entry {_short(key)}, but names are texts. {DAMAGED}")
        what = f"The entry {key!r} of the state of {name!r}"
        stage = next((kind for kind in KNOWN if key.startswith(kind.prefix)), None)
        if key == STEP:
            _check_count(value, parameter, name)
        elif key in entries:
            _check_tensor(value, parameter, f"The state {key!r} of {name!r}", entries[key])
        elif FURTHER.fullmatch(key):
            raise ValueError(
                f"{what} is an average that this optimizer, with momentum= as it is, does not keep. Build it with the "
                "averages that the state was saved with."
            )
        elif stage is None:  # somebody's own; it comes back as it was put there
            plain(value, what)
            if isinstance(value, Tensor):
                _nowhere(value, parameter, what)
        elif any(known.startswith(stage.prefix) for known in entries):  # else it is dropped
            raise ValueError(
                f"The state {key!r} of {name!r} is not known here; known are {', '.join(entries)}. Build the optimizer "
                f"with {stage.option} and the options that the state was saved with. {DAMAGED}"
            )
    own = [key for key in entries if key in (STEP, MOMENTUM, SECOND) or FURTHER.fullmatch(key)]
    missing = [key for key in own if entries[key].eager and key not in state]
    if missing and any(key in state for key in own):
        raise ValueError(
            f"The state of {name!r} has {', '.join(map(repr, state))}, but {missing[0]!r} is missing, without which "
            f"the others mean nothing. {DAMAGED}"
        )


def _check_count(value: Any, parameter: Tensor, name: str) -> None:
    what = f"The state {STEP!r} of {name!r}"
    if isinstance(value, Tensor):
        if value.shape != torch.Size(()):
            raise ValueError(f"{what} has shape {tuple(value.shape)}, but () is needed. {DAMAGED}")
        if _nowhere(value, parameter, what):
            return
        value = value.item()
    else:
        value = plain(value, what)
    if _count(value) is None:
        raise ValueError(f"{what} is {_short(value)}, but {_counted(value)} is needed. {DAMAGED}")


def _nowhere(value: Tensor, parameter: Tensor, what: str) -> bool:
    """Whether a tensor holds no numbers, as its parameter holds none, either."""
    if value.is_meta and not parameter.is_meta:
        raise ValueError(f"{what} is on the meta device, which holds no numbers. {DAMAGED}")
    return value.is_meta


def _check_tensor(value: Any, parameter: Tensor, what: str, entry: Entry) -> None:
    real = isinstance(value, Tensor) and value.is_floating_point()
    whole = entry.dtype is not None and not entry.dtype.is_floating_point
    stored = (entry.dtype, *([torch.int32] if entry.dtype is torch.int16 else []))  # see `exchangeable`
    if not isinstance(value, Tensor) or not (value.dtype in stored if whole else real):
        kind = value.dtype if isinstance(value, Tensor) else _short(value)
        needed = "real floating point" if entry.dtype is None else entry.dtype
        raise TypeError(f"{what} is {kind}, but a tensor of {needed} is needed. {DAMAGED}")
    if value.layout != torch.strided:
        raise TypeError(f"{what} has the layout {value.layout}, but a dense tensor is needed. {DAMAGED}")
    expected = parameter.shape if entry.shape is None else entry.shape
    if value.shape != expected:
        raise ValueError(
            f"{what} has shape {tuple(value.shape)}, but {tuple(expected)} is needed. The checkpoint is of another "
            "model or of another order of parameters."
        )
    (own,) = local([value])
    if _nowhere(own, parameter, what) or not own.numel() or not entry.read:
        return
    low, high = (float(end) for end in torch.aminmax(own.detach()))
    if entry.infinite and low >= 0 and high == math.inf:
        return  # a gradient whose square is out of range
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"{what} holds numbers that are not finite. {DAMAGED}")
    if entry.dtype is torch.int16 and not -(2**15) <= low <= high < 2**15:
        raise ValueError(f"{what} holds {low:g} to {high:g}, but numbers of 16 bits are needed. {DAMAGED}")
    if entry.least is not None and low < entry.least:
        raise ValueError(f"{what} holds {low:g}, but it cannot be below {entry.least:g}. {DAMAGED}")


def _short(value: object) -> str:
    """What was given, for a message; a collection may be a whole checkpoint."""
    return shown(value) if isinstance(value, str | int | float | bool | None) else f"a {type(value).__name__}"
