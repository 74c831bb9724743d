"""What a step knows of its loss: how it arrived, what it was clipped with, whose weights it is of, what it predicts.

The one object that the optimizer asks about losses. Without Momo it only takes them, so that one that is not finite
stops the step; with Momo it owns the model of the loss, the witness of clipping and what was seen of the weights.
"""

import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from steepest.notices import warn
from steepest.optim.diagnostics import StepRecord
from steepest.optim.groups import AVERAGES, averages_of
from steepest.optim.momentum import Averages
from steepest.optim.momo.clipping import Witness
from steepest.optim.momo.model import Chosen, Fixed, Inner, LossModel, Momo, StepSize, check_step_size, choose, clipped
from steepest.optim.momo.tap import MISSING, Loss, LossTap, check_closure, check_loss
from steepest.optim.momo.weights import Changes
from steepest.optim.move import Move
from steepest.ranks import scalar_type

RECENT = 10  # losses
BELOW = 20  # a batch may do better than the bound by chance, so many in a row do not


@dataclass
class Heard:
    """What a step is told of its loss.

    Args:
        loss: Of this rank, then of all; None if it is not known.
        clipping: What this rank sees that gradients were multiplied by, times whether it sees anything, then the mean
            of that; at last the part that is clipping, in (0, 1]. None: nothing was seen.
        witnessed: Whether this rank sees anything of that, then on how large a part of the ranks that is so.
        lower_bound: Of Momo.
        changed: Whether this rank finds weights that the last step did not leave, then on how large a part of the ranks
            that is so; None: nobody looked.
        part: What losses were multiplied by in all before backward, in (0, 1]: less than 1 in a window of micro-batches
            that is shorter than what its losses were divided by. None: all of it.
    """

    loss: Loss | None = None
    clipping: Loss | None = None
    witnessed: Loss | None = None
    lower_bound: float = 0.0
    changed: Loss | None = None
    part: Loss | None = None


@dataclass(frozen=True)
class Decision:
    """How much of a step is taken, and what that rests on.

    Args:
        chosen: The decision.
        inner: Inner products with the weights.
        estimated: Whether the lower bound is.
        late: Whether the model of the loss begins here, and averages do not.
    """

    chosen: Chosen
    inner: Inner
    estimated: bool
    late: bool

    def numbers(self) -> list[Tensor]:
        """All that must be finite, 0-d each; the bound may be given as minus infinity."""
        own = [self.inner.decay, self.inner.decay_ahead, self.chosen.value, self.chosen.intercept]
        own = [one for numbers in own for one in numbers.reshape(-1)]
        return [*own, self.chosen.next_bound] if self.estimated else own


class Losses:
    """The losses of one optimizer's steps.

    Args:
        step_size: All of the step, or Momo's part; None: all.

    Raises:
        TypeError: If it is no step size.
    """

    def __init__(self, step_size: StepSize | None) -> None:
        self.step_size = check_step_size(Fixed() if step_size is None else step_size)
        self.tap = LossTap()
        self.model: LossModel | None = None
        self._witness: Witness | None = None
        self._changes = Changes()
        self._averaged: tuple[object, list[Tensor]] | None = None  # momenta and parameters of the last step
        self._resync = False  # at the next step, whatever was averaged
        self._loaded = False  # a state without a model of the loss
        self._below = 0  # losses below the bound, in a row
        self._below_before = False
        self._usual: float | None = None  # average of recent losses

    @property
    def momo(self) -> Momo | None:
        """The options of Momo, if steps are Momo's."""
        return self.step_size if isinstance(self.step_size, Momo) else None

    def watch(self, groups: Sequence[Sequence[Tensor]]) -> None:
        """Look at gradients as backward leaves them.

        Args:
            groups: Of parameters.
        """
        if self.momo:
            self._witness = Witness(groups)

    def watch_more(self, parameters: Sequence[Tensor]) -> None:
        """Likewise of a group that was added.

        Args:
            parameters: Of the group.
        """
        if self._witness:
            self._witness.arrivals.watch(parameters)

    def watch_again(self, groups: Sequence[Sequence[Tensor]]) -> None:
        """For a copy: hooks stayed with the original's parameters.

        Args:
            groups: Of parameters.
        """
        if self._witness and not self._witness.arrivals.watched:
            self._witness.watch(groups)

    def replaced(self, groups: Sequence[Sequence[Tensor]]) -> None:
        """Others stand where parameters stood, or some changed their shape: the model of the loss is not of them.

        Args:
            groups: Of parameters, as they are now.
        """
        self._changes.replaced()
        if self._witness:
            self._witness.watch(groups)

    def cleared(self) -> None:
        """Gradients were cleared."""
        self.tap.gradients_cleared()
        if self._witness:
            self._witness.arrivals.zeroed()

    def scaled(self) -> None:
        """Somebody asks whether the optimizer unscales gradients itself, a GradScaler before its step most likely."""
        if self._witness:
            self._witness.scaled(sys._getframe(2).f_locals.get("self"))

    def run(self, closure: Callable[[], float]) -> float:
        """Call a closure that computes the loss and its gradients.

        Args:
            closure: As `step` was given it.

        Raises:
            TypeError: If it is no function.
        """
        check_closure(closure)
        if self._witness:
            self._witness.arrivals.enter()
        with torch.enable_grad():
            return closure()

    @property
    def told(self) -> bool:
        """Whether something was recorded that no step has taken yet."""
        return self.tap.told

    def hear(self, heard: Heard, explicit: Loss | None, returned: Loss | None) -> None:
        """This rank's loss of the step: the one that was passed, else recorded, else returned by the closure.

        Args:
            heard: Written to.
            explicit: What `step` was given.
            returned: What its closure returned.

        Raises:
            ValueError: If it is not one number, or not that of the gradients.
            TypeError: If it is not real.
        """
        recorded, part = self.tap.take()
        if explicit is not None:
            heard.loss = check_loss("step", explicit)
        elif recorded is not None:
            if self._witness:
                self.tap.check_window(part, self._witness.arrivals.passes)
            heard.loss, heard.part = recorded, part
        elif returned is not None:
            if self._witness:
                self._witness.arrivals.check_closure()
            heard.loss = check_loss("the closure of step", returned)

    def check_told(self, loss: Loss | None, idle: Callable[[], bool]) -> None:
        """Refuse a step without the loss that Momo needs.

        Args:
            loss: Of the step.
            idle: Tells whether it changes no weight.

        Raises:
            ValueError: If so.
        """
        if loss is None and self.momo and not idle():
            raise ValueError(MISSING)

    def check_momenta(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Refuse groups with different momenta under Momo: losses are averaged like the gradients of all groups.

        Args:
            groups: Those that move in this step.

        Raises:
            ValueError: If momenta differ.
        """
        momenta = [(group.get("family") or group["role"], float(group["momentum"])) for group in groups]
        if self.momo and len({beta for _, beta in momenta}) > 1:
            found = ", ".join(f"{name} {beta:g}" for name, beta in momenta)
            raise ValueError(
                f"Momo needs one momentum for all groups, as losses are averaged like gradients, got {found}. Give "
                "momentum= and the first of betas= the same value."
            )
        texts = {group.get(AVERAGES): group["role"] for group in groups}
        if self.momo and len(texts) > 1:
            found = ", ".join(f"{role} {text or 'one average'}" for text, role in texts.items())
            raise ValueError(
                f"Momo needs the same averages of gradients in all groups, as losses are averaged like gradients, got "
                f"{found}. Give momentum= and the first of betas= the same Averages(...)."
            )

    def bound(self, loss: Loss | None) -> float:
        """Momo's lower bound for a step with this loss; asked for before anything is written, as it may raise.

        Args:
            loss: Of the step; None if it is not known.
        """
        if self.momo is None or loss is None:
            return 0.0
        return self.momo.bound(self.model.calls if self.model else 0)

    def look(self, heard: Heard) -> None:
        """Note what this rank sees of gradients and weights; no other rank is asked.

        Args:
            heard: Written to.

        Raises:
            ValueError: If gradients were not multiplied by one factor, or a recorded loss was told another weight than
                backward used.
        """
        heard.changed = self.changed()
        if self._witness is None:
            return
        heard.clipping, heard.witnessed = self._witness.look() or (None, None)
        if self._witness.undone is not None:
            self.tap.check_weights(self._witness.undone)

    def agreed(self, heard: Heard) -> None:
        """Go on from what all ranks have seen, before anything is written.

        Args:
            heard: What they share; written to.

        Raises:
            ValueError: If gradients were multiplied by what is no clipping, on all ranks alike.
        """
        if self._witness:
            heard.clipping = self._witness.read(heard.clipping, heard.witnessed)

    def changed(self) -> bool | Tensor:
        """Whether this rank finds weights that the last step did not leave; 0-d where that is on a device.

        No other rank is asked: `decide` takes what all of them found together.
        """
        return self.momo is not None and self._changes.here()

    def decide(
        self,
        heard: Heard,
        moves: Sequence[Move],
        total: Tensor,
        *,
        decrease: Tensor,
        record: StepRecord,
        pull: Tensor | None = None,
    ) -> Decision | None:
        """Average the loss into its model and say how much of the step to take; nothing is written to the model.

        Args:
            heard: What all ranks share.
            moves: Of this step, whose gradients are averaged.
            total: 0-d; for the device and type of numbers of the whole step.
            decrease: 0-d, what the whole step is predicted to gain, weight decay not counted.
            record: Takes note.
            pull: 0-d, what weights gain that go back to their radii before the step; None: none is kept.

        Returns:
            The decision; None without Momo or a loss: the whole step.
        """
        momo, loss = self.momo, heard.loss
        if momo is None or loss is None:
            return None
        averages = moves[0].averages
        model, late = self.model, False
        if model is None:
            model = LossModel.new(moves[0].device, _count(averages))
            before = max(move.averaged_before() for move in moves) if self._loaded else 0  # by steps without Momo
            if late := before > 0:
                model.steps.fill_(before)
        inner = _inner(moves, momo, total)
        if pull is not None:
            inner = replace(inner, decay_ahead=inner.decay_ahead + pull)
        own = torch.as_tensor(loss, dtype=total.dtype, device=total.device)
        for factor in (heard.part, heard.clipping):
            if factor is not None:
                below = model.bound if momo.lower_bound == "auto" else heard.lower_bound
                own = clipped(own, factor.to(total) if isinstance(factor, Tensor) else factor, below)
        beta = float(moves[0].group["momentum"])
        changed = self.changed() if heard.changed is None else heard.changed > 0
        restart = self._changes.found(changed, warn=not momo.direct)
        resync = self._set_changed(_parameters(moves), beta if averages is None else averages.betas_from(beta))
        chosen = choose(
            momo,
            model,
            own,
            lower_bound=heard.lower_bound,
            decrease=decrease,
            inner=inner,
            beta=beta,
            averages=averages,
            ahead=any(move.ahead for move in moves),
            restart=late or restart,
            resync=late or resync,
        )
        self._report(chosen, loss, record)
        return Decision(chosen, inner, momo.lower_bound == "auto", late)

    def moved(self, decision: Decision | None, gained: Tensor, known: Tensor | bool | None) -> None:
        """The weights are where the step leaves them: the model is linear, so its value there is known.

        Args:
            decision: Of the step.
            gained: What step and weight decay were predicted to gain, 0-d; (averages,) where there are several.
            known: Whether the step was taken, 0-d where that is not read; None: it was.
        """
        if decision is None or known is False:
            return
        if (
            decision.late and isinstance(known, Tensor) and not bool(known)
        ):  # waited for once: the model begins with a step that is taken
            return
        model = self.model or LossModel.new(gained.device, gained.numel())
        self.model = model.kept(model.after(decision.chosen, gained, known if isinstance(known, Tensor) else None))

    def note(self, moves: Sequence[Move]) -> None:
        """From here on, nobody else should write to the weights.

        Args:
            moves: Of the step.
        """
        if self.momo:
            self._changes.note(_parameters(moves))

    @contextmanager
    def displacing(self, change: Tensor | None) -> Generator[None]:
        """Within it the optimizer itself moves weights by what is no step: nobody else should have written before.

        Args:
            change: By what the value of the averaged model changes at the new weights, 0-d, or (averages,) where there
                are several; None: there is none yet.
        """
        alone = self.momo is None or self._changes.untouched()
        yield
        if self.momo is None:
            return
        if self.model is not None and change is not None:
            self.model = self.model.kept(replace(self.model, value=self.model.value + change.to(self.model.value)))
        if alone:
            self._changes.renote()

    def stepped(self) -> None:
        """A step was made of the gradients, or passed over."""
        if self._witness:
            self._witness.arrivals.stepped()

    def _set_changed(self, parameters: list[Tensor], beta: object) -> bool:
        """Whether averages are of other parameters, or with another momentum, than in the last step."""
        before, self._averaged = self._averaged, (beta, parameters)
        asked, self._resync = self._resync, False
        if before is None or asked:
            return asked
        return before[0] != beta or set(map(id, before[1])) != set(map(id, parameters))

    def _report(self, chosen: Chosen, loss: Loss, record: StepRecord) -> None:
        """Note what was decided, and warn of a bound that losses stay below of; on an accelerator nobody looks."""
        record.note(t=chosen.t, gap=chosen.gap, lower_bound=chosen.bound)
        if chosen.bound.device.type != "cpu":
            return
        self._ask_about_division(float(loss), float(chosen.bound))
        self._below = self._below + 1 if float(loss) < float(chosen.bound) else 0
        if self._below != BELOW:
            return
        warn(
            f"The loss was below Momo's lower_bound for {BELOW} steps, now {float(loss):.6g} below "
            f"{float(chosen.bound):.6g}: steps shrink to nothing there. Give a lower_bound below what can be reached; "
            "losses that can be negative need a negative one.",
        )

    def _ask_about_division(self, loss: float, bound: float) -> None:
        """Warn of the first loss below the bound if it is the first of all, of parts, or far below those before."""
        usual, divided = self._usual, loss < bound and not self._below_before
        self._usual = loss if usual is None else usual + (loss - usual) / RECENT
        if not divided:
            return
        self._below_before = True
        parts = max(self.tap.parts, self._witness.arrivals.passes if self._witness else 0)  # micro-batches, if known
        first = usual is None and parts > 1 and not (self.model and self.model.calls)
        if first or (usual is not None and 0 < 2 * loss < usual):
            before = "the first loss" if usual is None else f"{usual:.6g}, the average of recent ones"
            warn(
                f"The loss {loss:.6g} is below Momo's lower_bound {bound:.6g}, so that steps shrink to nothing, and it "
                f"is {'' if usual is None else 'far below '}{before}. Was it divided by the number of micro-batches, "
                "as hosts do before backward? Momo needs the mean loss of the batch: "
                "record_loss(loss, weight=1 / micro_batches) with each loss before it is divided, or step(loss=mean)."
            )

    def live(self) -> dict[str, float]:
        """Of what `saved` returns, the numbers that are known without waiting for a device or a pass over weights."""
        if self.momo is None or self.model is None:
            return {}
        waits = self.model.bound.device.type != "cpu"
        return {"momo_calls": float(self.model.calls)} if waits else self.model.numbers()

    def saved(self, parameters: Sequence[Tensor], averages: Averages | None) -> dict[str, float]:
        """What a checkpoint must hold, as plain numbers; nothing without Momo.

        Args:
            parameters: All of the optimizer's; of sharded ones, all ranks that keep a part must call it together.
            averages: Of the gradients of all groups; None: one.
        """
        if self.momo is None:
            return {}
        model = self.model or LossModel.new(torch.device("cpu"), _count(averages))
        own = {"momo_direct": float(self.momo.direct), "momo_weights": self._changes.saved(parameters)}
        return {**model.numbers(), **own}

    def load(self, saved: Mapping[str, Any], parameters: Sequence[Tensor]) -> None:
        """Continue from what `saved` returned; a checkpoint without it starts a new model of the loss.

        Args:
            saved: A group of a state dict.
            parameters: All of the optimizer's; what was recorded is forgotten.
        """
        self.tap.clear()
        if not parameters:
            return
        self._changes, self._averaged, self.model = Changes(), None, None
        self._loaded = self.momo is not None and float(saved.get("momo_steps", 0.0)) == 0
        if self.momo is None or self._loaded:
            return
        self.model = LossModel.restored(saved, parameters[0].device, _count(averages_of(saved)))
        self._changes.load(parameters, saved["momo_weights"])
        self._resync = not saved["momo_direct"]  # then no intercept was kept


def _parameters(moves: Sequence[Move]) -> list[Tensor]:
    return [parameter for move in moves for parameter in move.load.parameters]


def _count(averages: Averages | None) -> int:
    return 1 if averages is None else len(averages)


def _inner(moves: Sequence[Move], momo: Momo, like: Tensor) -> Inner:
    """Inner products with the weights, of those moves that need them, over all ranks."""
    several = moves[0].averages
    each = torch.zeros_like(like) if several is None else torch.zeros_like(like).repeat(len(several))
    sums = [torch.zeros_like(own) for own in (each, like, each, like)]
    for move in moves:
        rate = move.group["weight_decay"]
        if momo.direct or rate > 0:
            products = move.against_weights(gradients=momo.direct)
            plain, gradient, lost, lost_ahead = (own.to(scalar_type(own.device)) for own in products)
            decay = move.lr * rate
            for total, own in zip(sums, (plain, gradient, decay * lost, decay * lost_ahead), strict=True):
                total += own.to(like.device)
    if any(move.portion.shared for move in moves):
        found = moves[0].portion.team.summed(torch.cat([own.reshape(-1) for own in sums]))
        sums = [part.reshape(own.shape) for part, own in zip(found.split([o.numel() for o in sums]), sums, strict=True)]
    return Inner(*sums)
