"""The plan: what every parameter of a model is, how it is read as matrices, and why. Made before the first step."""

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args, overload

from torch import Tensor

from steepest.anatomy.sites import Site
from steepest.anatomy.views import View
from steepest.names import near_miss
from steepest.ranks import Team

Role = Literal["matrix", "embedding", "head", "vector"]
"""What a parameter is."""

ROLES: tuple[Role, ...] = get_args(Role)
"""All roles."""

UNKNOWN = "unknown:"


@dataclass(frozen=True)
class PlanRow:
    """One distinct parameter.

    Args:
        name: Its first name in the model, without the prefixes of wrappers.
        shape: Its full shape, also when it is sharded.
        role: What it does in the model.
        view: How it is a set of matrices; None for a parameter that is none.
        norm: Name of the norm its update is measured in: a label, until an optimizer puts its own.
        reason: Why it has this role, in plain words; starts with "unknown:" if nothing is known about it.
        trainable: Whether it requires a gradient.
        parameter: The parameter itself. Rows are compared without it.
        lr: Learning rate, once an optimizer has one for it.
        sites: Where it sits in the model, if it was found in one.
        copies: Ranks that have a copy each, if it is in a `DistributedDataParallel` module.
        owner: Ranks that work on it, in words, where an optimizer shares its work with others.
        inputs: What an optimizer keeps of its layer's inputs, in words; None: nothing.
        moment_bytes: Memory of the moment of the inputs; 0 where another row of the plan counts it.
        inverse_bytes: Memory of the moment's inverse or powers, likewise.
        state_bytes: Memory of what else an optimizer keeps of it, averages most of all, once there is one.
        averages: What several averages of its gradients are, in words; None: there is one.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    view: View | None
    norm: str
    reason: str
    trainable: bool
    parameter: Tensor = field(repr=False, compare=False)
    lr: float | None = None
    sites: tuple[Site, ...] = field(default=(), repr=False, compare=False)
    copies: Team | None = field(default=None, repr=False, compare=False)
    owner: str | None = None
    inputs: str | None = None
    moment_bytes: int = 0
    inverse_bytes: int = 0
    state_bytes: int = 0
    averages: str | None = None

    @property
    def numel(self) -> int:
        """How many numbers the whole parameter has."""
        return math.prod(self.shape)

    def blocks(self) -> tuple[tuple[int, int, int], ...]:
        """Shapes (B, m, n) of its batches of matrices; empty without a view."""
        return self.view.blocks(self.shape) if self.view else ()


@dataclass(frozen=True)
class Plan(Sequence[PlanRow]):
    """One row per distinct parameter, in the order of the model. `str(plan)` is a table."""

    rows: tuple[PlanRow, ...]

    @overload
    def __getitem__(self, index: int) -> PlanRow: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[PlanRow]: ...
    def __getitem__(self, index: int | slice) -> PlanRow | Sequence[PlanRow]:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[PlanRow]:
        return iter(self.rows)

    def __str__(self) -> str:
        return self.table()

    @property
    def unknown(self) -> tuple[PlanRow, ...]:
        """Rows about which nothing is known; they are treated as vectors."""
        return tuple(row for row in self if row.reason.startswith(UNKNOWN))

    def row(self, name: str) -> PlanRow:
        """The row of a parameter.

        Args:
            name: As in `PlanRow.name`.

        Returns:
            Its row.

        Raises:
            KeyError: If no parameter has this name.
        """
        names = [row.name for row in self]
        if name not in names:
            raise KeyError(f"The plan has no parameter {name!r}.{near_miss(name, names)}")
        return self.rows[names.index(name)]

    def parameters(self, role: Role | None = None) -> list[Tensor]:
        """The trainable parameters of a role.

        Args:
            role: Which role; None for all.

        Returns:
            The parameters themselves, in the order of the model.
        """
        return [row.parameter for row in self if row.trainable and role in (None, row.role)]

    def counts(self) -> dict[Role, int]:
        """How many parameters (tensors) each role has, frozen ones included; roles without any are zero."""
        return {role: sum(row.role == role for row in self) for role in ROLES}

    def assert_counts(self, **expected: int) -> None:
        """Fails unless each named role has exactly so many parameters; a line for a training script or a test.

        Args:
            expected: Role to number of tensors, for example `matrix=48, embedding=2`.

        Raises:
            AssertionError: If a count differs; the message lists the parameters of that role.
            ValueError: If a name is not a role.
        """
        counts = {str(role): count for role, count in self.counts().items()}
        for role in expected:
            if role not in counts:
                raise ValueError(f"{role!r} is not a role. Roles are {', '.join(ROLES)}.{near_miss(role, ROLES)}")
        wrong = [
            f"{role}: expected {count}, found {counts[role]} ({counts[role] - count:+d}): "
            + (", ".join(row.name for row in self if row.role == role) or "none")
            for role, count in expected.items()
            if counts[role] != count
        ]
        if wrong:
            raise AssertionError("The plan has other counts than expected.\n" + "\n".join(wrong))

    def table(self, *, collapse: bool = True) -> str:
        """The plan as text.

        Args:
            collapse: One line for parameters that differ by a layer number only, which is then printed as *.

        Returns:
            Lines of name, shape, role, view, norm, learning rate (once there is one), what is kept of the layer's
            inputs and the bytes it takes (where something is), the ranks that work on it (where work is shared),
            numbers, tensors and reason, then totals.
        """
        alike: dict[tuple[str, ...], list[PlanRow]] = {}
        for row in self:
            alike.setdefault((_starred(row.name) if collapse else row.name, *_cells(row, collapse)), []).append(row)
        lines: list[tuple[str, ...]] = [
            (
                "parameter",
                "shape",
                "role",
                "view",
                "norm",
                "lr",
                "inputs",
                "bytes",
                "owner",
                "numbers",
                "tensors",
                "reason",
            )
        ]
        for (_, *cells, reason), rows in alike.items():
            name = ".".join(
                part[0] if len(set(part)) == 1 else "*"
                for part in zip(*(row.name.split(".") for row in rows), strict=True)
            )
            memory = sum(row.moment_bytes + row.inverse_bytes for row in rows)
            numbers = f"{sum(row.numel for row in rows):,}"
            owners = ", ".join(dict.fromkeys(row.owner or "-" for row in rows))
            kept = f"{memory:,}" if memory else "-"
            lines.append((name, *cells, kept, owners, numbers, str(len(rows)), reason))
        hidden = [5] * all(row.lr is None for row in self) + [6, 7] * all(row.inputs is None for row in self)
        hidden += [8] * all(row.owner is None for row in self)
        shown = [tuple(cell for place, cell in enumerate(line) if place not in hidden) for line in lines]
        return "\n".join((*aligned(shown), "", *aligned(self._totals()), *self._memory()))

    def _memory(self) -> list[str]:
        moments, inverses = sum(row.moment_bytes for row in self), sum(row.inverse_bytes for row in self)
        state, numbers = sum(row.state_bytes for row in self), sum(row.numel for row in self if row.state_bytes)
        lines = ["", f"averages and counts: {state:,} bytes, {state / numbers:.1f} for each number"] if state else []
        if any(row.averages for row in self):
            kinds: dict[str, list[str]] = {}
            for row in self:
                kinds.setdefault(row.averages or "one average", []).append(row.role)
            lines += [f"gradients of {', '.join(dict.fromkeys(own))}: {kind}" for kind, own in kinds.items()]
        if not moments:
            return lines
        return [
            *(lines or [""]),
            f"moments of layer inputs: {moments:,} bytes, their inverses or powers: {inverses:,} bytes",
        ]

    def to_json(self) -> str:
        """The plan as a JSON list of rows, views as text; for `--json` and for keeping next to a run."""
        return json.dumps(
            [
                {
                    "name": row.name,
                    "shape": list(row.shape),
                    "role": row.role,
                    "view": str(row.view) if row.view else None,
                    "norm": row.norm,
                    "lr": row.lr,
                    "owner": row.owner,
                    "inputs": row.inputs,
                    "moment_bytes": row.moment_bytes,
                    "inverse_bytes": row.inverse_bytes,
                    "state_bytes": row.state_bytes,
                    "averages": row.averages,
                    "numel": row.numel,
                    "trainable": row.trainable,
                    "reason": row.reason,
                }
                for row in self
            ],
            indent=1,
        )

    def _totals(self) -> list[tuple[str, ...]]:
        total = sum(row.numel for row in self)
        totals = [("total", "tensors", "numbers", "share")]
        for role in ROLES:
            numel = sum(row.numel for row in self if row.role == role)
            share = f"{numel / total:.1%}" if total else "-"
            totals.append((role, str(self.counts()[role]), f"{numel:,}", share))
        totals.append(("all", str(len(self)), f"{total:,}", f"{len(self.unknown)} unknown"))
        return totals


def _starred(name: str) -> str:
    """The name with layer numbers as stars."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def _cells(row: PlanRow, collapse: bool) -> tuple[str, ...]:
    """What rows of one line have in common."""
    shape = "x".join(map(str, row.shape)) or "scalar"
    lr = "-" if row.lr is None else f"{row.lr:g}"
    inputs = row.inputs or "-"
    reason = row.reason if row.trainable else f"frozen; {row.reason}"
    view = str(row.view) if row.view else "-"
    return (shape, row.role, view, row.norm, lr, _starred(inputs) if collapse else inputs, reason)


def aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Columns padded to one width; those of numbers to the right.

    Args:
        rows: The first has the names of the columns.
    """
    columns = list(zip(*rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [column[0] in ("bytes", "numbers", "tensors", "share") for column in columns]
    padded = [
        [
            cell.rjust(width) if flush else cell.ljust(width)
            for cell, width, flush in zip(row, widths, right, strict=True)
        ]
        for row in rows
    ]
    return ["  ".join(cells).rstrip() for cells in padded]
