"""One load's way through a step: average the gradients, aim, and move the weights."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from steepest.anatomy.batches import gains
from steepest.geometry import Norm
from steepest.geometry.norm import completed
from steepest.optim.decay import Decay
from steepest.optim.diagnostics import StepRecord
from steepest.optim.groups import averages_of
from steepest.optim.momentum import average_, combined, debias, forget_, look_ahead
from steepest.optim.packing import SHARES
from steepest.optim.replay import kept
from steepest.optim.sharing import Portion
from steepest.optim.sphere import Arc, lengthening, radii, returning
from steepest.optim.state import DUAL, LOW, MOMENTUM, RADIUS, SECOND, STEP, momenta
from steepest.optim.storage import Storage, divided, drawn, joined, noise_of
from steepest.ranks import Pending, local, own_box, scalar_type, summed
from steepest.stages import Stage
from steepest.stages.stage import state_dtype

Group = dict[str, Any]
Leaving = tuple[Callable[[], Tensor], Pending]
# Below, the point that decay pulls toward would be too far away for float32; above one over it, too near.
SMALLEST_DECAY = 1e-12
# A step of at most this times a direction whose sum of squares is finite is below half the distance of the largest
# floating-point number from the one before it: added to whatever is finite it stays so. Not in half precision.
LONGEST = 2.0**38
HALF_STEP = 8.0  # in float16 half of that distance is 16


@dataclass
class Aim:
    """Where a load is going.

    Args:
        directions: Of norm one, a batch per bucket and block of its view.
        duals: Dual norm of each matrix, in units of the loss per unit of the norm; None if nobody asked.
        slopes: -<m, D> with the momentum m itself, of which Nesterov's average differs; None if nobody asked.
    """

    directions: tuple[Tensor, ...]
    duals: Tensor | None
    slopes: Tensor | None


class Move:
    """A load during one step.

    Args:
        group: Of the load's parameters.
        portion: The load, and what this rank does of it.
        gradients: What this rank has of them, one for each parameter.
        states: Of the parameters, in order, complete.
        norm: Of the group.
        label: Place in the product norm.
        accept: A 0-d boolean by which every write is masked; None means True.
        record: Takes note.
        decay: What is taken away from the weights.
        storage: What is kept in 16 bits.
        names: Tells those of the parameters.
        stages: Around the search for directions, the outermost first.
        memory_cap: Bytes that temporaries may take; None for no bound.
        forgets: Whether averages that nothing but rounding is left of are set to zero in this step.
    """

    def __init__(
        self,
        group: Group,
        portion: Portion,
        gradients: Sequence[Tensor],
        states: list[dict[str, Tensor]],
        *,
        norm: Norm,
        label: str,
        accept: Tensor | None,
        record: StepRecord,
        decay: Decay,
        storage: Storage,
        names: Callable[[], Sequence[str]],
        stages: Sequence[Stage] = (),
        memory_cap: int | None = None,
        forgets: bool = False,
    ) -> None:
        self.group = group
        self.load, self.work = portion.load, portion.work
        self.portion = portion
        self.parameters = local(portion.load.parameters)  # what this rank keeps
        self._given = gradients
        self._cap = None if memory_cap is None else max(1, (SHARES - 2) * memory_cap // SHARES)
        self.label = label
        self.norm = completed(norm)
        self.ahead = bool(group["nesterov"]) and not self.norm.adapts
        self.averages = averages_of(group)
        self._states = states
        self._changing = [stage for stage in stages if stage.changes_gradients]
        self._stages = stages if group["role"] == "matrix" else ()  # others have changed gradients at most
        self._decay = decay
        self._squares: Tensor | None = None  # of the weights before they move, matrix by matrix, where that is known
        self.arc: Arc | None = None
        self.arc_gains: Tensor | None = None  # (averages, matrices), -<m_i, D> of several averages, along an arc
        self._storage, self._names = storage, names
        self._kept: list[Tensor] = []  # directions, where decay needs them
        self._record = record
        self._sample: Sequence[tuple[Tensor, float]] = ()
        self._taken: list[Tensor] | None = None
        first = self.parameters[0]
        self.device = first.device
        self._dtype = state_dtype(first)
        self._accept = None if accept is None else accept.to(self.device)
        lr = group["lr"]
        # A number that is here already need not be waited for on an accelerator.
        elsewhere = isinstance(lr, Tensor) and lr.device.type == "cpu" != self.device.type
        self.lr: float | Tensor = float(lr) if elsewhere else lr.to(self.device) if isinstance(lr, Tensor) else lr
        self.aimed: Aim | None = None
        self.averaged = self.moved = self.told = False
        self._coming: tuple[Pending, Pending | None, Pending | None, Pending | None] | None = None
        self._leaving: Leaving | None = None
        self._relative: float | Tensor = 0.0
        self._moves: list[Tensor] = []
        self._length: float | Tensor = 0.0
        self._radius = 1.0
        self._forgets = forgets

    def advance(self) -> None:
        """Average the gradients into the momenta."""
        gradients = self._gradients()
        accept = self._accept
        if self.norm.adapts:  # an infinite square would stay for ever, and a bounded one needs a bounded average
            gradients = _bounded(gradients, self._dtype)
        self.averaged = True
        if accept is None:
            torch._foreach_add_(self._of(STEP), 1)
        else:  # alpha chooses the overload that does not read the tensor
            torch._foreach_add_(self._of(STEP), accept.to(torch.int64), alpha=1)
        for key, beta in self._momenta():
            averages = self._averages(key)
            average_(averages, gradients, beta, accept=accept)
            if self._forgets:
                forget_(averages, gradients, beta, accept=accept)
            if self._storage.momentum_dtype is not None:
                torch._foreach_copy_(self._of(key), averages)
        if self.norm.adapts:
            torch._foreach_mul_(gradients, gradients)
            average_(self._of(SECOND), gradients, self.group["beta2"], accept=accept)

    def depart(self) -> None:
        """Send what directions are found from to those who find them; others may be worked on meanwhile."""
        if self._coming is not None:
            return
        # A direction is that of the average times any number above 0, unless the norm adapts: what the weights of an
        # average sum to is divided out of numbers, not of tensors.
        beta, second, averages = self.group["momentum"], None, self._averages()
        if self.averages is not None:
            averages = self._combined(self.portion.needed, averages)
        elif self.ahead:
            needed, gradients = self.portion.needed, self._gradients()
            found = look_ahead([averages[p] for p in needed], [gradients[p] for p in needed], beta) if needed else []
            for place, ahead in zip(needed, found, strict=True):
                averages[place] = ahead
        if self.norm.adapts:
            count = self._counts()
            averages = averages if self.averages is not None else _divided(averages, debias(beta, count))
            second = self.portion.gather(_divided(self._of(SECOND), debias(self.group["beta2"], count)))
        observed = any(stage.observes for stage in self._stages)
        self._coming = (
            self.portion.gather(averages),
            second,
            self.portion.gather(self._gradients()) if observed else None,
            self.portion.gather(self._joined()) if any(stage.sees_weights for stage in self._stages) else None,
        )

    def aim(self, *, duals: bool, slopes: bool = False) -> Aim:
        """Find the steepest directions of what this rank works on.

        Args:
            duals: Whether dual norms are needed.
            slopes: Whether products with the momentum itself are needed.
        """
        self.depart()
        beta, adapts, work = self.group["momentum"], self.norm.adapts, self.work
        coming, self._coming = cast(tuple[Pending, *tuple[Pending | None, ...]], self._coming), None
        averages, second, seen, weighed = (None if one is None else cast(list[Tensor], one.wait()) for one in coming)
        count = self.portion.chosen(self._counts()) if duals or slopes else None
        moments = (None,) * work.batches if second is None else work.matrices(second)
        batches = followed = work.matrices(cast(list[Tensor], averages))
        del averages, coming  # they are in the batches
        self._radius = self._ball() if count is None and not adapts else 1.0
        found: tuple[Tensor, ...] = ()
        states = self.portion.states(self._states) if self._stages else []
        if batches:  # a rank may have nothing to work on
            if seen is not None:
                self._show(work.matrices(seen), batches, states)
            for stage in self._stages:
                followed = stage.before(work, followed, states)
            company = {} if self.portion.company is None else {"company": self.portion.company}
            found = tuple(self.norm.lmos(followed, moments, memory_cap=self._cap, radius=self._radius, **company))
        self._sample = self._record.sample(self.group["role"], self.norm, found, self._radius)
        if self._stages:
            weights = work.matrices(weighed) if weighed is not None and found else ()
            for stage in reversed(self._stages) if found else ():
                found = stage.after(work, found, states, self._accept)
                if stage.sees_weights:
                    found = stage.beside(work, found, weights)
            del weights, weighed
            self.portion.keep(self._states, states)
        climbs = any(stage.may_climb for stage in self._stages)
        if climbs and found:
            found = self._without_climbing(batches, found)
        if self._decay.relative:
            found = self._as_long_as_radii(found)
        aim = Aim(found, None, None)
        if count is not None and (duals or slopes):
            later = count + 1 if self.ahead else count
            means = adapts or self.averages is not None
            aim.duals = self._gains(batches, found, None if means else debias(beta, later))
            if climbs:  # what is just about 0 may be below in another type
                aim.duals = aim.duals.clamp(min=0.0)
            if slopes and self.averages is None:  # else `gained` has them
                plain = batches
                if self.ahead:
                    plain = work.matrices(cast(list[Tensor], self.portion.gather(self._averages()).wait()))
                aim.slopes = self._gains(plain, found, debias(beta, count)) if self.ahead else aim.duals
        self.aimed = aim
        return aim

    def _show(
        self, gradients: tuple[Tensor, ...], batches: tuple[Tensor, ...], states: Sequence[dict[str, Tensor]]
    ) -> None:
        """Let stages look at the gradients."""
        averages = batches
        if self.averages is None:
            count = self.portion.chosen(self._counts())
            mass = debias(self.group["momentum"], count + 1 if self.ahead else count)
            masses = self.work.per_matrix(torch.where(mass == 0, 1.0, mass)).split(self.work.counts)
            averages = tuple(batch / own.view(-1, 1, 1) for batch, own in zip(batches, masses, strict=True))
        for stage in self._stages:
            if stage.observes:
                stage.observe(self.work, gradients, averages, states, self._accept)

    def _without_climbing(self, batches: tuple[Tensor, ...], found: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Directions, zero for each matrix whose direction would go up; the device is not waited for."""
        up = [own < 0 for own in gains(batches, found, wide=True).split(self.work.counts)]
        self._record.count("climbing_directions", torch.cat(up).sum(), self._accept)
        return tuple(torch.where(own.view(-1, 1, 1), 0.0, d) for own, d in zip(up, found, strict=True))

    def numbers(self) -> list[Tensor]:
        """Of the directions, by the matrices of all ranks, to be added up over these: dual norms and slopes."""
        aim = cast(Aim, self.aimed)
        alike = aim.slopes is aim.duals  # without a look ahead
        return [self.portion.spread(own) for own in (aim.duals, None if alike else aim.slopes) if own is not None]

    def take_numbers(self, summed: Sequence[Tensor]) -> None:
        """Go on with what `numbers` are for all ranks.

        Args:
            summed: As `numbers` told them, added up.
        """
        self.told = True
        aim = cast(Aim, self.aimed)
        alike = aim.slopes is aim.duals
        aim.duals, *slopes = summed
        aim.slopes = slopes[0] if slopes else aim.duals if alike else None

    def gained(self) -> Tensor:
        """What each of several averages says that the move gains, after `settle`: -<m_i, move> of what this rank keeps.

        Returns:
            (averages,), to be added up over ranks if the portion is shared.
        """
        counts = self._counts()
        parts = [
            self._products(_divided(self._averages(key), debias(beta, counts)), self._moves)
            for key, beta in self._momenta()
        ]
        return -torch.stack(parts) * self._length

    def known_duals(self) -> Tensor | None:
        """Dual norms of the step before, in the order of `aim`; None if a parameter has none yet."""
        if any(DUAL not in state for state in self._states):
            return None
        return self.load.numbers_of_batches([state[DUAL] for state in self._states])

    def remember_duals(self, duals: Tensor, fine: bool | Tensor) -> None:
        """Keep the dual norms for the next step, parameter by parameter.

        Args:
            duals: Of this step.
            fine: Whether the step is taken.
        """
        accept = self._both(fine)
        for state, new in zip(self._states, self.load.numbers_of_parameters(duals), strict=True):
            new = new.clamp(max=torch.finfo(self._dtype).max).to(self._dtype)
            if accept is not None:
                new = torch.where(accept, new, state.get(DUAL, torch.zeros_like(new)))
            state[DUAL] = kept(state.get(DUAL), new)

    def against_weights(self, *, gradients: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Inner products with the weights, and with what a unit of decay takes away from them.

        Args:
            gradients: Whether those of the gradients are needed; else they are zero.

        Returns:
            <m, W> for the momentum m and <g, W> for the gradients; <m, removed>, and the same for the averages that
            steps follow; 0-d each, but those with m (averages,) where there are several.
        """
        weights = [parameter.detach().to(self._dtype) for parameter in self.parameters]
        removed = self._decay.removed(weights, self._directions)
        if self.averages is not None:
            return self._several_against(weights, removed, gradients=gradients)
        count = self._counts()
        beta = self.group["momentum"]
        momenta = _divided(self._averages(), debias(beta, count))
        plain = lost = lost_ahead = self._products(momenta, weights)
        if removed is not weights:
            lost = lost_ahead = self._products(momenta, removed)
        del momenta
        if self.ahead:
            averages = look_ahead(self._averages(), self._gradients(), beta)
            lost_ahead = self._products(_divided(averages, debias(beta, count + 1)), removed)
        own = self._products(self._gradients(), weights) if gradients else torch.zeros_like(plain)
        return plain, own, lost, lost_ahead

    def _several_against(
        self, weights: Sequence[Tensor], removed: Sequence[Tensor], *, gradients: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What `against_weights` returns, of several averages."""
        count = self._counts()
        plain: list[Tensor] = []
        lost: list[Tensor] = []
        for key, beta in self._momenta():
            average = _divided(self._averages(key), debias(beta, count))
            plain.append(self._products(average, weights))
            lost.append(plain[-1] if removed is weights else self._products(average, removed))
            del average
        own = self._products(self._gradients(), weights) if gradients else torch.zeros_like(plain[0])
        followed = self._combined(range(len(self.parameters)), self.parameters)
        return torch.stack(plain), own, torch.stack(lost), self._products(followed, removed)

    @property
    def bends(self) -> bool:
        """Whether weights stay on a sphere, so that a step is no straight line."""
        return self._decay.keeps_norms

    def along_arc(self) -> list[Tensor]:
        """What must be known of all ranks' weights and directions before a step on a sphere is measured."""
        weights, directions = self._joined(), self._directions()
        count, beta = self._counts(), self.group["momentum"]
        pairs: list[tuple[Sequence[Tensor], Sequence[Tensor]]] = []
        pairs += [(weights, weights), (weights, directions), (directions, directions)]
        if self.averages is not None:
            each = [_divided(self._averages(key), debias(own, count)) for key, own in self._momenta()]
            pairs += [(average, weights) for average in each] + [(average, directions) for average in each]
            pairs.append((self._combined(range(len(weights)), weights), weights))
            return [self.portion.products(one, other) for one, other in pairs]
        pairs.append((_divided(self._averages(), debias(beta, count)), weights))
        if self.ahead:
            averages = look_ahead(self._averages(), self._gradients(), beta)
            pairs.append((_divided(averages, debias(beta, count + 1)), weights))
        return [self.portion.products(one, other) for one, other in pairs]

    def take_arc(self, summed: Sequence[Tensor]) -> None:
        """Go on with what `along_arc` tells for all ranks.

        Args:
            summed: As it was told, added up.
        """
        squares, across, lengths, average, *ahead = map(self.portion.own_products, summed)
        self._squares = squares
        if self.averages is not None:
            number = len(self.averages)
            each = [average, *ahead[:-1]]
            self.arc_gains, average = -torch.stack(each[number:]), torch.stack(each[:number])
            ahead = ahead[-1:]
        self.arc = Arc(self._radii(squares), squares, across, lengths, average, ahead[0] if ahead else average)

    def _radii(self, squares: Tensor) -> Tensor:
        """That weights are kept at in this step, one per matrix.

        Args:
            squares: Of the norms that weights have before it.
        """
        return radii(self.load.numbers_of_batches([state[RADIUS] for state in self._states]), squares)

    def _as_long_as_radii(self, found: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Directions with the norms at which weights are kept."""
        if self._squares is None:
            weights = self._joined()
            (self._squares,) = self._of_all(self.portion.products(weights, weights))
        radius = self._radii(self._squares)
        if self.norm.elementwise and self.portion.shared:  # of what is divided nobody has whole matrices
            parts = self._kept_parts(found)
            (lengths,) = self._of_all(self.portion.products(parts, parts))
            factors = self.portion.own(lengthening(radius, lengths))
        elif found:
            wide = scalar_type(self.device)
            lengths = torch.cat([batch.square().sum((-2, -1), dtype=wide) for batch in found])
            factors = lengthening(self.portion.own(radius), lengths)
        else:
            return found
        parts = factors.to(self._dtype).split([len(batch) for batch in found])
        return tuple(batch * own.view(-1, 1, 1) for batch, own in zip(found, parts, strict=True))

    def _of_all(self, *products: Tensor) -> list[Tensor]:
        """Inner products of matrices, added up over the ranks that keep parts of them."""
        if self.portion.shared:
            products = tuple(summed(products, self.portion.team))
        return list(map(self.portion.own_products, products))

    def _directions(self) -> list[Tensor]:
        found = self._kept or self._kept_parts((self.aimed or self.aim(duals=True, slopes=True)).directions)
        if self._decay.needs_directions:
            self._kept = found
        return found

    def _kept_parts(self, batches: Sequence[Tensor]) -> list[Tensor]:
        """Of directions, what this rank keeps: shaped like the parameters."""
        pending = self.portion.scatter(self.work.parameter_shaped(batches), self._averages())
        return cast(list[Tensor], pending.wait())

    def prepare(self, length: float | Tensor, factors: Tensor | None) -> None:
        """Make of the directions what is added to the weights, and send it to those who keep these.

        Args:
            length: Of every direction.
            factors: What each matrix' direction is multiplied by besides: 0-d, or one number for each; None: 1.
        """
        found, radius = cast(Aim, self.aimed).directions, self._radius
        if self._decay.needs_directions and not self._kept:
            self._kept = self._kept_parts(found)
        if factors is not None and factors.ndim == 0 and factors.device.type == "cpu":
            length = length * float(factors)  # one pass over the directions less
        elif factors is not None:
            factors = self.portion.own(factors).to(self.device, self._dtype).expand(sum(map(len, found)))
            self.aimed = None  # a norm may have returned what it was given, so nothing is written to
            parts = factors.split([len(batch) for batch in found])
            found = tuple(batch * own.view(-1, 1, 1) for batch, own in zip(found, parts, strict=True))
        size = self.portion.size(found, self.device)
        arriving = self.portion.scatter(self.work.parameter_shaped(found), self._averages())
        self._length, self._relative = length, length / radius
        self._leaving = size, arriving
        self.aimed = self._taken = None

    def settle(self) -> bool | Tensor:
        """Take what was prepared for what this rank keeps.

        Returns:
            Whether the weights stay finite, on all ranks; a 0-d boolean where that is not waited for.
        """
        (size, arriving), self._leaving = cast(Leaving, self._leaving), None
        total = size()
        self._record.add(
            self.group["role"],
            total,
            sum(parameter.numel() for parameter in self.load.parameters),
            length=self._relative,
            sample=self._sample,
            accept=self._accept,
        )
        self._moves = cast(list[Tensor], arriving.wait())
        return self._stays_finite(total)

    def write(self, fine: bool | Tensor = True) -> None:
        """Decay and move the weights, as prepared.

        Args:
            fine: Whether to do it at all; a 0-d boolean masks the writing.
        """
        moves, kept, self._moves, self._kept = self._moves, self._kept, [], []
        if fine is False:
            return
        self.moved = True
        accept = self._both(fine)
        if accept is not None:
            moves = [torch.where(accept, move, 0.0) for move in moves]
        pull = self._radius != 1
        rounds = self._storage.rounds(self.parameters[0])
        narrow = self.bends and self.parameters[0].dtype is not self._dtype
        weights = self._joined() if rounds or narrow else self.parameters
        before = self.portion.products(weights, weights) if self.bends and self._squares is None else None
        self._decay.apply_(
            weights,
            moves,
            directions=kept,
            length=self._length,
            decay=self._shrinkage,
            accept=accept,
            pull=pull,
        )
        if self.bends:
            self._return(weights, before, accept)
        if rounds:
            self._round(weights)
        elif narrow:
            torch._foreach_copy_(self.parameters, weights)

    def _return(self, weights: Sequence[Tensor], before: Tensor | None, accept: Tensor | None) -> None:
        """Bring weights that have moved back to their radii.

        Args:
            weights: Written to.
            before: Squares of their norms before they moved, as far as this rank keeps them; None: those are known.
            accept: Where they moved at all.
        """
        after = self.portion.products(weights, weights)
        if before is None:
            (after,) = self._of_all(after)
        else:
            self._squares, after = self._of_all(before, after)
        squares = cast(Tensor, self._squares)
        radius = self._radii(squares)
        factors = returning(radius, squares, after)
        self.portion.stretch_(weights, factors if accept is None else torch.where(accept, factors, 1.0))
        for state, new in zip(self._states, self.load.numbers_of_parameters(radius), strict=True):
            state[RADIUS].copy_(new if accept is None else torch.where(accept, new, state[RADIUS]))

    def _joined(self) -> list[Tensor]:
        """The weights in float32 or wider, with the bits that are kept beside them; may be the weights themselves."""
        if self.parameters[0].dtype is self._dtype:
            return [parameter.detach() for parameter in self.parameters]
        kept = self._of(LOW) if self._storage.keeps(self.parameters[0]) else [None] * len(self.parameters)
        return [joined(weight, low) for weight, low in zip(self.parameters, kept, strict=True)]

    def _round(self, weights: Sequence[Tensor]) -> None:
        """Write float32 weights back as bfloat16 ones."""
        if self._storage.keeps(self.parameters[0]):
            pairs = [divided(weight) for weight in weights]
            torch._foreach_copy_(self._of(LOW), [low for _, low in pairs])
            torch._foreach_copy_(self.parameters, [weight for weight, _ in pairs])
            return
        counts, names = self._of(STEP), self._names()
        for place, (parameter, weight) in enumerate(zip(self.load.parameters, weights, strict=True)):
            noise = noise_of(names[place], counts[place], own_box(parameter), parameter.shape)
            self.parameters[place].copy_(drawn(weight, noise))

    @property
    def _shrinkage(self) -> float | Tensor:
        """lr · weight_decay."""
        return self.lr * self.group["weight_decay"]

    def _both(self, fine: bool | Tensor) -> Tensor | None:
        """Where the step is both accepted and fine; None: everywhere."""
        if not isinstance(fine, Tensor):
            return self._accept
        fine = fine.to(self.device)
        return fine if self._accept is None else self._accept & fine

    def _stays_finite(self, size: Tensor) -> bool | Tensor:
        """Whether what is prepared leaves only finite weights, on all ranks that keep a part of them.

        Beyond doubt without a look at them, or by one, for which all ranks have the reason.

        Args:
            size: Sum of the squares of the moves, of all ranks.
        """
        bounds = ((self._length, LONGEST), (self._shrinkage, 2.0))
        half = self.parameters[0].dtype == torch.float16
        largest = torch.finfo(self._dtype).max
        if any(not isinstance(number, Tensor) and not abs(number) <= largest for number, _ in bounds):
            return False
        if self.device.type == "cpu" and self._accept is None:
            length, total = abs(float(self._length)), float(size)
            small = math.isfinite(total) and all(abs(float(number)) <= bound for number, bound in bounds)
            beyond_doubt = small and not (half and math.sqrt(total) * length > HALF_STEP)
            return beyond_doubt or bool(self._looked_at())
        fine = size.isfinite()
        doubts = half
        for number, bound in bounds:
            if isinstance(number, Tensor):
                fine = fine & (number.abs() <= bound)
            else:
                doubts = doubts or not abs(number) <= bound
        return fine & self._looked_at() if doubts else fine

    def _looked_at(self) -> Tensor:
        pull = self._radius != 1
        own = self._decay.stay_finite(
            self.parameters, self._moves, length=self._length, decay=self._shrinkage, pull=pull
        )
        return cast(Tensor, self.portion.team.every(own, self.device)) if self.portion.shared else own

    def _gains(self, batches: tuple[Tensor, ...], found: tuple[Tensor, ...], mass: Tensor | None) -> Tensor:
        """What directions gain on averages whose weights sum to the mass of each parameter; None: to one."""
        if not found:
            return torch.empty(0, dtype=self._dtype, device=self.device)
        gained = gains(batches, found, wide=self.norm.elementwise)
        if mass is not None:
            gained = gained / self.work.per_matrix(torch.where(mass == 0, 1.0, mass))
        # Sums of large numbers leave the range of float32; elsewhere than here, looking would mean to wait.
        if gained.dtype != torch.float64 and gained.device.type == "cpu" and not bool(gained.isfinite().all()):
            m, d = (tuple(batch.double() for batch in own) for own in (batches, found))
            return self._gains(m, d, mass)
        return gained

    def _ball(self) -> float:
        """Radius of the ball that decay pulls the weights into, where a step can be one pull toward its surface."""
        decay: float | Tensor = self.group["weight_decay"]
        if isinstance(decay, Tensor) or isinstance(self.lr, Tensor) or self._accept is not None:
            return 1.0
        plain = self.parameters[0].dtype is self._dtype and self.norm.free_radius
        if not (plain and SMALLEST_DECAY < decay < 1 / SMALLEST_DECAY and all(stage.linear for stage in self._stages)):
            return 1.0
        return self._decay.radius(decay) or 1.0

    def _gradients(self) -> list[Tensor]:
        """What is averaged: the gradients, or what stages make of them."""
        if self._taken is not None:
            return self._taken
        gradients = list(self._given)
        if any(gradient.dtype is not self._dtype for gradient in gradients):
            gradients = [gradient.to(self._dtype) for gradient in gradients]
        if self._accept is not None:
            gradients = [torch.where(self._accept, gradient, 0.0) for gradient in gradients]
        for stage in self._changing:
            wholes = cast(list[Tensor], self.portion.gather(gradients).wait())
            wholes = stage.gradient(self.work, wholes) if wholes else []
            pending = self.portion.scatter(wholes, gradients)
            gradients = cast(list[Tensor], pending.wait())
        self._taken = gradients
        return gradients

    def _counts(self) -> Tensor:
        """Gradients averaged so far, one number per parameter, in the type of the averages."""
        return torch.stack(self._of(STEP)).to(self._dtype)

    def averaged_before(self) -> int:
        """Most gradients that a parameter's averages held before this step; waits for the device."""
        return int(torch.stack(self._of(STEP)).max()) - 1

    def _momenta(self) -> list[tuple[str, float]]:
        """Key and β of each average of gradients."""
        first = self.group["momentum"]
        if self.averages is None:
            return [(MOMENTUM, first)]
        return list(zip(momenta(len(self.averages)), self.averages.betas_from(first), strict=True))

    def _combined(self, places: Sequence[int], like: Sequence[Tensor]) -> list[Tensor]:
        """What steps follow of several averages, at some places of the load; elsewhere what is given."""
        averages, found = self.averages, list(like)
        if averages is None or not places:
            return found
        buffers = [self._averages(key) for key, _ in self._momenta()]
        ahead = [self._gradients()[place] for place in places] if self.ahead else None
        own = [[each[place] for place in places] for each in buffers]
        counts = self._counts()
        chosen = counts if len(places) == len(counts) else torch.stack([counts[place] for place in places])
        for place, mean in zip(
            places, combined(own, averages, self.group["momentum"], chosen, ahead=ahead), strict=True
        ):
            found[place] = mean
        return found

    def _averages(self, key: str = MOMENTUM) -> list[Tensor]:
        """The averages of gradients, in the type of the step: copies, if they are kept in another."""
        found = self._of(key)
        return found if self._storage.momentum_dtype is None else [average.to(self._dtype) for average in found]

    def _of(self, key: str) -> list[Tensor]:
        return local([state[key] for state in self._states])

    def _products(self, one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
        """Inner product of what this rank keeps, in float64 where the device has it; parts with copies count once."""
        dtype = scalar_type(self.device)
        sums = [(a * b).sum(dtype=dtype) for a, b in zip(one, other, strict=True)]
        if self.portion.shared:
            sums = [own * self.portion.duties.weight(p) for own, p in zip(sums, self.load.parameters, strict=True)]
        total = torch.stack(sums).sum()
        wide = one[0].dtype == torch.float64
        if not wide and total.device.type == "cpu" and not math.isfinite(float(total)):
            return self._products([a.double() for a in one], [b.double() for b in other])
        return total


def _bounded(gradients: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """New tensors, whose squares are finite."""
    most = 2.0 ** (math.frexp(torch.finfo(dtype).max)[1] // 2 - 1)
    if gradients[0].device.type == "cpu":
        return [gradient.clamp(-most, most) for gradient in gradients]
    bounded = torch._foreach_clamp_max(list(gradients), most)
    torch._foreach_clamp_min_(bounded, -most)
    return list(bounded)


def _divided(averages: Iterable[Tensor], weights: Tensor) -> list[Tensor]:
    """Each average divided by the sum of its weights; 0 where nothing was averaged yet."""
    safe = torch.where(weights == 0, 1.0, weights)
    return list(torch._foreach_div(list(averages), list(safe.unbind())))
