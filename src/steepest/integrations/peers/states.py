"""The averages that another library's optimizer left, as the averages of ours.

With b a peer's weight of the old average and t steps taken, peers keep one of

    m_t = b m_{t-1} + (1-b) g_t     weights sum to 1 - b^t               torch, KellerJordan, Emerging-Optimizers, ...
    s_t = b s_{t-1} + g_t           weights sum to (1 - b^t) / (1 - b)   dion

and we keep the first form and divide by 1 - β^t where magnitudes count. What stays is the plain average, whose weights
sum to one: a peer's buffer is divided by the sum of its weights and multiplied by 1 - β^t. With β = b that is the
buffer itself, or (1 - b) times it, so going on is going on with the peer: the same directions, which do not depend on
the scale of a buffer but do on its scale beside the next gradient, and dual norms of the right size. With β other than
b, the average is the peer's and forgets at our rate from then on. Where several averages are followed here, each begins
with the peer's mean.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from steepest.anatomy import PlanRow, aligned
from steepest.checks import choice, instance, refusal
from steepest.integrations.peers.reading import Found, Names, Told, check_steps, read
from steepest.integrations.peers.sources import SOURCES
from steepest.names import near_miss
from steepest.optim import SteepestDescent
from steepest.optim.groups import averages_of
from steepest.optim.state import DUAL, MOMENTUM, SECOND, STEP, momenta
from steepest.stages import RowScaling
from steepest.stages.rows import ROW_MOMENT
from steepest.stages.stage import state_dtype

State = Mapping[str, Any]


@dataclass(frozen=True)
class ReportRow:
    """What became of one parameter.

    Args:
        name: In this optimizer.
        taken: Its entries that came from the peer; empty: it goes on with what it had.
        steps: How many gradients they average.
        reason: Where they came from and what was done to them, or why none came.
    """

    name: str
    taken: tuple[str, ...]
    steps: int
    reason: str


@dataclass(frozen=True)
class Report:
    """What an import has taken, what it has not, and why. `str(report)` is a table.

    Args:
        rows: One for each parameter of the optimizer that can be trained.
        unused: What the peer kept and nobody took, with the reason.
        notes: What else differs and is not carried over.
    """

    rows: tuple[ReportRow, ...]
    unused: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]

    @property
    def taken(self) -> tuple[str, ...]:
        """Names of parameters that go on with the peer's averages."""
        return tuple(row.name for row in self.rows if row.taken)

    @property
    def missing(self) -> tuple[str, ...]:
        """Names of parameters for which nothing came."""
        return tuple(row.name for row in self.rows if not row.taken)

    def __str__(self) -> str:
        lines = [("parameter", "taken", "steps", "how, or why not")]
        lines += [(row.name, ", ".join(row.taken) or "-", str(row.steps), row.reason) for row in self.rows]
        told = [f"not taken: {what}: {why}" for what, why in self.unused] + [f"note: {note}" for note in self.notes]
        total = f"taken for {len(self.taken)} of {len(self.rows)} parameters"
        return "\n".join([*aligned(lines), "", total, *told])


@torch.no_grad()
def import_state(
    optimizer: SteepestDescent,
    saved: State | Sequence[State],
    source: str | Sequence[str],
    names: Names | Sequence[Names | None] | None = None,
    *,
    steps: int | None = None,
    fused: Mapping[str, Sequence[str]] | None = None,
) -> Report:
    """Go on with the averages that optimizers of other libraries have made. Options stay those of this optimizer.

    All of it is looked at before anything changes; what does not fit is refused, and then nothing is taken.

    Args:
        optimizer: Built as usual, for the same model.
        saved: What `state_dict()` of the old optimizer returned, or several of them, as of Muon and AdamW side by side,
            or of all ranks of one whose ranks keep different parts. Load files with `weights_only=True`.
        source: Whose it is, a key of `SOURCES`; of several, one for all or one for each.
        names: Of the old optimizer's parameters, in the order in which it was given them: of all its groups one after
            the other, or a list for each group. Of several optimizers, one such list for each. None: the names that
            the state itself has, as torch keeps them of named parameters.
        steps: How many gradients were averaged, where the state does not say, as with `torch.optim.Muon`.
        fused: Where a layer is one parameter on one side and several on the other: the name of the one, and the names
            of those whose rows it has, in order.

    Returns:
        What was taken, what was not, and why. `missing` names parameters that begin anew.

    Raises:
        ValueError: If a source or a name is unknown, a shape or a number of parameters does not fit, names or counts of
            steps are needed, or something could be meant in two ways.
        TypeError: If something is of the wrong type.

    Examples:
        >>> layer = torch.nn.Linear(2, 2, bias=False)
        >>> old = torch.optim.Muon(layer.parameters())
        >>> layer.weight.sum().backward()
        >>> old.step()
        >>> new = SteepestDescent(layer.named_parameters())
        >>> import_state(new, old.state_dict(), "torch.optim.Muon", ["weight"], steps=1).taken
        ('weight',)
    """
    instance(SteepestDescent, "an optimizer of this library")("optimizer", optimizer)
    steps = None if steps is None else check_steps("steps", steps)
    plan, own = optimizer.plan, optimizer.state_dict()
    rows = {row.name: row for row in plan}
    found: dict[str, Found] = {}
    told = Told()
    joined = set(_joined(fused))
    each = _each(saved, source, names)
    for one, whose, called in each:
        ranks = [other for other, *what in each if what == [whose, called]] if SOURCES[whose].sorts else [one]
        for name, state in read(one, ranks, SOURCES[whose], called, rows, joined, steps, told).items():
            if name in found and not found[name].same(state):
                raise ValueError(
                    f"Two of the states have different averages of {name!r}. Leave out all but the one to go on with."
                )
            found[name] = state
    _join(found, rows, fused or {})
    if strange := [name for name in found if name not in rows]:
        raise ValueError(_stranger(strange[0], rows))
    groups = {index: group for group in own["param_groups"] for index in group["params"]}
    states: dict[Any, dict[str, Any]] = dict(own["state"])
    report: list[ReportRow] = []
    for (index, group), row in zip(groups.items(), plan, strict=True):
        if not row.trainable and row.name not in found:
            continue
        state, line = _converted(found.get(row.name), row, group, optimizer, told)
        report.append(line)
        if state:  # other entries stay, but dual norms are of other averages
            kept = {key: value for key, value in states.get(index, {}).items() if key != DUAL}
            states[index] = {**kept, **state}
    done = Report(tuple(report), tuple(told.unused.items()), tuple(told.notes))
    if not done.taken:
        raise ValueError(f"Nothing could be taken.\n{done}")
    optimizer.load_state_dict({**own, "state": states})
    return done


def _each(saved: Any, source: Any, names: Any) -> list[tuple[State, str, Names | None]]:
    """States one by one, each with whose it is and what its parameters are called."""
    several = isinstance(saved, list | tuple)
    states: list[Any] = list(cast(Sequence[Any], saved)) if several else [saved]
    whose: list[Any] = list(cast(Sequence[Any], source)) if isinstance(source, list | tuple) else [source] * len(states)
    called: list[Any] = [names] if not several else [None] * len(states) if names is None else list(names)
    for what, given in (("source", whose), ("names", called)):
        if len(given) != len(states):
            raise ValueError(
                f"{what}: {len(given)} for {len(states)} states. Give one for each state"
                f"{', or one text for all' if what == 'source' else ', None for one that has names'}."
            )
    for one in whose:
        choice(tuple(SOURCES))("source", one)
    return list(zip(states, whose, called, strict=True))


def _joined(fused: object) -> list[str]:
    """All names in `fused`, which is checked."""
    if fused is None:
        return []
    expected = "a mapping from a name to a list of names"
    if not isinstance(fused, Mapping):
        raise TypeError(refusal("fused", expected, fused))
    listed: list[str] = []
    for whole_name, pieces in cast(Mapping[Any, Any], fused).items():
        parts: list[Any] = list(cast(Sequence[Any], pieces)) if isinstance(pieces, list | tuple) else []
        if not parts or not all(isinstance(one, str) for one in (whole_name, *parts)):
            raise TypeError(refusal("fused", expected, fused))
        listed += [whole_name, *parts]
    if len(set(listed)) != len(listed):
        twice = next(name for name in listed if listed.count(name) > 1)
        raise ValueError(f"fused: {twice!r} stands there twice; a parameter is fused in one way.")
    return listed


def _join(found: dict[str, Found], rows: Mapping[str, PlanRow], fused: Mapping[str, Sequence[str]]) -> None:
    """Put pieces together, or take a whole apart, along the first dimension; written to `found`."""
    for one, pieces in fused.items():
        if one in rows and all(piece in found for piece in pieces):
            found[one] = _together([found.pop(piece) for piece in pieces], pieces)
            if found[one].first.shape != torch.Size(rows[one].shape):
                raise ValueError(
                    f"fused: {', '.join(pieces)} have together the shape {tuple(found[one].first.shape)}, but {one!r} "
                    f"has {rows[one].shape}."
                )
        elif one in found and all(piece in rows for piece in pieces):
            taken, shapes = found.pop(one), [rows[piece].shape for piece in pieces]
            sizes = [shape[0] if shape else 1 for shape in shapes]
            shape = tuple(taken.first.shape)
            if not shape or sum(sizes) != shape[0] or any(own[1:] != shape[1:] for own in shapes):
                raise ValueError(
                    f"fused: {one!r} has the shape {shape}, which is not that of "
                    f"{', '.join(f'{piece} {rows[piece].shape}' for piece in pieces)} one below the other."
                )
            for place, piece in enumerate(pieces):
                end = sum(sizes[: place + 1])
                found[piece] = _rows_of(taken, slice(end - sizes[place], end))
        else:
            raise ValueError(
                f"fused: {one!r} must be a parameter here and {', '.join(pieces)} averages in the state, or the other "
                f"way round. In the state: {', '.join(found) or 'nothing'}."
            )


def _together(parts: Sequence[Found], pieces: Sequence[str]) -> Found:
    first = parts[0]
    if not all(first.alike(part) for part in parts):
        raise ValueError(f"fused: the averages of {', '.join(pieces)} are not of one kind and count of steps.")
    return replace(
        first,
        first=torch.cat([part.first for part in parts]),
        second=None if first.second is None else torch.cat([cast(Tensor, part.second) for part in parts]),
        rows=None if first.rows is None else torch.cat([cast(Tensor, part.rows) for part in parts]),
    )


def _rows_of(found: Found, cut: slice) -> Found:
    second, rows = (None if one is None else one[cut] for one in (found.second, found.rows))
    return replace(found, first=found.first[cut], second=second, rows=rows)


def _stranger(name: str, rows: Mapping[str, PlanRow]) -> str:
    return (
        f"The state has an average of {name!r}, which this optimizer does not have.{near_miss(name, list(rows))} Its "
        f"names are {', '.join(rows)}; give names= accordingly. Print optimizer.plan to see them with their shapes."
    )


def _converted(
    found: Found | None, row: PlanRow, group: Mapping[str, Any], optimizer: SteepestDescent, told: Told
) -> tuple[dict[str, Any], ReportRow]:
    """The state here, empty if there is none, and what the report says of it."""
    if found is None:
        return {}, ReportRow(row.name, (), 0, "the state has no average of it")
    norm, dtype = optimizer.norm_of(group), state_dtype(row.parameter)
    if norm.adapts and found.second is None:
        told.unused[f"{row.name} (average of gradients)"] = (
            "without an average of squares it means nothing to the norm here"
        )
        return {}, ReportRow(row.name, (), 0, f"{norm} needs an average of squares, and {found.title} kept none")
    beta, beta2, count = float(group["momentum"]), float(group["beta2"]), found.steps
    ratio = _debiased(beta, count) / _debiased(found.beta, count)
    factor = ratio * (1 - found.beta) if found.summed else ratio
    first = found.first.to(dtype) * factor
    state: dict[str, Any] = {STEP: count, MOMENTUM: first}
    averages = averages_of(group)
    if averages is not None:  # one count says how many gradients each holds, so none can begin with nothing
        for key, other in zip(momenta(len(averages))[1:], averages.betas[1:], strict=True):
            state[key] = first * (_debiased(other, count) / _debiased(beta, count))
    how = [f"{found.title}, b={found.beta:g}"]
    how += ["a sum of gradients, times 1-b"] if found.summed else []
    how += [f"averaged on with {beta:g}"] if beta != found.beta else []
    how += ["all averages begin with the same mean"] if averages is not None else []
    if norm.adapts and found.second is not None:
        state[SECOND] = found.second.to(dtype) * (_debiased(beta2, count) / _debiased(found.beta2, count))
        how += [f"squares averaged on with {beta2:g}, not {found.beta2:g}"] if beta2 != found.beta2 else []
    elif found.second is not None:
        told.unused[f"{row.name} (average of squares)"] = f"{norm} needs none"
    if found.rows is not None:
        _add_rows(state, found.rows.to(dtype), row, group, optimizer, told)
    return state, ReportRow(row.name, tuple(key for key in state if key != STEP), count, "; ".join(how))


def _add_rows(
    state: dict[str, Any],
    rows: Tensor,
    row: PlanRow,
    group: Mapping[str, Any],
    optimizer: SteepestDescent,
    told: Told,
) -> None:
    """NorMuon's average; ours is of directions with the scale of the norm, by the blocks of the view."""
    key = f"{row.name} (average of squares of rows)"
    norm, blocks = optimizer.norm_of(group), row.blocks()
    if not any(isinstance(stage, RowScaling) for stage in optimizer.stages) or norm.adapts or row.role != "matrix":
        told.unused[key] = "only RowScaling() keeps one"
    elif len(blocks) != 1 or rows.numel() != blocks[0][0] * blocks[0][1]:
        told.unused[key] = f"the rows of {row.view} here are others"
    else:
        scale = getattr(norm, "polar_scale", lambda *_: 1.0)(*blocks[0][1:])
        state[ROW_MOMENT] = rows.reshape(-1) * scale**2


def _debiased(beta: float, count: int) -> float:
    """Sum of the weights of an average of so many."""
    return 1 - beta**count
