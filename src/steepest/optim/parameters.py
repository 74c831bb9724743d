"""From what users pass as `params` to groups of one role each, with a plan row per parameter."""

import itertools
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import replace
from typing import cast

from torch import Tensor, nn

from steepest.anatomy import LINEAR, ROLES, Plan, PlanRow, Role, View, route
from steepest.checks import shown
from steepest.geometry import Norm, get_norm
from steepest.notices import warn
from steepest.optim.families import FAMILY, Families
from steepest.optim.groups import AVERAGES, Group, view_of
from steepest.optim.guesses import doubt, guessed_role
from steepest.optim.options import DTYPES, NORM_OPTIONS, check_parameter, check_rate, check_role, has_option
from steepest.stages import Entry
from steepest.stages.stage import state_dtype

Parameters = nn.Module | Plan | Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[Group]
Rows = dict[Tensor, PlanRow]
EMPTY = (
    "optimizer got an empty parameter list: there is nothing to optimise. A generator such as model.parameters() can "
    "be used only once; call it again, or pass the model."
)


def collect(
    params: Parameters,
    *,
    norms: Mapping[Role, Norm | str],
    rates: object,
    families: Families,
    known: Mapping[Tensor, PlanRow] | None = None,
    where: str = "",
) -> tuple[Rows, list[Group]]:
    """Sort parameters into groups of one role each.

    Args:
        params: A module, a plan, parameters, named parameters, or groups.
        norms: Of each role, where a group has none of its own.
        rates: Learning rate of everything, or of each role; see `split`.
        families: That divide groups further.
        known: Rows of parameters that were routed before.
        where: Name of the group that is being added, for messages.

    Returns:
        A row per parameter, and groups whose "params" are (name, parameter) pairs and which have a "role".

    Raises:
        TypeError: If an entry is not a tensor.
        ValueError: If there is no parameter, one appears twice, or a role or view must be given.
    """
    if isinstance(params, nn.Module | Plan):
        rows, groups = _from_plan(params if isinstance(params, Plan) else route(params))
        groups = [part for group in groups for part in families.divide(group, rows)]
        families.sort_out(groups, norms)
        return rows, groups
    entries = _listed(params, "params")
    kinds = {isinstance(entry, dict) for entry in entries}
    if len(kinds) > 1:
        raise TypeError("params mixes parameters and groups; put every parameter into a group.")
    given = cast(list[Group], entries) if kinds == {True} else [{"params": entries}]
    rows: Rows = {}
    groups: list[Group] = []
    guessed: list[tuple[str, Tensor]] = []
    for index, entry in enumerate(given):
        label = where or (f"parameter group {index}" if kinds == {True} else "params")
        for part in split(_entry(entry, label, known or {}), norms, rates):
            matrix = _norm_of(part, norms).matrix
            added = _rows_of(part, known or {}, label, matrix=matrix)
            refuse_repeats(rows, added)
            rows.update(added)
            if matrix and part["role"] == "matrix" and entry.get("role") is None:
                guessed += [(name, p) for name, p in part["params"] if p not in (known or {})]
            groups += [part] if known is not None and FAMILY in part else families.divide(part, rows)
    families.sort_out(groups, norms)
    if not rows and not where:
        raise ValueError(EMPTY)
    host = sum("weight_decay" in entry and entry.get("role") is None for entry in given) > 1
    if (text := doubt(guessed, host=host)) is not None:
        warn(text)
    return rows, groups


def name_groups(groups: Sequence[Group], taken: Iterable[str]) -> None:
    """Name groups without a name after their family or role: "matrix", and the next ones "matrix 2", "matrix 3".

    Args:
        groups: With a "role"; written to.
        taken: Names of other groups.
    """
    names = {*taken, *(group["name"] for group in groups if isinstance(group.get("name"), str))}
    for group in groups:
        if group.get("name") is None:
            first = str(group.get(FAMILY) or group["role"])
            numbered = (f"{first} {number}" for number in itertools.count(2))
            group["name"] = next(name for name in itertools.chain([first], numbered) if name not in names)
            names.add(group["name"])


def complete_row(
    row: PlanRow, group: Group, norm: Norm, entries: Iterable[Entry], owners: Mapping[str, tuple[int, ...] | None]
) -> PlanRow:
    """The row with the norm and learning rate of its group, what its state takes, and the ranks that share its work."""
    kept = [entry for entry in entries if entry.eager and row.trainable]
    size = sum(
        (row.numel if entry.shape is None else entry.shape.numel())
        * (entry.dtype or state_dtype(row.parameter)).itemsize
        for entry in kept
    )
    own = owners.get(row.name)
    owner = None if row.name not in owners else "each" if own is None else ", ".join(map(str, own))
    averages = group.get(AVERAGES)
    return replace(row, norm=str(norm), lr=float(group["lr"]), owner=owner, state_bytes=size, averages=averages)


def _from_plan(plan: Plan) -> tuple[Rows, list[Group]]:
    """One group per role. Frozen integers and eighths, as of quantised layers, stay out: they never have a gradient."""
    rows = {row.parameter: row for row in plan if row.trainable or row.parameter.dtype in DTYPES}
    if not rows:
        raise ValueError("The model has no parameters to optimise.")
    for row in rows.values():
        check_parameter(row.name, row.parameter)
    unknown = [row.name for row in plan.unknown if row.trainable]
    if unknown:
        warn(
            f"The layout of {', '.join(unknown)} is not known; the norm of vectors is used for them. Say what they are "
            "with steepest.route(model, overrides=...) and pass the plan instead of the model."
        )
    groups: list[Group] = []
    for role in ROLES:
        members = [(row.name, parameter) for parameter, row in rows.items() if row.role == role]
        if members:
            groups.append({"params": members, "role": role})
    return rows, groups


def _entry(entry: Group, where: str, known: Mapping[Tensor, PlanRow]) -> Group:
    """One group with named parameters, the caller's dictionary left as it was."""
    if "params" not in entry:
        raise ValueError(f"{where} has no 'params'; it has {', '.join(map(repr, entry))}.")
    members = entry["params"]
    if isinstance(members, nn.Module):
        raise TypeError(f"{where} has a module as 'params'; write module.parameters(), or pass the whole model alone.")
    listed = [members] if isinstance(members, Tensor) else _listed(members, f"{where}['params']")
    names = cast(Sequence[str], entry.get("param_names") or ())
    if len(names) == len(listed) and not any(isinstance(member, tuple) for member in listed):
        listed = list(zip(names, listed, strict=True))
    named = _named(listed, where)
    named = [(known[p].name if p in known and name.startswith(where) else name, p) for name, p in named]
    if entry.get("role") is not None:
        check_role(entry["role"], where=where)
    return {**entry, "params": named, "param_names": [name for name, _ in named]}


def split(group: Group, norms: Mapping[Role, Norm | str], rates: object) -> list[Group]:
    """A group without a role as one of matrices and one of vectors, where it has both.

    Options go to both, but those that only one of the two norms has go to that one. A learning rate is that of the
    matrices; vectors keep the ratio to it that the optimizer's own rates have.

    Args:
        group: With named parameters.
        norms: Of each role.
        rates: Learning rate of everything, or of each role.
    """
    if group.get("role") is not None:
        return [group]
    named = cast(list[tuple[str, Tensor]], group["params"])
    parts: list[Group] = []
    for role in cast(tuple[Role, ...], ("matrix", "vector")):
        members = [(name, parameter) for name, parameter in named if guessed_role(parameter) == role]
        if members:
            parts.append({**group, "params": members, "param_names": [name for name, _ in members], "role": role})
    if not parts:
        return [{**group, "role": "vector"}]
    if len(parts) > 1:
        own = [_norm_of(part, norms) for part in parts]
        for option in (*NORM_OPTIONS, "betas"):
            users = [has_option(norm, option) for norm in own]
            for part, uses in zip(parts, users, strict=True):
                if any(users) and not uses:
                    part.pop(option, None)
        if "lr" in group and isinstance(rates, Mapping) and rates.get("matrix") and "vector" in rates:
            lr = check_rate("lr of a group", group["lr"])
            parts[1]["lr"] = lr * (rates["vector"] / rates["matrix"])
    return parts


def _norm_of(group: Group, norms: Mapping[Role, Norm | str]) -> Norm:
    return get_norm(group["norm"] if "norm" in group else norms[group["role"]])


def _rows_of(group: Group, known: Mapping[Tensor, PlanRow], where: str, *, matrix: bool) -> Rows:
    role, view = cast(Role, group["role"]), view_of(group, where)
    bare = "two or more dimensions" if role == "matrix" else "fewer than two dimensions"
    reason = bare if where == "params" else f"role of {where}"
    rows: Rows = {}
    for name, parameter in cast(list[tuple[str, Tensor]], group["params"]):
        old = known.get(parameter)
        keep = old is not None and old.role == role and view is None
        row = old if keep and old is not None else _row(name, parameter, role, view, reason, matrix=matrix)
        refuse_repeats(rows, {parameter: row})
        rows[parameter] = row
    return rows


def named(members: object, where: str = "params") -> list[tuple[str, Tensor]]:
    """Parameters with names, in the order in which they came; those without are called after their place.

    Args:
        members: Parameters, or pairs of name and parameter.
        where: What they are called, for messages and names.

    Raises:
        TypeError: If it is no list of these, or a parameter is not of real floating point.
        ValueError: If a parameter cannot be optimised.
    """
    return _named(_listed(members, where), where)


def _listed(members: object, where: str) -> list[object]:
    """Parameters or groups as a list, in the order in which they came."""
    if isinstance(members, Tensor):
        raise TypeError(f"{where} must be a module or an iterable of tensors, got one tensor; write [tensor].")
    if isinstance(members, Set):
        raise TypeError(f"{where} must be in an order that is the same in every run, got a set; write a list.")
    if isinstance(members, Mapping):
        group = "params" in members
        remedy = "write [group] for one group" if group else "write list(named.items())"
        raise TypeError(f"{where} must be a module or an iterable of tensors, got {shown(members)}; {remedy}.")
    if isinstance(members, str | bytes) or not isinstance(members, Iterable):
        raise TypeError(f"{where} must be a module or an iterable of tensors, got {shown(members)}.")
    return list(cast(Iterable[object], members))


def _named(entries: Sequence[object], where: str) -> list[tuple[str, Tensor]]:
    named: list[tuple[str, Tensor]] = []
    for index, entry in enumerate(entries):
        if isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str):
            name, parameter = entry
        else:
            name, parameter = f"{where}[{index}]", entry
        named.append(("".join(name), check_parameter(name, parameter)))
    return named


def _row(name: str, parameter: Tensor, role: Role, view: View | None, reason: str, *, matrix: bool) -> PlanRow:
    if view is None and (matrix or role == "matrix") and parameter.ndim in (2, 4, 5):
        view = LINEAR
    if view is None and matrix and parameter.ndim == 3:
        raise ValueError(
            f"{name!r} of shape {tuple(parameter.shape)} may be a stack of matrices or a convolution over one "
            "dimension; give its group view=View(experts=True) or view=View(), or pass the module so that it shows."
        )
    return PlanRow(
        name=name,
        shape=tuple(parameter.shape),
        role=role,
        view=view,
        norm="",
        reason=reason,
        trainable=parameter.requires_grad,
        parameter=parameter,
    )


def newcomer(parameter: object, name: str, group: Group, norm: Norm, old: PlanRow | None, where: str) -> PlanRow:
    """The row of a parameter that was put into a group without `add_param_group`.

    Args:
        parameter: What stands among the group's "params".
        name: Its name, if it has none yet.
        group: Of the optimizer.
        norm: Of the group.
        old: Row of the parameter in whose place it stands, or its own before it changed its shape; None if unknown.
        where: Which group, for the message.

    Returns:
        The row: the old one's view if that fits, else the group's.

    Raises:
        TypeError: If it is nothing that can be optimised.
        ValueError: If it cannot be known how its entries form matrices.
    """
    if old is not None and old.role == group["role"]:
        name = old.name
    parameter = check_parameter(name, parameter)
    shape = tuple(parameter.shape)
    try:
        if old is not None and old.role == group["role"] and len(old.shape) == len(shape):
            row = replace(old, parameter=parameter, shape=shape, trainable=parameter.requires_grad)
        else:
            view, role = view_of(group, where), cast(Role, group["role"])
            row = _row(name, parameter, role, view, f"role of {where}", matrix=norm.matrix)
        check_view(row, norm)
    except ValueError as problem:
        raise ValueError(
            f"{name!r} of shape {shape} came into {where} without add_param_group. Take the old one out and use "
            f"add_param_group, or build a new optimizer. {problem}"
        ) from problem
    return row


def refuse_repeats(rows: Rows, added: Rows) -> None:
    """Refuse a parameter that is there already.

    Args:
        rows: Of those that are there.
        added: Of those that come.

    Raises:
        ValueError: If so.
    """
    for parameter, row in added.items():
        if parameter in rows:
            raise ValueError(
                f"{row.name!r} appears twice, first as {rows[parameter].name!r}; list each parameter once."
            )


def check_view(row: PlanRow, norm: Norm) -> None:
    """A norm of linear maps needs to know the map.

    Args:
        row: Of the plan.
        norm: Of the parameter's group.

    Raises:
        ValueError: If the view does not fit, or there is none.
    """
    if row.view is not None:
        row.view.blocks(row.shape)
    elif norm.matrix:
        raise ValueError(
            f"{row.name!r} of shape {tuple(row.shape)} has no view as matrices, which the group's norm needs. "
            "Give the group a view=, or another role or norm."
        )
