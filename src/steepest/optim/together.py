"""The part of a step for which layers must know of each other: the product norm, and how much of the step is taken.

With s_l = lr_l (constrained) or sqrt(lr_l) (regularised), a block moves by

    constrained   t · lr_l · c_l · D_l            norm tree over ‖W_l‖ / lr_l,         Q = N
    regularised   t · sqrt(lr_l) · N c_l · D_l    norm tree over ‖W_l‖ / sqrt(lr_l),   Q = N²

where N and c_l come from the tree at the dual norms s_l a_l. Doubling every learning rate doubles the step either way.
"""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from steepest.geometry import Product, get_product
from steepest.names import unknown_name
from steepest.optim.diagnostics import StepRecord
from steepest.optim.losses import Loss
from steepest.optim.move import Move
from steepest.optim.step_size import (
    MODEL_KEYS,
    Chosen,
    Fixed,
    Inner,
    LossModel,
    Momo,
    StepSize,
    check_step_size,
    choose,
)

DualMode = Literal["cached", "stale"]
SAME_WEIGHTS = 1e-5  # relative; of a sum over all weights in float32
CALLER = 6  # from the warning through this file, the step and torch's wrappers of it to the line that called step()

Group = dict[str, Any]


class Together:
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
        if not isinstance(cast(object, regularized), bool):
            raise TypeError(f"regularized must be True or False, got {regularized!r}.")
        self.regularized = regularized
        self.step_size = check_step_size(Fixed() if step_size is None else step_size)
        if dual not in get_args(DualMode):
            raise ValueError(unknown_name("dual", dual, get_args(DualMode)))
        self.dual = dual
        self.model: LossModel | None = None
        self._versions: dict[Tensor, int] = {}
        self._saved_fingerprint: float | None = None
        self._warned = False

    @property
    def momo(self) -> Momo | None:
        """The options of Momo, if steps are Momo's."""
        return self.step_size if isinstance(self.step_size, Momo) else None

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

    def check(self, groups: Sequence[Group]) -> None:
        """Refuse groups with different momenta under Momo: losses are averaged once, with the weights of all gradients.

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

    def take(self, moves: Sequence[Move], loss: Loss | None, accept: Tensor | None, record: StepRecord) -> None:
        """Make the moves.

        Args:
            moves: Of this step, at least one.
            loss: Of this step; None if it is not known, and then Momo takes the whole step.
            accept: A 0-d boolean by which every write is masked; None means True.
            record: Takes note.
        """
        if self.streams:
            self._stream(moves, record)
            return
        momo = self.momo if loss is not None else None
        for move in moves:
            move.advance()
        duals = [self._duals(move, momo) for move in moves]
        factors, total = self._factors(moves, duals)
        record.note(dual_norm=total)
        decided = None
        if momo and loss is not None:
            decided = self._decide(momo, moves, total, torch.as_tensor(loss, dtype=total.dtype), accept)
            t = decided[0].t if accept is None else torch.where(accept, decided[0].t, 0.0)
            factors = [factor * t for factor in factors]
            record.note(t=t, gap=decided[0].gap, lower_bound=decided[0].bound)
        gained = torch.zeros_like(total)
        for move, factor in zip(moves, factors, strict=True):
            aim = move.aimed or move.aim(duals=True, slopes=momo is not None)
            if aim.slopes is not None:
                gained += (_wide(aim.slopes) * self._scale(move) * factor).sum().to(total.device)
            if self.dual == "stale" and move.norm.matrix:
                move.remember_duals()
            move.write(self._scale(move), factor, record)
        if decided:
            self._close(*decided, gained, accept)
            self._versions = {p: p._version for move in moves for p in move.bucket.parameters}

    def _stream(self, moves: Sequence[Move], record: StepRecord) -> None:
        """One bucket after the other, none waiting for another."""
        for move in moves:
            move.advance()
            duals = move.aim(duals=self.regularized).duals
            factors = None if duals is None else _wide(duals) * self._scale(move)
            move.write(self._scale(move), factors, record)

    def _decide(
        self, momo: Momo, moves: Sequence[Move], total: Tensor, loss: Tensor, accept: Tensor | None
    ) -> tuple[Chosen, Inner]:
        """How much of the step Momo takes."""
        model = self.model = self.model or LossModel.new(total.device)
        model.steps = model.steps + (1.0 if accept is None else accept.to(model.steps.dtype))
        inner = self._inner(moves, momo, total)
        chosen = choose(
            momo,
            model,
            loss.to(total.device),
            decrease=total.square() if self.regularized else total,
            inner=inner,
            beta=float(moves[0].group["momentum"]),
            ahead=any(move.ahead for move in moves),
            restart=self._weights_were_changed(moves),
        )
        model.calls += 1
        return chosen, inner

    def _close(self, chosen: Chosen, inner: Inner, gained: Tensor, accept: Tensor | None) -> None:
        """The model is linear: its value at the new weights is known."""
        model = cast(LossModel, self.model)
        after = (chosen.value - inner.decay - gained, chosen.intercept, chosen.next_bound)
        before = (model.value, model.intercept, model.bound)
        if accept is not None:
            after = [torch.where(accept.to(new.device), new, old) for new, old in zip(after, before, strict=True)]
        model.value, model.intercept, model.bound = after

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
        scaled = [_wide(own).to(device) * self._scale(move) for move, own in zip(moves, duals, strict=True)]
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
            decay = move.lr * move.group["weight_decay"]
            if momo.direct or isinstance(decay, Tensor) or decay > 0:
                plain, ahead, gradient = (_wide(x).to(like.device) for x in move.against_weights(gradients=momo.direct))
                for total, own in zip(sums, (plain, gradient, decay * plain, decay * ahead), strict=True):
                    total += own
        return Inner(*sums)

    def _weights_were_changed(self, moves: Sequence[Move]) -> bool:
        """Whether something else wrote to the weights since the last step; warns the first time."""
        momo = cast(Momo, self.momo)
        changed = False
        if self._saved_fingerprint is not None:
            now = fingerprint([p for move in moves for p in move.bucket.parameters])
            changed = not math.isclose(now, self._saved_fingerprint, rel_tol=SAME_WEIGHTS)
            self._saved_fingerprint = None
        elif self._versions:
            changed = any(self._versions.get(p, p._version) != p._version for m in moves for p in m.bucket.parameters)
        if changed and not momo.direct and not self._warned:
            self._warned = True
            warnings.warn(
                "Weights were changed since the last step by something else than this optimizer. Momo's model of the "
                "loss starts again from the present loss, now and whenever this happens again. If it happens at every "
                "step, use Momo(bookkeeping='direct').",
                UserWarning,
                stacklevel=CALLER,
            )
        return changed

    def saved(self, parameters: Sequence[Tensor]) -> dict[str, float]:
        """What a checkpoint must hold, as plain numbers; nothing without Momo."""
        if self.momo is None:
            return {}
        model = self.model or LossModel.new(torch.device("cpu"))
        known = fingerprint([p for p in parameters if p in self._versions]) if self._versions else 0.0
        return {**model.numbers(), "momo_fingerprint": known}

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle: versions are of this process' tensors, a sum over the weights is not."""
        known = fingerprint(list(self._versions)) if self._versions else self._saved_fingerprint
        return {**self.__dict__, "_versions": {}, "_saved_fingerprint": known}

    def load(self, saved: Mapping[str, Any], device: torch.device) -> None:
        """Continue from what `saved` returned; a checkpoint without it starts a new model of the loss."""
        if self.momo is None:
            return
        self._versions = {}
        self.model = None
        if float(saved.get("momo_steps", 0.0)) > 0:
            self.model = LossModel.restored({key: float(saved[key]) for key in MODEL_KEYS}, device)
            self._saved_fingerprint = float(saved["momo_fingerprint"])


def fingerprint(parameters: Sequence[Tensor]) -> float:
    """Sum of the absolute values of all weights, to tell whether they are those of a checkpoint."""
    sums = [torch.linalg.vector_norm(p.detach(), ord=1, dtype=_scalar_type(p)) for p in parameters if p.numel()]
    return math.fsum(float(one) for one in sums)


def _wide(numbers: Tensor) -> Tensor:
    """float64 where the device has it."""
    return numbers.to(_scalar_type(numbers))


def _scalar_type(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type == "mps" else torch.float64
