"""One bucket's way through a step: average the gradients, aim, and move the weights."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from steepest.geometry import Norm
from steepest.optim.applied import Applied
from steepest.optim.bucket import Bucket, apply_, directions, gains
from steepest.optim.diagnostics import StepRecord
from steepest.optim.momentum import average_, debias, look_ahead
from steepest.optim.state import DUAL, MOMENTUM, SECOND, STEP, ensure_state, state_dtype

Group = dict[str, Any]


@dataclass
class Aim:
    """Where a bucket is going.

    Args:
        directions: Of norm one, a batch per block of the view.
        duals: Dual norm of each matrix, in units of the loss per unit of the norm; None if nobody asked.
        slopes: -<m, D> with the momentum m itself, of which Nesterov's average differs; None if nobody asked.
    """

    directions: tuple[Tensor, ...]
    duals: Tensor | None
    slopes: Tensor | None


class Move:
    """A bucket during one step.

    Args:
        group: Of the bucket's parameters.
        bucket: Parameters of one layout.
        states: Of the parameters, in order; what is missing is allocated.
        label: Place in the product norm.
        accept: A 0-d boolean by which every write is masked; None means True.
        applied: What gradients or momenta are multiplied with, as layer inputs say; None: nothing.
    """

    def __init__(
        self,
        group: Group,
        bucket: Bucket,
        states: list[dict[str, Tensor]],
        *,
        label: str,
        accept: Tensor | None,
        applied: Applied | None = None,
    ) -> None:
        self.group = group
        self.bucket = bucket
        self.label = label
        self.norm = cast(Norm, group["norm"])
        self.ahead = bool(group["nesterov"]) and not self.norm.adapts
        self._states = states
        self._applied = applied if self.norm.matrix and not self.norm.adapts else None
        self._taken: list[Tensor] | None = None
        first = bucket.parameters[0]
        self.device = first.device
        self._dtype = state_dtype(first)
        self._accept = None if accept is None else accept.to(self.device)
        for state, parameter in zip(states, bucket.parameters, strict=True):
            ensure_state(state, parameter, adapts=self.norm.adapts)
        lr = group["lr"]
        # A number that is here already need not be waited for on an accelerator.
        elsewhere = isinstance(lr, Tensor) and lr.device.type == "cpu" != self.device.type
        self.lr: float | Tensor = float(lr) if elsewhere else lr.to(self.device) if isinstance(lr, Tensor) else lr
        self.aimed: Aim | None = None

    def advance(self) -> None:
        """Average the gradients into the momenta."""
        gradients = self._gradients()
        accept = self._accept
        if accept is None:
            torch._foreach_add_(self._of(STEP), 1.0)
        else:  # alpha chooses the overload that does not read the tensor
            torch._foreach_add_(self._of(STEP), accept.to(self._dtype), alpha=1.0)
        average_(self._of(MOMENTUM), gradients, self.group["momentum"], accept=accept)
        if self.norm.adapts:
            squared = torch._foreach_mul(gradients, gradients)
            torch._foreach_clamp_max_(squared, torch.finfo(self._dtype).max)  # an infinite square would stay for ever
            average_(self._of(SECOND), squared, self.group["beta2"], accept=accept)

    def aim(self, *, duals: bool, slopes: bool = False) -> Aim:
        """Find the steepest directions.

        Args:
            duals: Whether dual norms are needed.
            slopes: Whether products with the momentum itself are needed.
        """
        beta, count = self.group["momentum"], torch.stack(self._of(STEP))
        averages = self._averages(count)
        batches = self.bucket.matrices(averages)
        moments: tuple[Tensor | None, ...] = (None,) * len(batches)
        if self.norm.adapts:
            moments = self.bucket.matrices(_divided(self._of(SECOND), debias(self.group["beta2"], count)))
        found = self._directions(averages, batches, moments)
        aim = Aim(found, gains(batches, found) if duals else None, None)
        if slopes:
            plain = _divided(self._of(MOMENTUM), debias(beta, count)) if self.ahead else averages
            aim.slopes = gains(self.bucket.matrices(plain), found) if self.ahead else aim.duals
        self.aimed = aim
        return aim

    def known_duals(self) -> Tensor | None:
        """Dual norms of the step before, in the order of `aim`; None if a parameter has none yet."""
        if any(DUAL not in state for state in self._states):
            return None
        view, shape = self.bucket.view, self.bucket.parameters[0].shape
        counts = [1] if view is None else [block[0] for block in view.blocks(shape)]
        chunks = [state[DUAL].split(counts) for state in self._states]
        return torch.cat([part for of_block in zip(*chunks, strict=True) for part in of_block])

    def remember_duals(self) -> None:
        """Keep the dual norms for the next step, parameter by parameter."""
        aim = cast(Aim, self.aimed)
        per_batch = cast(Tensor, aim.duals).split([len(batch) for batch in aim.directions])
        parts = [part.chunk(len(self._states)) for part in per_batch]
        for state, own in zip(self._states, zip(*parts, strict=True), strict=True):
            new = torch.cat(own)
            if self._accept is not None:
                new = torch.where(self._accept, new, state.get(DUAL, torch.zeros_like(new)))
            state[DUAL] = new

    def against_weights(self, *, gradients: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Inner products of the momentum, of the averages that steps follow, and of the gradients with the weights.

        Args:
            gradients: Whether the third is needed; else it is zero.

        Returns:
            Three 0-d tensors.
        """
        weights = [parameter.detach().to(self._dtype) for parameter in self.bucket.parameters]
        count = torch.stack(self._of(STEP))
        plain = _products(_divided(self._of(MOMENTUM), debias(self.group["momentum"], count)), weights)
        ahead = _products(self._averages(count), weights) if self.ahead else plain
        own = _products(self._gradients(), weights) if gradients else torch.zeros_like(plain)
        return plain, ahead, own

    def write(self, length: float | Tensor, factors: Tensor | None, record: StepRecord) -> None:
        """Decay and move the weights.

        Args:
            length: Of every direction.
            factors: What each matrix' direction is multiplied by besides: 0-d, or one number for each; None: 1.
            record: Takes note.
        """
        found = cast(Aim, self.aimed).directions
        bent = self._applied is not None and self._applied.bends_directions
        sample = None if bent else record.sample(self.norm, found)
        if self._accept is not None:
            found = tuple(torch.where(self._accept, direction, 0.0) for direction in found)
        if factors is not None and factors.ndim == 0 and factors.device.type == "cpu":
            length = length * float(factors)  # one pass over the directions less
        elif factors is not None:
            factors = factors.to(self.device, self._dtype).expand(sum(map(len, found)))
            for batch, own in zip(found, factors.split([len(batch) for batch in found]), strict=True):
                batch.mul_(own.view(-1, 1, 1))
        record.add(self.group["role"], found, length=length, sample=sample)
        moves = self.bucket.parameter_shaped(found)
        decay = self.lr * self.group["weight_decay"]
        apply_(self.bucket.parameters, moves, length=length, decay=decay, accept=self._accept)
        self.aimed = self._taken = None

    def _averages(self, count: Tensor) -> list[Tensor]:
        """What the directions are for: the debiased momentum, or Nesterov's."""
        beta, buffers = self.group["momentum"], self._of(MOMENTUM)
        averages = look_ahead(buffers, self._gradients(), beta) if self.ahead else buffers
        return _divided(averages, debias(beta, count + 1 if self.ahead else count))

    def _directions(
        self, averages: list[Tensor], batches: tuple[Tensor, ...], moments: tuple[Tensor | None, ...]
    ) -> tuple[Tensor, ...]:
        """polar(M P_a) P_b, or the like in another norm; `batches` are the averages M."""
        applied, parameters = self._applied, self.bucket.parameters
        if applied is not None and not applied.on_gradient:
            batches = self.bucket.matrices(applied.times(parameters, averages, 0))
        found = directions(self.norm, batches, moments)
        if applied is None or not applied.bends_directions:
            return found
        return self.bucket.matrices(applied.times(parameters, self.bucket.parameter_shaped(found), 1))

    def _gradients(self) -> list[Tensor]:
        """What is averaged: the gradients, or, where these are preconditioned, what that makes of them."""
        if self._taken is not None:
            return self._taken
        gradients = [cast(Tensor, parameter.grad).to(self._dtype) for parameter in self.bucket.parameters]
        if self._accept is not None:
            gradients = [torch.where(self._accept, gradient, 0.0) for gradient in gradients]
        if self._applied is not None and self._applied.on_gradient:
            self._taken = gradients = self._applied.times(self.bucket.parameters, gradients, 0)
        return gradients

    def _of(self, key: str) -> list[Tensor]:
        return [state[key] for state in self._states]


def _products(one: Iterable[Tensor], other: Iterable[Tensor]) -> Tensor:
    return torch.stack([(a * b).sum() for a, b in zip(one, other, strict=True)]).sum()


def _divided(averages: Iterable[Tensor], weights: Tensor) -> list[Tensor]:
    """Each average divided by the sum of its weights; 0 where nothing was averaged yet."""
    safe = torch.where(weights == 0, 1.0, weights)
    return list(torch._foreach_div(list(averages), list(safe.unbind())))
