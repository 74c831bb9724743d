"""The part of a step for which layers must know of each other: the product norm, and how much of the step is taken.

With s_l = lr_l (constrained) or sqrt(lr_l) (regularised), a block moves by

    constrained   t · lr_l · c_l · D_l            norm tree over ‖W_l‖ / lr_l,         Q = N
    regularised   t · sqrt(lr_l) · N c_l · D_l    norm tree over ‖W_l‖ / sqrt(lr_l),   Q = N²

where N and c_l come from the tree at the dual norms s_l a_l. Doubling every learning rate doubles the step either way.
"""

import itertools
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from steepest.anatomy import ROLES
from steepest.checks import choice, flag
from steepest.geometry import Product, get_product
from steepest.names import unknown_name
from steepest.optim.diagnostics import StepRecord
from steepest.optim.momo import Decision, Heard, Losses
from steepest.optim.move import Aim, Move
from steepest.ranks import scalar_type, summed

DualMode = Literal["cached", "stale"]


class Combine:
    """Makes one step of the moves of all loads.

    Args:
        product: The tree of norms, or its name.
        losses: Of the optimizer.
        regularized: Whether steps are longer where gradients are (regularised descent) or of a fixed norm.
        dual: Where a global number must be known before the first weight can move: "cached" keeps all directions until
            then; "stale" takes the dual norms of matrices from the step before.

    Raises:
        ValueError: If an option is not known.
        TypeError: If an option is of the wrong type.
    """

    def __init__(self, product: str | Product, losses: Losses, *, regularized: bool, dual: DualMode) -> None:
        self.product = get_product(product)
        self.regularized = flag("regularized", regularized)
        self.dual: DualMode = choice(get_args(DualMode))("dual", dual)
        self._losses = losses

    @property
    def method(self) -> str:
        """What steps are, in words: what the learning rates in a state mean."""
        return f"steepest {'regularised' if self.regularized else 'constrained'} descent, product={self.product!r}"

    @property
    def streams(self) -> bool:
        """Whether every load can be finished before the next is begun."""
        return self._losses.momo is None and self.product.separable(regularized=self.regularized)

    @property
    def needs_duals(self) -> str | None:
        """What needs dual norms, in words; None: nothing."""
        if self.streams and not self.regularized:
            return None
        return "Momo" if self._losses.momo else "regularised descent" if self.regularized else f"product={self.product}"

    @property
    def keeps_duals(self) -> bool:
        """Whether dual norms of the last step are used."""
        return self.dual == "stale" and not self.streams

    def label(self, group: Mapping[str, Any]) -> str:
        """The group's place in the product norm: its name if the tree has it, else its role.

        Raises:
            ValueError: If the tree has neither.
        """
        labels = self.product.labels()
        label: str = group["name"] if group.get("name") in labels else group["role"]
        self.product.covering([label])
        return label

    def check_labels(self, names: Sequence[str | None]) -> None:
        """Refuse a tree with a label that nothing answers to: its group would silently get the place of its role.

        Args:
            names: Of the groups.

        Raises:
            ValueError: If a label is neither a role nor one of these.
        """
        known = [*ROLES, *(name for name in names if name)]
        for label in self.product.labels():
            if label not in known:
                raise ValueError(f"product={self.product}: {unknown_name('role or group', label, known)}")

    def take(
        self, moves: Sequence[Move], heard: Heard, accept: Tensor | None, record: StepRecord
    ) -> list[bool | Tensor]:
        """Make the moves.

        A move that would leave weights that are not finite is not made, though its averages go on; where all
        directions are known before the first weight moves, none is made then.

        Args:
            moves: Of this step, at least one.
            heard: Of the loss; where it is not known, Momo takes the whole step.
            accept: A 0-d boolean by which every write is masked; None means True.
            record: Takes note.

        Returns:
            Of each move, whether it is finite; a 0-d boolean where that is not waited for.
        """
        if self.streams:
            return self._stream(moves)
        slopes = self._losses.momo is not None and heard.loss is not None
        for move in moves:
            move.advance()
        duals = self._duals(moves, slopes=slopes)
        factors, total = self._factors(moves, duals)
        record.note(dual_norm=total)
        decrease = total.square() if self.regularized else total
        pull: Tensor | None = None
        if slopes and any(move.bends for move in moves):
            decrease, pull = self._along_arcs(moves, duals, factors, decrease)
        decision = self._losses.decide(heard, moves, total, decrease=decrease, pull=pull, record=record)
        gained = torch.zeros_like(total)
        if decision and decision.inner.decay.ndim:  # of each of several averages
            gained = torch.zeros_like(decision.inner.decay)
        if decision:
            t = decision.chosen.t
            t = t if accept is None else torch.where(accept.to(total.device), t, 0.0)
            factors = [factor * t for factor in factors]
            gained += decision.inner.decay
        solid = self._solid(decrease, decision, read=accept is None)
        fine = self._write(moves, factors, solid, gained, slopes=slopes)
        known = every([True if accept is None else accept, solid])
        self._losses.moved(decision, gained, False if solid is False else known)
        self._losses.note(moves)
        return fine

    def _stream(self, moves: Sequence[Move]) -> list[bool | Tensor]:
        """One load after the other, none waiting for another; on several ranks the next one is on its way meanwhile."""
        fine: list[bool | Tensor] = []
        leaving: deque[Move] = deque()
        for move, follower in itertools.zip_longest(moves, moves[1:]):
            if not move.averaged:
                move.advance()
            move.depart()
            if follower is not None and follower.portion.travels:
                follower.advance()
                follower.depart()
            duals = move.aim(duals=self.regularized).duals
            if duals is not None:
                _share([move])
                duals = move.aimed.duals if move.aimed else None
            factors = None if duals is None else _wide(duals) * self._scale(move)
            move.prepare(self._scale(move), factors)
            leaving.append(move)
            while leaving and (not move.portion.shared or len(leaving) > 1):
                fine.append(leaving[0].settle())
                leaving.popleft().write(fine[-1])
        for move in leaving:
            fine.append(move.settle())
            move.write(fine[-1])
        return fine

    def _write(
        self,
        moves: Sequence[Move],
        factors: Sequence[Tensor],
        solid: bool | Tensor,
        gained: Tensor,
        *,
        slopes: bool,
    ) -> list[bool | Tensor]:
        """Move the weights, and add to `gained` what that is predicted to gain."""
        together = all(move.aimed for move in moves)
        several = slopes and moves[0].averages is not None
        parts: list[Tensor | None] = []
        fine: list[bool | Tensor] = []
        for move, factor in zip(moves, factors, strict=True):
            if move.aimed is None:
                move.aim(duals=True, slopes=slopes)
            if not move.told:
                _share([move])
            aim = cast(Aim, move.aimed)
            part = None
            flags = [solid]
            if several and move.arc is not None:
                lengths = factor.to(move.arc.squares) * self._scale(move)
                part = move.arc.gained(lengths, cast(Tensor, move.arc_gains)).sum(-1).to(gained.device)
                finite = part.isfinite().all()
                flags.append(finite if isinstance(solid, Tensor) else bool(finite))
            elif aim.slopes is not None:
                if move.arc is not None:
                    lengths = factor.to(move.arc.squares) * self._scale(move)
                    part = move.arc.gained(lengths, _wide(aim.slopes)).sum().to(gained.device)
                else:
                    part = (_wide(aim.slopes) * self._scale(move)).to(gained.device).mul(factor).sum()
                flags.append(part.isfinite() if isinstance(solid, Tensor) else math.isfinite(float(part)))
            parts.append(part)
            move.prepare(self._scale(move), factor)
            fine.append(every([*flags, move.settle()]))
            if several and move.arc is None:
                parts[-1] = move.gained().to(gained)
                if not together:  # a load that is written before the next is looked at
                    last: list[Tensor | None] = [parts[-1]]
                    fine[-1] = every([fine[-1], *_settled([move], last, solid)])
                    parts[-1] = last[0]
            if self.dual == "stale" and move.norm.matrix and fine[-1] is not False:
                move.remember_duals(cast(Tensor, aim.duals), fine[-1])
            if not together:
                move.write(fine[-1])
        if together:
            fine += _settled(moves, parts, solid) if several else []
            fine = [every(fine)] * len(moves)
            for move, own in zip(moves, fine, strict=True):
                move.write(own)
            gained.copy_(_where(fine[0], gained))
        for part, own in zip(parts, fine, strict=True):
            if part is not None:
                gained += _where(own, part)
        return fine

    def _along_arcs(
        self, moves: Sequence[Move], duals: Sequence[Tensor], factors: Sequence[Tensor], decrease: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What the whole step is predicted to gain at its start where weights stay on spheres; what their return does.

        Args:
            moves: Of this step.
            duals: Of each.
            factors: Of each, t left out.
            decrease: What the step would gain along straight lines.
        """
        bent = [move for move in moves if move.bends]
        parts = [move.along_arc() for move in bent]
        shared = [own for move, part in zip(bent, parts, strict=True) if move.portion.shared for own in part]
        added = iter(summed(shared, bent[0].portion.team))
        for move, part in zip(bent, parts, strict=True):
            move.take_arc([next(added) for _ in part] if move.portion.shared else part)
        pull = torch.zeros_like(decrease)
        for move, own, factor in zip(moves, duals, factors, strict=True):
            if move.arc is not None:
                gains = _wide(own)
                radial = (gains - move.arc.slopes(gains)) * self._scale(move)
                decrease = decrease - radial.to(decrease.device).mul(factor).sum()
                pull += move.arc.pull().to(pull.device)
        return decrease, pull

    def _solid(self, decrease: Tensor, decision: Decision | None, *, read: bool) -> bool | Tensor:
        """Whether the numbers of the whole step are finite; the device is not waited for."""
        solid = torch.stack([decrease, *(decision.numbers() if decision else ())]).isfinite().all()
        return bool(solid) if read and solid.device.type == "cpu" else solid

    def _scale(self, move: Move) -> float | Tensor:
        """s, the learning rate as it enters the norm."""
        if not self.regularized:
            return move.lr
        return move.lr.sqrt() if isinstance(move.lr, Tensor) else math.sqrt(move.lr)

    def _duals(self, moves: Sequence[Move], *, slopes: bool) -> list[Tensor]:
        """Of this step, or, where these are stale, of the one before."""
        known = [move.known_duals() if self.dual == "stale" and move.norm.matrix else None for move in moves]
        aiming = [move for move, own in zip(moves, known, strict=True) if own is None]
        for move, follower in itertools.zip_longest(aiming, aiming[1:]):
            move.depart()
            if follower is not None and follower.portion.travels:
                follower.depart()
            move.aim(duals=True, slopes=slopes)
        _share(aiming)
        return [
            cast(Tensor, cast(Aim, move.aimed).duals) if own is None else own
            for move, own in zip(moves, known, strict=True)
        ]

    def _factors(self, moves: Sequence[Move], duals: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """What multiplies s · D of each block, t left out: one 0-d or (blocks,) tensor per move; and N."""
        device = moves[0].device
        scaled = [(_wide(own) * self._scale(move)).to(device) for move, own in zip(moves, duals, strict=True)]
        by_label: dict[str, list[Tensor]] = {}
        for move, own in zip(moves, scaled, strict=True):
            by_label.setdefault(move.label, []).append(own)
        combined = self.product.covering(list(by_label)).combine({k: torch.cat(v) for k, v in by_label.items()})
        if self.regularized and self.product.separable(regularized=True):
            return scaled, combined.total  # N · c_l exactly, as when streaming
        parts: dict[str, Iterator[Tensor]] = {}
        for label, own in by_label.items():
            whole = combined.coefficients[label]
            parts[label] = iter(whole.split([len(part) for part in own]) if whole.ndim else [whole] * len(own))
        scale = combined.total if self.regularized else torch.ones_like(combined.total)
        return [scale * next(parts[move.label]) for move in moves], combined.total


def _share(moves: Sequence[Move]) -> None:
    """Tell all ranks the dual norms and slopes of each other's matrices, in one exchange."""
    shared = [move for move in moves if move.portion.shared]
    if shared:
        parts = [move.numbers() for move in shared]
        found = iter(summed([own for part in parts for own in part], shared[0].portion.team))
        for move, part in zip(shared, parts, strict=True):
            move.take_numbers([next(found) for _ in part])


def _settled(moves: Sequence[Move], parts: list[Tensor | None], solid: bool | Tensor) -> list[bool | Tensor]:
    """Make what moves are predicted to gain, rank by rank, that of all ranks, in one exchange.

    Args:
        moves: Each with its part.
        parts: Written to.
        solid: A 0-d boolean where the device is not waited for.

    Returns:
        Whether each is finite.
    """
    shared = [place for place, move in enumerate(moves) if move.portion.shared and move.arc is None]
    given = [cast(Tensor, parts[place]) for place in shared]
    for place, own in zip(shared, summed(given, moves[0].portion.team) if shared else (), strict=True):
        parts[place] = own
    flags = [cast(Tensor, part).isfinite().all() for part in parts]
    return list(flags) if isinstance(solid, Tensor) else [bool(flag) for flag in flags]


def every(flags: Sequence[bool | Tensor]) -> bool | Tensor:
    """Whether all hold; a 0-d boolean where one of them is not waited for."""
    unread = [flag for flag in flags if isinstance(flag, Tensor)]
    if any(flag is False for flag in flags) or not unread:
        return all(flag is True for flag in flags)
    return torch.stack([flag.to(unread[0].device) for flag in unread]).all()


def _where(flag: bool | Tensor, number: Tensor) -> Tensor:
    """The number, or 0 where the flag is not set."""
    if isinstance(flag, Tensor):
        return torch.where(flag.to(number.device), number, 0.0)
    return number if flag else torch.zeros_like(number)


def _wide(numbers: Tensor) -> Tensor:
    return numbers.to(scalar_type(numbers.device))
