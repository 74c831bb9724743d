"""What the state dict of another library's optimizer holds of each parameter, by name. Nothing of it is trusted."""

import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from steepest.anatomy import PlanRow
from steepest.checks import number, refusal, shown, whole
from steepest.integrations.peers.sources import SILENT, Source
from steepest.ranks import local

Names = Sequence[str] | Sequence[Sequence[str]]
WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
_PART, check_steps = number(high=1.0), whole(0)


@dataclass(frozen=True)
class Found:
    """What a peer kept of one parameter, or of the pieces of one.

    Args:
        title: Whose.
        first: Average of gradients, as the peer keeps it.
        beta: b.
        steps: t.
        summed: Whether gradients were added whole.
        second: Average of squares.
        beta2: Likewise.
        rows: Average of squares of the direction's rows.
    """

    title: str
    first: Tensor
    beta: float
    steps: int
    summed: bool
    second: Tensor | None
    beta2: float
    rows: Tensor | None

    def same(self, other: "Found") -> bool:
        """Whether another one holds the same, as copies of it on other ranks do."""
        pairs = ((self.first, other.first), (self.second, other.second), (self.rows, other.rows))
        return self.alike(other) and all(
            a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs
        )

    def alike(self, other: "Found") -> bool:
        """Whether another one averages as many gradients with the same weights."""
        kinds = [
            (one.title, one.beta, one.steps, one.summed, one.beta2, one.second is None, one.rows is None)
            for one in (self, other)
        ]
        return kinds[0] == kinds[1]


@dataclass
class Told:
    """What a report will say besides.

    Args:
        unused: What nobody took, and why.
        notes: Each once.
    """

    unused: dict[str, str] = field(default_factory=dict[str, str])
    notes: dict[str, None] = field(default_factory=dict[str, None])


def read(
    saved: Any,
    ranks: Sequence[Any],
    source: Source,
    names: Names | None,
    rows: Mapping[str, PlanRow],
    joined: set[str],
    steps: int | None,
    told: Told,
) -> dict[str, Found]:
    """What one state dict holds, by name.

    Args:
        saved: The state dict.
        ranks: Those of all ranks of the same optimizer, it among them.
        source: Whose it is.
        names: Of its parameters; None: those that it has.
        rows: Of the optimizer that goes on, by name.
        joined: Names of parameters that are fused on one side.
        steps: That were taken, where the state does not say.
        told: Takes note.

    Raises:
        ValueError: If it does not fit, or could be meant in two ways.
        TypeError: If something is of the wrong type.
    """
    groups, states = _parts(saved, source)
    shapes = {
        index: tuple(value.shape)
        for rank in ranks
        for index, state in (states if rank is saved else _parts(rank, source)[1]).items()
        for kind in source.kinds
        if isinstance(value := state.get(kind.first), Tensor)
    }
    called = _called(groups, names, source, rows, shapes, joined)
    found: dict[str, Found] = {}
    for group in groups:
        for index in group["params"]:
            if (one := _one(states.get(index, {}), group, called[index], source, steps, told)) is not None:
                found[called[index]] = one
                told.notes.update(dict.fromkeys(_remarks(group, source)))
    return found


def _parts(saved: Any, source: Source) -> tuple[list[dict[str, Any]], dict[Any, dict[str, Any]]]:
    """Groups and states of a state dict, which is one."""
    who = f"The state of {source.title}"
    if not isinstance(saved, dict):
        raise TypeError(refusal(who, "what state_dict() returned, a dictionary", saved))
    content = cast(dict[Any, Any], saved)
    groups, states = content.get("param_groups"), content.get("state")
    if not isinstance(groups, list) or not isinstance(states, dict):
        raise ValueError(
            f"{who} must have a list 'param_groups' and a dictionary 'state', got {', '.join(map(shown, content))}. "
            "Pass what state_dict() of the optimizer returned, not the whole checkpoint."
        )
    listed: list[Any] = []
    for group in cast(list[Any], groups):
        if not isinstance(group, dict) or not isinstance(cast(dict[str, Any], group).get("params"), list):
            raise TypeError(refusal(f"{who}: a parameter group", "a dictionary with a list 'params'", group))
        listed += group["params"]
    known: set[int | str] = set()
    for index in listed:
        if isinstance(index, bool) or not isinstance(index, int | str) or index in known:
            raise ValueError(f"{who} calls a parameter {shown(index)}, which is no name of one alone.")
        known.add(index)
    for index, state in cast(dict[Any, Any], states).items():
        if not isinstance(state, dict) or not all(isinstance(key, str) for key in cast(dict[Any, Any], state)):
            raise TypeError(
                refusal(f"{who}: that of parameter {shown(index)}", "a dictionary with named entries", state)
            )
        if index not in known:
            raise ValueError(f"{who} has an entry for {shown(index)}, which is in no parameter group.")
    return groups, states


def _called(
    groups: Sequence[dict[str, Any]],
    names: Names | None,
    source: Source,
    rows: Mapping[str, PlanRow],
    shapes: Mapping[Any, tuple[int, ...]],
    joined: set[str],
) -> dict[Any, str]:
    """Each parameter's name here, by what its state dict calls it."""
    lists = [_stripped(part, rows) for part in _named(groups, names, source)]
    twice = next((name for name, count in Counter(itertools.chain(*lists)).items() if count > 1), None)
    if twice is not None:
        raise ValueError(f"names: {twice!r} stands there twice; each parameter has a name of its own.")
    orders = [lists]
    if source.sorts and names is not None and all(name in rows for part in lists for name in part):
        orders.append(
            [
                _sorted(part, rows) if group.get("use_muon", True) else part
                for part, group in zip(lists, groups, strict=True)
            ]
        )
    indices = [index for group in groups for index in group["params"]]
    fitting: list[dict[Any, str]] = []
    misfits: list[str] = []
    for order in orders:
        called = dict(zip(indices, (name for part in order for name in part), strict=True))
        wrong = next(
            (
                (name, shapes[index])
                for index, name in called.items()
                if index in shapes and name not in joined and name in rows and rows[name].shape != shapes[index]
            ),
            None,
        )
        if wrong is None:
            fitting.append(called)
        else:
            misfits.append(
                f"The average of {wrong[0]!r} in the state of {source.title} has shape {wrong[1]}, but the parameter "
                f"has {rows[wrong[0]].shape}. Give names= in the order in which that optimizer was given its "
                "parameters, and fused= where layers are joined on one side."
            )
    if not fitting:
        raise ValueError(misfits[0])
    owned = [{index: name for index, name in called.items() if index in shapes} for called in fitting]
    if len(owned) > 1 and owned[0] != owned[1]:
        other = next(index for index in owned[0] if owned[0][index] != owned[1][index])
        raise ValueError(
            f"The state of {source.title} does not tell whether it sorted its parameters by shape, as some of its "
            f"versions do: parameter {other} may be {owned[0][other]!r} or {owned[1][other]!r}. Pass the states of all "
            "ranks together, or names= in the order in which it keeps them, and source without sorting: "
            "'torch.optim.Muon' reads the same averages."
        )
    return fitting[0]


def _named(groups: Sequence[dict[str, Any]], names: Any, source: Source) -> list[list[str]]:
    """A list of names for each group, as they were given."""
    counts = [len(group["params"]) for group in groups]
    if names is None:
        own: list[Any] = [group.get("param_names") for group in groups]
        texts = [all(isinstance(index, str) for index in group["params"]) for group in groups]
        own = [group["params"] if text else told for group, told, text in zip(groups, own, texts, strict=True)]
        if not all(
            isinstance(part, list) and len(cast(list[Any], part)) == count
            for part, count in zip(own, counts, strict=True)
        ):
            raise ValueError(
                f"The state of {source.title} has no names of its {sum(counts)} parameters. Give names=, in the order "
                "in which that optimizer was given them, such as [name for name, _ in model.named_parameters()]."
            )
        lists = own
    else:
        given: list[Any] = list(names) if isinstance(names, list | tuple) else [names]
        if all(isinstance(one, str) for one in given) and isinstance(names, list | tuple):
            ends = [sum(counts[: place + 1]) for place in range(len(counts))]
            lists = [given[end - count : end] for end, count in zip(ends, counts, strict=True)]
            if len(given) != sum(counts):
                raise ValueError(
                    f"names: {len(given)} names for the {sum(counts)} parameters in the state of {source.title}, whose "
                    f"groups have {counts}."
                )
        else:
            lists = given
            if not all(isinstance(part, list | tuple) for part in lists):
                raise TypeError(refusal("names", "a list of names, or a list of names for each group", names))
            if [len(part) for part in lists] != counts:
                raise ValueError(
                    f"names: lists of {[len(part) for part in lists]} names for groups of {counts} parameters in the "
                    f"state of {source.title}."
                )
    for part in lists:
        for name in part:
            if not isinstance(name, str):
                raise TypeError(refusal("names", "names of parameters", name))
    return [list(part) for part in lists]


def _stripped(names: Sequence[str], rows: Mapping[str, PlanRow]) -> list[str]:
    """Without the prefixes of wrappers, which plans do not have either."""
    plain = [WRAPPERS.sub("", name) for name in names]
    return [name.removeprefix("module.") if name not in rows else name for name in plain]


def _sorted(names: Sequence[str], rows: Mapping[str, PlanRow]) -> list[str]:
    return sorted(names, key=lambda name: rows[name].shape, reverse=True)


def _one(
    state: Mapping[str, Any],
    group: Mapping[str, Any],
    name: str,
    source: Source,
    steps: int | None,
    told: Told,
) -> Found | None:
    """What is kept of one parameter; None if there is nothing to take."""
    if not state:
        return None
    who = f"The state of {source.title}: {name!r}"
    if (why := source.no_average.get(str(group.get("algorithm")))) is not None:
        told.unused[f"{name} ({', '.join(state)})"] = why
        return None
    kind = next((one for one in source.kinds if {one.first, one.second} - {None} <= state.keys()), None)
    if kind is None:
        wanted = " or ".join(repr(one.first) for one in source.kinds)
        raise ValueError(f"{who} has {', '.join(map(repr, state))}, but {wanted} is needed. Is source= right?")
    used = {kind.first, kind.second, kind.rows, *SILENT}
    for key, value in state.items():
        if key not in used and isinstance(value, Tensor):
            told.unused[f"{name} ({key})"] = "it has no counterpart here"
    count = state.get("step", group.get("step"))
    if count is None and steps is None:
        raise ValueError(
            f"{who} does not say how many gradients it averages. Give steps=, the number of steps that were taken."
        )
    taken = _counted(f"{who}: step", count if count is not None else steps)
    if taken == 0:
        told.unused[f"{name} ({kind.first})"] = "no step was taken"
        return None
    second = None if kind.second is None else _tensor(f"{who}: {kind.second}", state[kind.second])
    rows = state.get(kind.rows) if kind.rows else None
    return Found(
        title=source.title,
        first=_tensor(f"{who}: {kind.first}", state[kind.first]),
        beta=_beta(group, kind.beta, 0, source),
        steps=taken,
        summed=kind.summed or (kind.summed_with is not None and kind.summed_with in group),
        second=second,
        beta2=0.0 if second is None else _beta(group, kind.beta2, 1, source),
        rows=None if rows is None else _tensor(f"{who}: {kind.rows}", rows),
    )


def _counted(what: str, value: Any) -> int:
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_meta:
            raise ValueError(refusal(what, "one whole number", value))
        value = value.item()
    return check_steps(what, int(value) if isinstance(value, float) and value.is_integer() else value)


def _tensor(what: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(refusal(what, "a tensor of real floating point", value))
    if value.layout != torch.strided or value.is_meta:
        raise TypeError(refusal(what, "a dense tensor with numbers", value))
    if not all(bool(part.isfinite().all()) for part in local([value.detach()])):
        raise ValueError(f"{what} holds numbers that are not finite; use an older checkpoint.")
    return value.detach()


def _beta(group: Mapping[str, Any], keys: Sequence[str], place: int, source: Source) -> float:
    key = next((key for key in keys if key in group), None)
    if key is None:
        raise ValueError(
            f"A parameter group in the state of {source.title} has no {' or '.join(map(repr, keys))}, the weight of "
            f"its average; it has {', '.join(map(repr, group))}. Is source= right?"
        )
    value: Any = group[key]
    if key == "betas":
        if not isinstance(value, list | tuple) or len(cast(Sequence[Any], value)) != 2:
            raise TypeError(refusal(f"The state of {source.title}: betas", "two numbers", value))
        value = value[place]
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    return _PART(f"The state of {source.title}: {key}", value)


def _remarks(group: Mapping[str, Any], source: Source) -> list[str]:
    """What an average has in it that is not the gradient of the loss."""
    found: list[str] = []
    decays = bool(group.get("weight_decay"))
    coupled = source.title == "torch.optim.Adam" and not group.get("decoupled_weight_decay")
    coupled |= group.get("weight_decouple") is False or group.get("weight_decay_method") == "l2"
    coupled |= group.get("use_decoupled_wd") is False
    if decays and coupled:
        found.append(
            f"Averages of {source.title} hold weight decay as part of the gradient (L2); here decay is apart from it."
        )
    if group.get("maximize"):
        found.append(f"{source.title} maximised: its averages are of the negated loss. Pass the negated loss here.")
    if group.get("amsgrad"):
        found.append(f"{source.title} kept the largest second moment (amsgrad); here the present one counts.")
    return found
