"""A refresh: new inputs into moments, moments into powers. Pure functions on the state of one layer at a time."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steepest.linalg import Damped, damped_factor, damped_inverse, damped_power, diagonal_power, ridge_unit
from steepest.stages.inputs.moments import MomentLayout
from steepest.stages.inputs.options import InputMoment

INPUT_MOMENT, INPUT_MASS, INPUT_POWERS = "input_moment", "input_mass", "input_powers"  # powers are made of the others


@dataclass
class Outcome:
    """How a refresh of many layers went, counted in matrices.

    Args:
        raised: Whose ridge had to grow.
        kept: Which keep the powers they had, because inputs or powers were not finite.
    """

    raised: int = 0
    kept: int = 0


def new_moments(
    state: dict[str, Tensor], layout: MomentLayout, options: InputMoment, dtype: torch.dtype, device: torch.device
) -> None:
    """Allocate the moment: a multiple of the identity.

    Args:
        state: Of the parameter that stands for all that read these inputs; written to.
        layout: Of the moment.
        options: Of the optimizer.
        dtype: Of the numbers.
        device: Of the numbers.
    """
    state[INPUT_MOMENT] = _identity(layout, dtype, device) * options.init
    state[INPUT_MASS] = torch.zeros(layout.mass_shape, dtype=dtype, device=device)


def no_powers(layout: MomentLayout, options: InputMoment, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Powers that change nothing, one for each exponent.

    Args:
        layout: Of the moment.
        options: Of the optimizer.
        dtype: Of the numbers.
        device: Of the numbers.
    """
    powers = [_identity(layout, dtype, device)] * len(options.powers)
    return torch.stack(powers) if powers else torch.empty((0, *layout.shape), dtype=dtype, device=device)


def refresh_(
    states: Sequence[dict[str, Tensor]],
    layouts: Sequence[MomentLayout],
    totals: Sequence[Tensor],
    masses: Sequence[Tensor],
    *,
    options: InputMoment,
    accept: Tensor | None,
) -> Outcome:
    """Average the moments, and invert those of one size together.

    Args:
        states: With the keys above; written to.
        layouts: One per state.
        totals: Sums of z zᵀ over tokens, likewise.
        masses: Sums of the tokens' weights, likewise; a matrix with none is left alone.
        options: Of the optimizer.
        accept: A 0-d boolean; where it is False nothing changes. None means True.

    Returns:
        What was unusual.
    """
    outcome = Outcome()
    fresh = [
        _average_(state, total, mass, options, accept, outcome)
        for state, total, mass in zip(states, totals, masses, strict=True)
    ]
    invert_(states, layouts, fresh, options=options, outcome=outcome)
    return outcome


def invert_(
    states: Sequence[dict[str, Tensor]],
    layouts: Sequence[MomentLayout],
    fresh: Sequence[Tensor],
    *,
    options: InputMoment,
    outcome: Outcome,
) -> None:
    """Make the powers of the moments, those of one size together.

    Args:
        states: With the keys above; written to.
        layouts: One per state.
        fresh: Which matrices of each state get new powers.
        options: Of the optimizer.
        outcome: Takes note of what was unusual.
    """
    alike: dict[tuple[object, ...], list[int]] = {}
    for index, (state, layout) in enumerate(zip(states, layouts, strict=True)):
        moment = state[INPUT_MOMENT]
        alike.setdefault((layout.structure == "diagonal", moment.shape[1:], moment.dtype, moment.device), []).append(
            index
        )
    for places in alike.values():
        moments = torch.cat([_corrected(states[index], options) for index in places])
        ready = torch.cat([fresh[index] for index in places])
        sizes = [len(fresh[index]) for index in places]
        diagonal = layouts[places[0]].structure == "diagonal"
        found = [_power(moments, exponent, options, diagonal=diagonal) for exponent in options.powers]
        ok = ready.clone()  # all powers of a matrix or none, so that they are of one moment
        raised = torch.zeros_like(ready)
        for damped in found:
            ok &= damped.ok
            raised |= damped.raised > 0
        outcome.kept += int((ready & ~ok).sum())
        outcome.raised += int((ready & raised).sum())
        for number, damped in enumerate(found):
            for index, power, own in zip(places, damped.power.split(sizes), ok.split(sizes), strict=True):
                old = states[index][INPUT_POWERS][number]
                old.copy_(torch.where(_over(own, power), power, old))


def multiplied(batch: Tensor, power: Tensor, layout: MomentLayout, *, solver: str) -> Tensor:
    """Matrices times their power.

    Args:
        batch: (S, m, n).
        power: As in the state, of `layout.shape`; a factor if the solver is "factor".
        layout: Of the power.
        solver: "inverse" or "factor".

    Returns:
        (S, m, n).
    """
    if layout.structure == "diagonal":
        return batch * power.unsqueeze(-2)
    blocks = layout.fan_in // layout.block
    parts = batch
    if blocks > 1:  # (S, m, k b) -> (S k, m, b)
        parts = batch.unflatten(-1, (blocks, layout.block)).transpose(1, 2).flatten(0, 1)
    result = torch.cholesky_solve(parts.mT, power).mT if solver == "factor" else parts @ power
    if blocks > 1:
        result = result.unflatten(0, (layout.stack, blocks)).transpose(1, 2).flatten(-2)
    return result


def _average_(
    state: dict[str, Tensor], total: Tensor, mass: Tensor, options: InputMoment, accept: Tensor | None, outcome: Outcome
) -> Tensor:
    """Move the moment toward the mean of z zᵀ; returns for which matrices that was done."""
    seen = mass > 0 if accept is None else (mass > 0) & accept.to(mass.device)
    mean = total / _over(torch.where(seen, mass, 1.0), total)
    usable = seen & mean.isfinite().flatten(1).all(-1)
    outcome.kept += int((seen & ~usable).sum())
    moment, weight = state[INPUT_MOMENT], state[INPUT_MASS]
    moment.copy_(torch.where(_over(usable, moment), torch.lerp(mean, moment, options.decay), moment))
    weight.copy_(torch.where(usable, options.decay * weight + (1 - options.decay), weight))
    return usable


def _corrected(state: dict[str, Tensor], options: InputMoment) -> Tensor:
    moment, weight = state[INPUT_MOMENT], state[INPUT_MASS]
    return moment / _over(torch.where(weight > 0, weight, 1.0), moment) if options.bias_correction else moment


def _power(moments: Tensor, exponent: float, options: InputMoment, *, diagonal: bool) -> Damped:
    if diagonal:
        unit = _diagonal_unit(moments, options)
        found = diagonal_power(moments, options.ridge * unit + options.ridge_floor, exponent)
    else:
        ridge = options.ridge * ridge_unit(moments, options.ridge_unit) + options.ridge_floor
        if options.solver == "factor":
            found = damped_factor(moments, ridge)
        elif exponent == 1:
            found = damped_inverse(moments, ridge)
        else:
            found = damped_power(moments, ridge, exponent)
    return found._replace(power=_normalized(found.power, options, diagonal=diagonal)) if options.normalize else found


def _diagonal_unit(diagonal: Tensor, options: InputMoment) -> Tensor:
    if options.ridge_unit == "spectral":
        return diagonal.amax(-1)
    if options.ridge_unit == "frobenius":
        return diagonal.square().mean(-1).sqrt()
    return diagonal.mean(-1)


def _normalized(power: Tensor, options: InputMoment, *, diagonal: bool) -> Tensor:
    """Scaled to a mean diagonal entry of one; for a factor, to one whose inverse has that."""
    if diagonal:
        return power / power.mean(-1, keepdim=True)
    inverse = torch.cholesky_inverse(power) if options.solver == "factor" else power
    mean = inverse.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    return power * mean.sqrt() if options.solver == "factor" else power / mean


def _identity(layout: MomentLayout, dtype: torch.dtype, device: torch.device) -> Tensor:
    if layout.structure == "diagonal":
        return torch.ones(layout.shape, dtype=dtype, device=device)
    return torch.eye(layout.block, dtype=dtype, device=device).repeat(layout.shape[0], 1, 1)


def _over(numbers: Tensor, like: Tensor) -> Tensor:
    """One number per matrix, in as many dimensions as the matrices have."""
    return numbers.view(-1, *(1,) * (like.ndim - 1))
