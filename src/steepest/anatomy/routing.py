"""From a model to a plan: which parameter is optimised as a matrix, which as a table, a head, a vector, and why.

`route` asks `roles` what every parameter is by the type of its module, then finds the output head, which is a role in
the model and not a type, and then applies the user's overrides. It reads shapes only, never numbers: it works on meta
devices and on sharded models, and gives the same plan on every rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import cast

from torch import Tensor, nn

from steepest.anatomy.heads import find_heads
from steepest.anatomy.plan import ROLES, UNKNOWN, Plan, PlanRow, Role
from steepest.anatomy.roles import Verdict, classify, is_rank_one
from steepest.anatomy.sites import Site, distinct
from steepest.anatomy.views import LINEAR, View
from steepest.checks import check_fields, choice, flag, instance, optional, refusal, shown
from steepest.names import near_miss
from steepest.ranks import Team


@dataclass(frozen=True)
class Rule:
    """What an override sets; None leaves what the routing found.

    Args:
        role: The role. None with a view means "matrix".
        view: The view of a matrix, embedding or head.
    """

    role: Role | None = None
    view: View | None = None

    def __post_init__(self) -> None:
        check_fields(self, {"role": optional(choice(ROLES)), "view": optional(instance(View, "a View, or None"))})


Override = Role | View | Rule
"""What a parameter is in place of what routing finds; a view makes it a matrix."""


def route(
    model: nn.Module,
    *,
    overrides: Mapping[str, Override] | None = None,
    strict: bool = False,
    split_fused: bool = True,
) -> Plan:
    """The plan of a model.

    Args:
        model: Any module, wrapped or not, on any device, sharded by FSDP2 or not.
        overrides: Parameter name, or pattern with * and ?, to a role, a view or both. An exact name goes before a
            pattern, a later pattern before an earlier one.
        strict: Refuse a model with trainable parameters about which nothing is known, instead of listing them in
            `plan.unknown` and treating them as vectors.
        split_fused: Take fused weights (q, k, v; gate, up; the gates of recurrent layers) apart into the matrices
            they consist of. If False, one matrix each.

    Returns:
        One row per distinct parameter, in the order of the model.

    Raises:
        TypeError: If `model` is not a module, or an override is neither role, view nor rule.
        ValueError: If an override matches nothing, names no role or has a view that does not fit; if a parameter has
            no shape yet or is flattened; if `strict` and something is unknown.

    Example:
        >>> model = nn.Sequential(nn.Embedding(100, 16), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 100))
        >>> route(model).counts()
        {'matrix': 1, 'embedding': 1, 'head': 1, 'vector': 2}
        >>> route(model, overrides={"3.weight": "matrix"}).row("3.weight").reason
        "override '3.weight'"
    """
    if not isinstance(cast(object, model), nn.Module):
        raise TypeError(
            f"route takes a torch.nn.Module, got {type(model).__name__}. Pass the model, not its parameters."
        )
    if overrides is not None and not isinstance(cast(object, overrides), Mapping):
        example = "a mapping from names or patterns to roles and views, such as {'*.qkv.weight': View(split=(4, 4, 4))}"
        raise TypeError(refusal("overrides", example, overrides))
    flag("strict", strict)
    flag("split_fused", split_fused)
    groups = distinct(model)
    verdicts = [_verdict(sites) for sites in groups]
    heads = find_heads(model, groups, [verdict.role for verdict in verdicts])
    chosen = _match_overrides(overrides or {}, groups)
    copies = _copies(model)
    rows: list[PlanRow] = []
    for sites, found, pattern in zip(groups, verdicts, chosen, strict=True):
        site, verdict = sites[0], found
        if verdict.role == "matrix" and id(site.parameter) in heads:
            verdict = replace(verdict, role="head", reason=heads[id(site.parameter)])
        verdict = _fit(site, verdict, split_fused=split_fused)
        if len(sites) > 1:
            others = ", ".join(other.name for other in sites[1:])
            verdict = replace(verdict, reason=f"{verdict.reason}, tied with {others}")
        if overrides and pattern:
            verdict = _override(site, verdict, pattern, overrides[pattern])
        rows.append(replace(_row(sites, verdict), copies=copies.get(site.parameter)))
    plan = Plan(tuple(rows))
    if strict:
        _refuse_unknown(plan)
    return plan


def _copies(model: nn.Module) -> dict[Tensor, Team]:
    """Parameters of which each rank has a copy, as DistributedDataParallel keeps them."""
    found: dict[Tensor, Team] = {}
    for module in model.modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            team = Team(module.process_group)
            ignored = module.parameters_to_ignore
            found |= {p: team for name, p in module.module.named_parameters() if name not in ignored}
    return found


def _verdict(sites: Sequence[Site]) -> Verdict:
    """The verdict of a parameter: a table that is also a head is a table; otherwise the first site that knows it."""
    verdicts = [classify(site) for site in sites]
    tables = [verdict for verdict in verdicts if verdict.role == "embedding"]
    known = [verdict for verdict in verdicts if not verdict.reason.startswith(UNKNOWN)]
    return [*tables, *known, *verdicts][0]


def _fit(site: Site, verdict: Verdict, *, split_fused: bool) -> Verdict:
    if verdict.view is None:
        return verdict
    view = verdict.view if split_fused else replace(verdict.view, split=(), interleave=1)
    try:
        rank_one = is_rank_one(site, view)
    except ValueError as error:
        raise ValueError(f"{site.name}: {error}") from error
    if verdict.role == "matrix" and rank_one:
        return Verdict("vector", None, f"{verdict.reason}, but of one row or column")
    return replace(verdict, view=view)


def _match_overrides(overrides: Mapping[str, Override], groups: Sequence[Sequence[Site]]) -> list[str | None]:
    """For each parameter the pattern that decides it; any of its names may match."""
    chosen: list[str | None] = []
    used: set[str] = set()
    for sites in groups:
        names = [site.name for site in sites]
        matching = [pattern for pattern in overrides if any(fnmatchcase(name, pattern) for name in names)]
        exact = [pattern for pattern in overrides if pattern in names]
        used.update(matching, exact)
        chosen.append([None, *matching, *exact][-1])
    names = [site.name for sites in groups for site in sites]
    for pattern in overrides:
        if pattern not in used:
            hint = near_miss(pattern, names) or f" The model has {', '.join(names[:5])}{', ...' * (len(names) > 5)}."
            raise ValueError(f"The override {pattern!r} matches no parameter.{hint}")
    return chosen


def _override(site: Site, found: Verdict, pattern: str, value: Override) -> Verdict:
    if not isinstance(cast(object, value), str | View | Rule):
        raise TypeError(f"The override {pattern!r} must be a role, a View or a Rule, got {shown(value)}.")
    if isinstance(value, str) and value not in ROLES:
        raise ValueError(
            f"The override {pattern!r} asks for the role {value!r}. Roles are {', '.join(ROLES)}."
            f"{near_miss(value, ROLES)}"
        )
    rule = Rule(role=value) if isinstance(value, str) else Rule(view=value) if isinstance(value, View) else value
    role = rule.role if rule.role is not None else ("matrix" if rule.view else found.role)
    if role not in ROLES:
        raise ValueError(
            f"The override {pattern!r} asks for the role {role!r}. "
            f"Roles are {', '.join(ROLES)}.{near_miss(role, ROLES)}"
        )
    if role == "vector":
        if rule.view:
            raise ValueError(f"The override {pattern!r} gives a vector the view '{rule.view}'. Leave out one of them.")
        return Verdict(role, None, f"override {pattern!r}")
    view = rule.view or found.view or (LINEAR if role in ("matrix", "head") else None)
    if view is not None:
        try:
            view.blocks(site.shape)
        except ValueError as error:
            raise ValueError(f"The override {pattern!r} for {site.name}: {error}") from error
    return Verdict(role, view, f"override {pattern!r}")


def _row(sites: Sequence[Site], verdict: Verdict) -> PlanRow:
    site = sites[0]
    norm = "spectral" if verdict.role == "matrix" else "adam"
    trainable = site.parameter.requires_grad
    return PlanRow(
        name=site.name,
        shape=site.shape,
        role=verdict.role,
        view=verdict.view,
        norm=norm,
        reason=verdict.reason,
        trainable=trainable,
        parameter=site.parameter,
        sites=tuple(sites),
    )


def _refuse_unknown(plan: Plan) -> None:
    unknown = [row for row in plan.unknown if row.trainable]
    if unknown:
        lines = "\n".join(f"  {row.name} {row.shape}: {row.reason.removeprefix(UNKNOWN).strip()}" for row in unknown)
        raise ValueError(
            f"{len(unknown)} parameters are of unknown layout:\n{lines}\nSay what they are, for example "
            f"overrides={{{unknown[0].name!r}: 'vector'}} or a View, or pass strict=False to treat them as vectors."
        )
