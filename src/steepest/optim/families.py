"""Options of families of parameters, by role or by a pattern of names: what a group leaves open comes from its family.

A family divides groups and does nothing else, so that schedulers, checkpoints and Momo see groups as always.
"""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, cast

from torch import Tensor

from steepest.anatomy import ROLES, PlanRow
from steepest.checks import refusal, shown
from steepest.geometry import Norm, get_norm
from steepest.names import near_miss
from steepest.optim.groups import Group
from steepest.optim.options import NORM_OPTIONS, has_option

FAMILY = "family"  # in the groups of an optimizer that has families: which, as a text; of the others, empty
EXAMPLE = "a mapping from roles and patterns of names to options, such as {'*.bias': {'betas': (0.9, 0.997)}}"
# What a family cannot set, as it is asked when groups are there, and where it is set.
ELSEWHERE: Mapping[str, str] = {
    **dict.fromkeys(("role", "view"), "Write route(model, overrides=...) for it, and pass the plan."),
    **dict.fromkeys(("params", "param_names"), "Parameters are those that the role or the pattern matches."),
    "name": "Groups are called like the family.",
}
SHOWN = 5  # names in a message


class Families:
    """What an optimizer was told of families.

    Args:
        families: From a role, or a pattern with * and ? of names of parameters, to options of a group. The first that
            matches a parameter counts. None: none.

    Raises:
        ValueError: If a family is empty, or sets what it cannot.
        TypeError: If it is no mapping of mappings.
    """

    def __init__(self, families: object = None) -> None:
        if families is not None and not isinstance(families, Mapping):
            raise TypeError(refusal("families", EXAMPLE, families))
        self._options: dict[str, dict[str, Any]] = {}
        self._used: set[tuple[str, str]] = set()  # family and option that some norm of the family has
        for family, options in cast(Mapping[object, object], families or {}).items():
            if not isinstance(family, str) or not family or not isinstance(options, Mapping):
                raise TypeError(refusal("families", EXAMPLE, families))
            own = dict(cast(Mapping[str, Any], options))
            if not own:
                raise ValueError(refusal(f"families[{family!r}]", "at least one option, such as {'lr': 0.01}", own))
            for key in own:
                if key in ELSEWHERE:
                    raise ValueError(f"families[{family!r}] has no option {key!r}, got {shown(own)}. {ELSEWHERE[key]}")
            self._options[family] = own

    def __bool__(self) -> bool:
        return bool(self._options)

    def of(self, role: object, names: Iterable[str]) -> str:
        """The family of a parameter; empty if it is in none.

        Args:
            role: Of the parameter.
            names: All that it has.
        """
        names = list(names)
        return next((family for family in self._options if _matches(family, role, names)), "")

    def divide(self, group: Group, rows: Mapping[Tensor, PlanRow]) -> list[Group]:
        """A group as one for each family that it has members of, those of no family first.

        What the group says goes before what the family says.

        Args:
            group: With a role and named parameters.
            rows: Of its parameters.
        """
        if not self:
            return [group]
        members: dict[str, list[tuple[str, Tensor]]] = {"": [], **{family: [] for family in self._options}}
        for name, parameter in cast(list[tuple[str, Tensor]], group["params"]):
            names = {name, *(site.name for site in rows[parameter].sites)}
            members[self.of(group["role"], names)].append((name, parameter))
        found: list[Group] = []
        for family, own in members.items():
            if own or (not family and not group["params"]):
                part = {**self._options.get(family, {}), **group, "params": own, FAMILY: family}
                if "param_names" in group:
                    part["param_names"] = [name for name, _ in own]
                if family and len(own) < len(group["params"]):  # its name stays with the others
                    part.pop("name", None)
                found.append(part)
        return found

    def sort_out(self, groups: Sequence[Group], norms: Mapping[Any, Norm | str]) -> None:
        """Give options that only some norms have to those alone, where a family has groups of several norms.

        Args:
            groups: That were divided; written to.
            norms: Of each role, where a group has none of its own.
        """
        for family, options in self._options.items():
            own = [group for group in groups if group.get(FAMILY) == family]
            for option in (option for option in (*NORM_OPTIONS, "betas") if option in options):
                has = [has_option(get_norm(group.get("norm", norms[group["role"]])), option) for group in own]
                if any(has):
                    self._used.add((family, option))
                for group, user in zip(own, has, strict=True):
                    if not user and (family, option) in self._used and group.get(option) is options[option]:
                        del group[option]

    def check_used(self, groups: Sequence[Group], rows: Mapping[Tensor, PlanRow]) -> None:
        """Refuse patterns that match nothing.

        Args:
            groups: That were divided.
            rows: Of all parameters.

        Raises:
            ValueError: If one matches no parameter, or only such as belong to families before it.
        """
        used = {group.get(FAMILY) for group in groups}
        for family in self._options:
            if family in used or family in ROLES:
                continue
            names = [name for row in rows.values() for name in dict.fromkeys((row.name, *(s.name for s in row.sites)))]
            taken = [name for name in names if _matches(family, None, [name])]
            if taken:
                raise ValueError(
                    f"families[{family!r}] matches {', '.join(map(repr, taken[:SHOWN]))}, but families before it match "
                    "that, too, and the first counts. Put it before them."
                )
            hint = near_miss(family, names)
            listed = f" The parameters are {', '.join(names[:SHOWN])}{', ...' * (len(names) > SHOWN)}."
            raise ValueError(
                f"families[{family!r}] matches no parameter, and is no role ({', '.join(ROLES)}).{hint or listed}"
            )


def where_of(group: Mapping[str, Any], where: str) -> str:
    """Which group, for messages, where it may be that of a family."""
    return f"families[{group[FAMILY]!r}]" if group.get(FAMILY) else where


def _matches(family: str, role: object, names: Sequence[str]) -> bool:
    if family in ROLES:
        return family == role
    return family in names or any(fnmatchcase(name, family) for name in names)
