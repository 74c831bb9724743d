"""From what users pass as `params` to groups of one role each, with a plan row per parameter."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, cast

from torch import Tensor, nn

from steepest.anatomy import LINEAR, ROLES, Plan, PlanRow, Role, View, route
from steepest.geometry import Norm, get_norm
from steepest.notices import warn
from steepest.optim.options import check_parameter

Group = dict[str, Any]
Parameters = nn.Module | Plan | Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[Group]
Rows = dict[Tensor, PlanRow]


def collect(
    params: Parameters, *, known: Mapping[Tensor, PlanRow] | None = None, where: str = ""
) -> tuple[Rows, list[Group]]:
    """Sort parameters into groups of one role each.

    Args:
        params: A module, a plan, parameters, named parameters, or groups.
        known: Rows of parameters that were routed before.
        where: Name of the group that is being added, for messages.

    Returns:
        A row per parameter, and groups whose "params" are (name, parameter) pairs and which have a "role".

    Raises:
        TypeError: If an entry is not a tensor.
        ValueError: If a parameter appears twice, or a role or view must be given.
    """
    if isinstance(params, nn.Module | Plan):
        return _from_plan(params if isinstance(params, Plan) else route(params))
    if isinstance(params, Tensor):
        raise TypeError("params must be a module or an iterable of tensors, got one tensor; write [tensor].")
    entries = list(params)
    rows: Rows = {}
    groups: list[Group] = []
    loose: list[object] = []
    for index, entry in enumerate(entries):
        if isinstance(entry, dict):
            label = where or f"parameter group {index}"
            added, group = _from_group(entry, known or {}, label)
            _refuse_repeats(rows, added)
            rows.update(added)
            groups.append(group)
        else:
            loose.append(entry)
    if loose and groups:
        raise TypeError("params mixes parameters and groups; put every parameter into a group.")
    if loose:
        return _from_tensors(loose)
    return rows, groups


def complete_row(row: PlanRow, group: Group) -> PlanRow:
    """The row with the norm and learning rate of its group."""
    lr = group["lr"]
    return replace(row, norm=str(group["norm"]), lr=float(lr))


def _from_plan(plan: Plan) -> tuple[Rows, list[Group]]:
    """One group per role. Frozen integers, as of quantised layers, stay out: they can never have a gradient."""
    rows = {row.parameter: row for row in plan if row.trainable or row.parameter.is_floating_point()}
    if not rows:
        raise ValueError("The model has no parameters to optimise.")
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


def _from_tensors(loose: list[object]) -> tuple[Rows, list[Group]]:
    """Bare parameters: two or more dimensions make a matrix."""
    named = _named(loose, "params")
    rows: Rows = {}
    groups: list[Group] = []
    for role, reason in (("matrix", "two or more dimensions"), ("vector", "fewer than two dimensions")):
        members = [(name, parameter) for name, parameter in named if (parameter.ndim >= 2) == (role == "matrix")]
        for name, parameter in members:
            added = {parameter: _row(name, parameter, cast(Role, role), None, reason, matrix=role == "matrix")}
            _refuse_repeats(rows, added)
            rows.update(added)
        if members:
            groups.append({"params": members, "role": role})
    return rows, groups


def _from_group(entry: Group, known: Mapping[Tensor, PlanRow], where: str) -> tuple[Rows, Group]:
    """One group, the caller's dictionary left as it was."""
    if "params" not in entry:
        raise ValueError(f"{where} has no 'params'; it has {', '.join(map(repr, entry))}.")
    members = entry["params"]
    if isinstance(members, nn.Module):
        raise TypeError(f"{where} has a module as 'params'; write module.parameters(), or pass the whole model alone.")
    named = _named([members] if isinstance(members, Tensor) else list(members), where)
    named = [(known[p].name if p in known and name.startswith(where) else name, p) for name, p in named]
    role = cast(Role, entry.get("role") or _role_of([parameter for _, parameter in named], where))
    view = cast(View | None, entry.get("view"))
    matrix = get_norm(entry["norm"]).matrix if "norm" in entry else role == "matrix"
    rows: Rows = {}
    for name, parameter in named:
        old = known.get(parameter)
        keep = old is not None and old.role == role and view is None
        row = old if keep and old is not None else _row(name, parameter, role, view, f"role of {where}", matrix=matrix)
        _refuse_repeats(rows, {parameter: row})
        rows[parameter] = row
    return rows, {**entry, "params": named, "role": role}


def _role_of(parameters: list[Tensor], where: str) -> Role:
    kinds = {parameter.ndim >= 2 for parameter in parameters}
    if len(kinds) > 1:
        raise ValueError(
            f"{where} holds parameters with fewer than two dimensions and others; give it a role=, one of "
            f"{', '.join(ROLES)}, or put them into two groups."
        )
    return "matrix" if kinds == {True} else "vector"


def _named(entries: list[object], where: str) -> list[tuple[str, Tensor]]:
    named: list[tuple[str, Tensor]] = []
    for index, entry in enumerate(entries):
        if isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str):
            name, parameter = entry
        else:
            name, parameter = f"{where}[{index}]", entry
        named.append((name, check_parameter(name, parameter)))
    return named


def _row(name: str, parameter: Tensor, role: Role, view: View | None, reason: str, *, matrix: bool) -> PlanRow:
    if view is None and matrix and parameter.ndim in (2, 4, 5):
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


def _refuse_repeats(rows: Rows, added: Rows) -> None:
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
