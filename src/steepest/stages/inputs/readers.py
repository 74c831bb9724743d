"""Which parameters read which inputs: the plan of the moments, made before any input was seen.

Query, key and value maps read one tensor, and so do the gate and up maps of a gated MLP. Such layers are told by their
names here, so that memory can be planned; the first refresh sees the tensors themselves and has the last word.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, cast

from torch import Tensor, nn

from steepest.anatomy.plan import PlanRow
from steepest.anatomy.roles import classify
from steepest.anatomy.views import CONV1D, LINEAR, View
from steepest.names import near_miss
from steepest.stages.inputs.feeds import Feed, find_feed, joined
from steepest.stages.inputs.moments import MomentLayout, layout_for
from steepest.stages.inputs.options import InputMoment

_FAMILIES = (
    re.compile(r"^(to_|w_?|in_proj_)?(q|k|v)(_?(proj|lin|linear))?$|^(query|key|value)s?(_(proj|layer))?$|^w(q|k|v)$"),
    re.compile(r"^(gate|up)(_proj)?$|^(w1|w3)$|^wi_[01]$"),
)


@dataclass(frozen=True, eq=False)
class Reader:
    """A parameter that is multiplied with inputs.

    Args:
        row: Of the plan.
        view: How the parameter is a stack of matrices, one per vector of inputs.
        layout: Of its moment.
        group: Readers with one group are expected to read the same inputs.
        feeds: The modules that multiply with it, and how their calls show the inputs.
        unseen: Why hooks do not show them, if they do not.
    """

    row: PlanRow
    view: View
    layout: MomentLayout
    group: int
    feeds: tuple[tuple[nn.Module, Feed], ...] = field(repr=False)
    unseen: str | None

    @property
    def parameter(self) -> Tensor:
        """The parameter itself."""
        return self.row.parameter

    def __reduce__(self) -> tuple[Any, ...]:
        """Feeds hold functions, which pickle does not take; they are found again."""
        return _rebuilt, (self.row, self.view, self.layout, self.group, bool(self.feeds))


def find_readers(rows: Sequence[PlanRow], options: InputMoment) -> list[Reader]:
    """The readers among parameters.

    Args:
        rows: Of the roles that are preconditioned, in the order of the model; matrices have a view.
        options: Which structure each has, and whether there are hooks.

    Returns:
        One per row whose structure is not "none".

    Raises:
        ValueError: If blocks do not divide a fan-in, a parameter is a table and a head, or a head is divided among
            ranks so that nobody has whole rows of its gradient.
    """
    rows = list(_reading(rows))
    blocks = [joined(cast(View, row.view)).blocks(row.shape)[0] for row in rows]
    keys = [_group_key(row, stack, fan_in) for row, (stack, _, fan_in) in zip(rows, blocks, strict=True)]
    outputs: dict[tuple[object, ...], int] = {}
    for key, (_, fan_out, _) in zip(keys, blocks, strict=True):
        outputs[key] = outputs.get(key, 0) + fan_out
    groups: dict[tuple[object, ...], int] = {}
    readers: list[Reader] = []
    for row, key, (stack, fan_out, fan_in) in zip(rows, keys, blocks, strict=True):
        view = cast(View, row.view)
        cuts = view.heads if isinstance(view.heads, tuple) else (view.heads or 1,)
        heads = math.lcm(*cuts) if view.heads_dim == "in" else 1  # blocks that fit into the heads of every fused part
        layout = layout_for(
            options,
            row.name,
            stack=stack,
            fan_in=fan_in,
            fan_out=fan_out,
            readers=outputs[key],
            heads=heads,
            role=row.role,
        )
        if layout is None:
            continue
        if row.role != "matrix":
            _refuse_tied(row)
            _refuse_cut(row, layout)
        group = groups.setdefault((key, layout), len(groups))
        readers.append(_rebuilt(row, joined(view), layout, group, options.hooks))
    return readers


def _reading(rows: Sequence[PlanRow]) -> Iterator[PlanRow]:
    """Rows with the views by which parameters read; without tables that no module looks up by numbers, and biases."""
    for row in rows:
        if row.role == "matrix":
            yield row
        elif len(row.shape) == 2 and (row.view is not None or row.role == "head"):
            yield replace(row, view=CONV1D if row.role == "embedding" else row.view or LINEAR)


def _refuse_tied(row: PlanRow) -> None:
    if len({classify(site).role == "embedding" for site in row.sites}) > 1:
        raise ValueError(
            f"InputMoment: {row.name!r} is a table and a head ({', '.join(site.name for site in row.sites)}): its "
            "gradient is a sum of two, of which each has other inputs, so that no moment fits it. Leave it as it is "
            f"with structure={{{row.name!r}: 'none'}} or without the role {row.role!r}, or do not tie the two."
        )


def _refuse_cut(row: PlanRow, layout: MomentLayout) -> None:
    """What ranks keep of a gradient is multiplied where it is, so that rows of a head must be whole."""
    outputs = 1 if cast(View, row.view).transposed else 0
    placements: Sequence[Any] = getattr(row.parameter, "placements", ())
    cut = {one.dim % 2 for one in placements if getattr(one, "dim", None) is not None}
    if layout.structure != "diagonal" and cut - {outputs}:
        raise ValueError(
            f"InputMoment: {row.name!r} of shape {tuple(row.shape)} is placed as {tuple(placements)}, so that no rank "
            f"has what belongs to all inputs of an output. Divide it along dimension {outputs}, or leave it as it is "
            f"with structure={{{row.name!r}: 'none'}} or without the role {row.role!r}."
        )


def refuse_unmatched(options: InputMoment, names: Sequence[str]) -> None:
    """Refuse structures for names that no matrix has.

    Args:
        options: Which structure each has.
        names: Of the parameters of the roles that are preconditioned.

    Raises:
        ValueError: If a pattern matches none.
    """
    for pattern in () if isinstance(options.structure, str) else options.structure:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"InputMoment: the structure of {pattern!r} is given, but no {' or '.join(options.roles)} has such a "
                f"name.{near_miss(pattern, names)}"
            )


def _rebuilt(row: PlanRow, view: View, layout: MomentLayout, group: int, hooks: bool) -> Reader:
    found = [(site.module, find_feed(site, row)) for site in row.sites] if hooks else []
    feeds = tuple((module, feed) for module, feed in found if isinstance(feed, Feed))
    reasons = [feed for _, feed in found if isinstance(feed, str)]
    unseen = reasons[0] if reasons else None if feeds else "no module is known for it"
    return Reader(row, view, layout, group, feeds, unseen)


def _group_key(row: PlanRow, stack: int, fan_in: int) -> tuple[object, ...]:
    """The same for layers that are expected to read the same inputs: siblings whose names say so."""
    if len(row.sites) != 1:
        return (row.name,)
    site = row.sites[0]
    for number, family in enumerate(_FAMILIES):
        if family.search(site.attribute):
            return (id(site.owner), number, site.leaf, stack, fan_in)
    return (row.name,)
