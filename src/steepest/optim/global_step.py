"""The part of a step for which layers must know of each other: the product norm, and how much of the step is taken.

With s_l = lr_l (constrained) or sqrt(lr_l) (regularised), a block moves by

    constrained   t · lr_l · c_l · D_l            norm tree over ‖W_l‖ / lr_l,         Q = N
    regularised   t · sqrt(lr_l) · N c_l · D_l    norm tree over ‖W_l‖ / sqrt(lr_l),   Q = N²

where N and c_l come from the tree at the dual norms s_l a_l. Doubling every learning rate doubles the step either way.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from steepest.anatomy import ROLES, InputMoment, PlanRow
from steepest.checks import choice, flag
from steepest.geometry import Product, get_product
from steepest.names import unknown_name
from steepest.notices import warn
from steepest.optim.ball import beyond_ball
from steepest.optim.diagnostics import StepRecord
from steepest.optim.losses import Loss
from steepest.optim.move import Move
from steepest.optim.step_size import (
    Chosen,
    Fixed,
    Inner,
    LossModel,
    Momo,
    StepSize,
    check_step_size,
    choose,
    clipped,
    scalar_type,
)
from steepest.optim.weight_changes import Changes
from steepest.ranks import check_layout

DualMode = Literal["cached", "stale"]
RECENT = 10  # losses
BELOW = 20  # a batch may do better than the bound by chance, so many in a row do not

Group = dict[str, Any]


class GlobalStep:
    """Combines the moves of all buckets.

    Args:
        product: The tree of norms, or its name.
        regularized: Whether steps are longer where gradients are (regularised descent) or of a fixed norm.
        step_size: All of the step, or Momo's part; None: all.
        dual: Where a global number must be known before the first weight can move: "cached" keeps all directions until
            then; "stale" takes the dual norms of matrices from the step before.

    Raises:
        ValueError: If an option is not known.
        TypeError: If an option is of the wrong type.
    """

    def __init__(
        self, product: str | Product, *, regularized: bool, step_size: StepSize | None, dual: DualMode
    ) -> None:
        self.product = get_product(product)
        self.regularized = flag("regularized", regularized)
        self.step_size = check_step_size(Fixed() if step_size is None else step_size)
        self.dual: DualMode = choice(get_args(DualMode))("dual", dual)
        self.model: LossModel | None = None
        self._changes = Changes()
        self._averaged: tuple[float, list[Tensor]] | None = None  # momentum and parameters of the last step
        self._resync = False  # at the next step, whatever was averaged
        self._warned = False  # of decay
        self._below = 0  # losses below the bound, in a row
        self._below_before = False
        self._usual: float | None = None  # average of recent losses

    @property
    def momo(self) -> Momo | None:
        """The options of Momo, if steps are Momo's."""
        return self.step_size if isinstance(self.step_size, Momo) else None

    @property
    def method(self) -> str:
        """What steps are, in words: what the learning rates in a state mean."""
        return f"steepest {'regularised' if self.regularized else 'constrained'} descent, product={self.product!r}"

    @property
    def streams(self) -> bool:
        """Whether every bucket can be finished before the next is begun."""
        return self.momo is None and self.product.separable(regularized=self.regularized)

    def label(self, group: Group) -> str:
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

    def check_precondition(self, options: InputMoment) -> None:
        """Refuse momenta of preconditioned gradients where it must be known how the loss changes.

        Args:
            options: Of the preconditioning.

        Raises:
            ValueError: If dual norms are needed and gradients are preconditioned.
        """
        if options.on == "gradient" and (self.regularized or not self.streams):
            raise ValueError(
                "InputMoment(on='gradient') averages preconditioned gradients, which do not tell how the loss changes, "
                "as Momo, regularised descent and product norms need. Set on='momentum'."
            )

    def check_parts(self, row: PlanRow) -> None:
        """Refuse a sharded parameter where ranks would take different steps of it, or none.

        Args:
            row: Of the plan.

        Raises:
            ValueError: If so.
        """
        what = "Momo" if self.momo else "regularised descent" if self.regularized else f"product={self.product}"
        check_layout(row.name, row.parameter, whole=None if self.streams and not self.regularized else what)

    def check(self, groups: Sequence[Group]) -> None:
        """Refuse groups with different momenta under Momo: losses are averaged once, with the weights of all gradients.

        Warns, once, of a group whose lr · weight_decay is above 1.

        Args:
            groups: Those that move in this step.

        Raises:
            ValueError: If momenta differ.
        """
        momenta = [(group["role"], float(group["momentum"])) for group in groups]
        if self.momo and len({beta for _, beta in momenta}) > 1:
            found = ", ".join(f"{role} {beta:g}" for role, beta in momenta)
            raise ValueError(
                f"Momo needs one momentum for all groups, as losses are averaged like gradients, got {found}. Give "
                "momentum= and the first of betas= the same value."
            )
        self._warn_of_decay(groups)

    def _warn_of_decay(self, groups: Sequence[Group]) -> None:
        for group in () if self._warned else groups:
            if (product := beyond_ball(group)) is not None:
                self._warned = True
                warn(
                    f"lr · weight_decay is {product:.3g} for the role {group['role']!r}: above 1, weights are no "
                    "longer kept within norm 1 / weight_decay, and from 2 on they may grow without bound. Lower lr or "
                    "weight_decay.",
                )

    def take(
        self,
        moves: Sequence[Move],
        loss: Loss | None,
        accept: Tensor | None,
        record: StepRecord,
        clipping: Tensor | float | None = None,
        lower_bound: float = 0.0,
        *,
        parts: int = 1,
    ) -> list[bool | Tensor]:
        """Make the moves.

        A move that would leave weights that are not finite is not made, though its averages go on; where all
        directions are known before the first weight moves, none is made then.

        Args:
            moves: Of this step, at least one.
            loss: Of this step; None if it is not known, and then Momo takes the whole step.
            clipping: What the gradients of the loss were multiplied by, in (0, 1]; None: by nothing.
            parts: Number of micro-batches.
            accept: A 0-d boolean by which every write is masked; None means True.
            record: Takes note.
            lower_bound: What `bound` said.

        Returns:
            Of each move, whether it is finite; a 0-d boolean where that is not waited for.
        """
        if self.streams:
            return self._stream(moves, record)
        momo = self.momo if loss is not None else None
        model = self.model or LossModel.new(moves[0].device)
        for move in moves:
            move.advance()
        duals = [self._duals(move, momo) for move in moves]
        factors, total = self._factors(moves, duals)
        record.note(dual_norm=total)
        parameters = [parameter for move in moves for parameter in move.load.parameters]
        gained = torch.zeros_like(total)
        chosen = inner = None
        if momo and loss is not None:
            inner = self._inner(moves, momo, total)
            own = torch.as_tensor(loss, dtype=total.dtype, device=total.device)
            if clipping is not None:
                clipping = clipping.to(total) if isinstance(clipping, Tensor) else clipping
                own = clipped(own, clipping, model.bound if momo.lower_bound == "auto" else lower_bound)
            chosen = choose(
                momo,
                model,
                own,
                lower_bound=lower_bound,
                decrease=total.square() if self.regularized else total,
                inner=inner,
                beta=float(moves[0].group["momentum"]),
                ahead=any(move.ahead for move in moves),
                restart=self._changes.found(warn=not momo.direct),
                resync=self._set_changed(parameters, float(moves[0].group["momentum"])),
            )
            t = chosen.t if accept is None else torch.where(accept.to(total.device), chosen.t, 0.0)
            factors = [factor * t for factor in factors]
            gained += inner.decay
            self._report(chosen, loss, record, parts)
        solid = self._solid(total, inner, chosen, read=accept is None)
        fine = self._write(moves, factors, solid, gained, record, slopes=momo is not None)
        if chosen is not None and solid is not False:
            self.model = model.after(chosen, gained, _known(accept, solid))
        if self.momo:
            self._changes.note(parameters)
        return fine

    def _write(
        self,
        moves: Sequence[Move],
        factors: Sequence[Tensor],
        solid: bool | Tensor,
        gained: Tensor,
        record: StepRecord,
        *,
        slopes: bool,
    ) -> list[bool | Tensor]:
        """Move the weights, and add to `gained` what that is predicted to gain."""
        together = all(move.aimed for move in moves)
        parts: list[Tensor | None] = []
        fine: list[bool | Tensor] = []
        for move, factor in zip(moves, factors, strict=True):
            aim = move.aimed or move.aim(duals=True, slopes=slopes)
            part = None
            flags = [solid]
            if aim.slopes is not None:
                part = (_wide(aim.slopes) * self._scale(move)).to(gained.device).mul(factor).sum()
                flags.append(part.isfinite() if isinstance(solid, Tensor) else math.isfinite(float(part)))
            parts.append(part)
            fine.append(every([*flags, move.prepare(self._scale(move), factor, record)]))
            if self.dual == "stale" and move.norm.matrix and fine[-1] is not False:
                move.remember_duals(cast(Tensor, aim.duals), fine[-1])
            if not together:
                move.write(fine[-1])
        if together:
            fine = [every(fine)] * len(moves)
            for move, own in zip(moves, fine, strict=True):
                move.write(own)
            gained.copy_(_where(fine[0], gained))
        for part, own in zip(parts, fine, strict=True):
            if part is not None:
                gained += _where(own, part)
        return fine

    def _solid(self, total: Tensor, inner: Inner | None, chosen: Chosen | None, *, read: bool) -> bool | Tensor:
        """Whether the numbers of the whole step are finite; the device is not waited for."""
        own: list[Tensor] = []
        if inner and chosen:  # the bound may be given as minus infinity
            own = [inner.decay, inner.decay_ahead, chosen.value, chosen.intercept]
            own += [chosen.next_bound] if self.momo and self.momo.lower_bound == "auto" else []
        solid = torch.stack([total.square() if self.regularized else total, *own]).isfinite().all()
        return bool(solid) if read and solid.device.type == "cpu" else solid

    def bound(self, loss: Loss | None) -> float:
        """Momo's lower bound for a step with this loss; asked for before anything is written, as it may raise.

        Args:
            loss: Of the step; None if it is not known.
        """
        if self.momo is None or loss is None:
            return 0.0
        return self.momo.bound(self.model.calls if self.model else 0)

    def _stream(self, moves: Sequence[Move], record: StepRecord) -> list[bool | Tensor]:
        """One load after the other, none waiting for another."""
        fine: list[bool | Tensor] = []
        for move in moves:
            move.advance()
            duals = move.aim(duals=self.regularized).duals
            factors = None if duals is None else _wide(duals) * self._scale(move)
            fine.append(move.prepare(self._scale(move), factors, record))
            move.write(fine[-1])
        return fine

    def _set_changed(self, parameters: list[Tensor], beta: float) -> bool:
        """Whether averages are of other parameters, or with another momentum, than in the last step."""
        before, self._averaged = self._averaged, (beta, parameters)
        asked, self._resync = self._resync, False
        if before is None or asked:
            return asked
        return before[0] != beta or set(map(id, before[1])) != set(map(id, parameters))

    def _report(self, chosen: Chosen, loss: Loss, record: StepRecord, parts: int) -> None:
        """Note what was decided, and warn of a bound that losses stay below of; on an accelerator nobody looks."""
        record.note(t=chosen.t, gap=chosen.gap, lower_bound=chosen.bound)
        if chosen.bound.device.type != "cpu":
            return
        self._ask_about_division(float(loss), float(chosen.bound), parts)
        self._below = self._below + 1 if float(loss) < float(chosen.bound) else 0
        if self._below != BELOW:
            return
        warn(
            f"The loss was below Momo's lower_bound for {BELOW} steps, now {float(loss):.6g} below "
            f"{float(chosen.bound):.6g}: steps shrink to nothing there. Give a lower_bound below what can be reached; "
            "losses that can be negative need a negative one.",
        )

    def _ask_about_division(self, loss: float, bound: float, parts: int) -> None:
        """Warn of the first loss below the bound if it is the first of all, of parts, or far below those before."""
        usual, divided = self._usual, loss < bound and not self._below_before
        self._usual = loss if usual is None else usual + (loss - usual) / RECENT
        if not divided:
            return
        self._below_before = True
        first = usual is None and parts > 1 and not (self.model and self.model.calls)
        if first or (usual is not None and 0 < 2 * loss < usual):
            before = "the first loss" if usual is None else f"{usual:.6g}, the average of recent ones"
            warn(
                f"The loss {loss:.6g} is below Momo's lower_bound {bound:.6g}, so that steps shrink to nothing, and it "
                f"is {'' if usual is None else 'far below '}{before}. Was it divided by the number of micro-batches, "
                "as hosts do before backward? Momo needs the mean loss of the batch: "
                "record_loss(loss, weight=1 / micro_batches) with each loss before it is divided, or step(loss=mean)."
            )

    def _scale(self, move: Move) -> float | Tensor:
        """s, the learning rate as it enters the norm."""
        if not self.regularized:
            return move.lr
        return move.lr.sqrt() if isinstance(move.lr, Tensor) else math.sqrt(move.lr)

    def _duals(self, move: Move, momo: Momo | None) -> Tensor:
        """Of this step, or, where these are stale, of the one before."""
        known = move.known_duals() if self.dual == "stale" and move.norm.matrix else None
        return cast(Tensor, move.aim(duals=True, slopes=momo is not None).duals) if known is None else known

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

    def _inner(self, moves: Sequence[Move], momo: Momo, like: Tensor) -> Inner:
        """Inner products with the weights, of those moves that need them."""
        sums = [torch.zeros_like(like) for _ in range(4)]
        for move in moves:
            rate = move.group["weight_decay"]
            if momo.direct or rate > 0:
                plain, ahead, gradient = (_wide(x) for x in move.against_weights(gradients=momo.direct))
                decay = move.lr * rate
                for total, own in zip(sums, (plain, gradient, decay * plain, decay * ahead), strict=True):
                    total += own.to(like.device)
        return Inner(*sums)

    def saved(self, parameters: Sequence[Tensor]) -> dict[str, float]:
        """What a checkpoint must hold, as plain numbers; nothing without Momo.

        Args:
            parameters: All of the optimizer's.
        """
        if self.momo is None:
            return {}
        model = self.model or LossModel.new(torch.device("cpu"))
        own = {"momo_direct": float(self.momo.direct), "momo_weights": self._changes.saved(parameters)}
        return {**model.numbers(), **own}

    def load(self, saved: Mapping[str, Any], parameters: Sequence[Tensor]) -> None:
        """Continue from what `saved` returned; a checkpoint without it starts a new model of the loss.

        Args:
            saved: A group of a state dict.
            parameters: All of the optimizer's, at least one.
        """
        self._changes, self._averaged, self.model = Changes(), None, None
        if self.momo is None or float(saved.get("momo_steps", 0.0)) == 0:
            return
        self.model = LossModel.restored(saved, parameters[0].device)
        self._changes.load(parameters, saved["momo_weights"])
        self._resync = not saved["momo_direct"]  # then no intercept was kept

    def replaced(self) -> None:
        """Others stand where parameters stood, or some changed their shape: the model of the loss is not of them."""
        self._changes.replaced()

    @property
    def keeps_duals(self) -> bool:
        """Whether dual norms of the last step are used."""
        return self.dual == "stale" and not self.streams


def every(flags: Sequence[bool | Tensor]) -> bool | Tensor:
    """Whether all hold; a 0-d boolean where one of them is not waited for."""
    unread = [flag for flag in flags if isinstance(flag, Tensor)]
    if any(flag is False for flag in flags) or not unread:
        return all(flag is True for flag in flags)
    return torch.stack([flag.to(unread[0].device) for flag in unread]).all()


def _known(accept: Tensor | None, solid: bool | Tensor) -> Tensor | None:
    """Where both hold; None: everywhere."""
    both = every([True if accept is None else accept, solid])
    return both if isinstance(both, Tensor) else None


def _where(flag: bool | Tensor, number: Tensor) -> Tensor:
    """The number, or 0 where the flag is not set."""
    if isinstance(flag, Tensor):
        return torch.where(flag.to(number.device), number, 0.0)
    return number if flag else torch.zeros_like(number)


def _wide(numbers: Tensor) -> Tensor:
    return numbers.to(scalar_type(numbers.device))
