"""Finds the factor by which gradients were clipped between backward and step.

The model of the loss averages f_i + <g_i, w - w_i>; a clipped gradient c_i g_i is that of F + c_i (f_i - F), which is
above the same lower bound F. So a factor that is known does no harm: `step_size.clipped`.

What multiplies gradients by the same number at every step is no clipping but scaling, of a sum to a mean, or of the
loss against underflow. A factor that is seen first is taken for that if it is one over a whole number, or a power of
two, and any factor that comes twice in a row is; else it is clipping. In half precision every factor is near such a
number, and factors come twice by chance: there what is below 1 is clipping.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from steepest.notices import warn
from steepest.optim.momo.arrivals import ENTRIES, Arrivals, spaced
from steepest.optim.momo.tap import Loss
from steepest.optim.replay import recording
from steepest.ranks import local, scalar_type, world_size

WHOLE = 4096  # above, every number is near one over a whole number
FINE = 1e-5  # relative, of gradients' rounding; with more, factors are alike that have nothing to do with each other
REMEDY = (
    "Leave it out (max_grad_norm=0 in Trainer, gradient_clip_val=None in Lightning), as Momo's step size bounds the "
    "step; or clip all gradients together by their norm, as clip_grad_norm_ does."
)


@dataclass(frozen=True)
class Unit:
    """What stands for an unclipped gradient, as far as earlier steps tell.

    Args:
        factor: What gradients are multiplied by besides clipping; None: not known yet.
        before: What they were multiplied by in all, in the step before.
    """

    factor: float | None = None
    before: float | None = None

    def read(self, factor: float, tolerance: float, *, told: bool) -> tuple["Unit", float]:
        """The part of a factor that is clipping.

        Args:
            factor: What gradients were multiplied by, finite and above 0.
            tolerance: Relative.
            told: Whether what there is in it besides is known.

        Returns:
            What is known after this step, and the part, in (0, 1].

        Raises:
            ValueError: If it is above 1.
        """
        unit = self.factor
        if unit is None:
            unit = factor if not told and _plain(factor, tolerance) else 1.0
        before = self.before
        repeated = before is not None and before != 1.0 and math.isclose(before, factor, rel_tol=tolerance)
        octaves = math.log2(factor / unit)
        if not told and (repeated or abs(octaves - round(octaves)) <= 2 * tolerance):
            unit = factor
        if unit < factor <= 1:  # so the unit was clipping
            unit = factor if not told and _plain(factor, tolerance) else 1.0
        part = factor / unit
        if abs(part - 1) <= tolerance:
            part = 1.0
        if part > 1:
            raise ValueError(
                f"Gradients were multiplied by {factor:.6g} between backward and step, and by {unit:.6g} before: "
                "Momo cannot tell what belongs to the loss. Scale the loss before backward() instead, and pass it "
                f"without what only guards against underflow. If this was clipping: {REMEDY}"
            )
        return Unit(unit, factor), part


class Witness:
    """Compares a few entries of each group's gradients, as backward left them, with those that a step finds.

    Each rank looks at the parts that it keeps. What gradients were multiplied by is the same everywhere, so those who
    have entries tell those who have none: `look` is what this rank sees, and `read` makes of what all of them have seen
    the part that is clipping, from numbers that are the same on all ranks.

    Args:
        groups: Of parameters.
    """

    def __init__(self, groups: Sequence[Sequence[Tensor]]) -> None:
        self.watch(groups)
        self._looks = 0
        self._warned = self._told = False
        self._scale: float | None = None
        self.undone: float | None = None  # what gradients were multiplied by besides; None where it was not read
        self._unit = Unit()
        self._scaled = False  # whether the gradients of this step were
        self._scattered: Tensor | bool = False  # on an accelerator: something was seen since the last reading

    def watch(self, groups: Sequence[Sequence[Tensor]]) -> None:
        """Watch these groups in place of what was watched before."""
        self.arrivals = Arrivals()
        for group in groups:
            self.arrivals.watch(group)

    def scaled(self, scaler: object) -> None:
        """Remember by how much a loss was scaled.

        Args:
            scaler: If it is a GradScaler, gradients of the next step were multiplied by one over its scale.
        """
        self._scale = scaler.get_scale() if isinstance(scaler, torch.amp.GradScaler) else None

    def look(self) -> tuple[Loss, Loss] | None:
        """What the gradients were multiplied by; waits for an accelerator at steps 1, 2, 4, 8, ... only.

        Returns:
            The factor on this rank, times whether there was anything to see, and whether there was: a mean of each over
            ranks makes the mean factor. None if nothing was seen, or if the step is being recorded for replays.

        Raises:
            ValueError: If gradients were changed by something that is not one factor, or not at most 1.
        """
        scale, self._scale, self.undone = self._scale, None, None
        if recording():  # replays know nothing of what backward left
            return None
        self._scaled = scale is not None
        scale = 1.0 if scale is None else scale
        found = [(seen, p.grad) for seen, p in zip(self.arrivals.seen, self.arrivals.watched, strict=False)]
        pairs = [(seen, local([now])[0]) for seen, now in found if seen is not None and now is not None]
        pairs = [(seen, now) for seen, now in pairs if now.numel() and len(seen)]
        if not pairs:
            return None
        device = pairs[0][1].device
        ratio, common, there = compared(pairs, device, 8 * max(torch.finfo(now.dtype).eps for _, now in pairs))
        if device.type != "cpu":
            self._scattered = self._scattered | ~common
            common = ~self._scattered
            if not self._reads_next:
                return torch.where(there, ratio * scale, 0.0), there.to(ratio.dtype)
        if not bool(common):
            return self._refuse_scattered()
        if not bool(there):
            return None
        factor = float(ratio) * scale
        if math.isfinite(factor):
            unit, _ = self._unit.read(factor, self._tolerance, told=self._is_told(factor))
            self.undone = (unit.factor or 1.0) / scale
        return factor, 1.0

    def read(self, seen: Loss | None, there: Loss | None) -> Loss | None:
        """The factor by which the gradients were clipped; waits for an accelerator when `look` does.

        Args:
            seen: What `look` saw, or the mean of that over all ranks.
            there: Likewise, whether there was anything to see.

        Returns:
            In (0, 1], the same on all ranks; None if nothing was seen and there is no other.

        Raises:
            ValueError: If it is above 1.
        """
        if seen is None or there is None:
            return None
        factor, reads = seen / there, self._reads_next
        self._looks += 1
        if isinstance(factor, Tensor) and factor.device.type != "cpu" and not reads:
            known = self._rounding <= FINE
            return _unread(factor / (self._unit.factor or 1.0), self._tolerance, told=self._scaled, known=known)
        factor = float(factor)
        if math.isnan(factor):  # nobody saw anything
            return None
        if not math.isfinite(factor):
            return factor
        self._unit, clipped = self._unit.read(factor, self._tolerance, told=self._is_told(factor))
        if clipped < 1 and not self._warned:
            self._warned = True
            warn(
                f"Gradients were changed between backward and step (by a factor of about {clipped:.3g}), as by "
                "clipping. Momo's model of the loss is clipped with them, from now on without a word. Clipping can be "
                "left out: its step size already bounds the step. If this was no clipping, scale the loss instead."
            )
        return clipped

    @property
    def _reads_next(self) -> bool:
        """Whether an accelerator is waited for in this step."""
        return not (self._looks + 1) & self._looks

    @property
    def _rounding(self) -> float:
        return max(torch.finfo(parameter.dtype).eps for parameter in self.arrivals.watched)

    @property
    def _tolerance(self) -> float:
        """How far a factor may be off: it is rounded itself, in float32 mostly, and each entry in its own type."""
        entries = sum(min(ENTRIES, parameter.numel()) for parameter in self.arrivals.watched)
        return 8 * max(self._rounding / math.sqrt(entries), min(self._rounding, torch.finfo(torch.float32).eps))

    def _is_told(self, factor: float) -> bool:
        """Whether what there is in a factor besides clipping is known; in half precision it could be anything."""
        return self._scaled or (factor < 1 and self._rounding > FINE)

    def _refuse_scattered(self) -> None:
        self._scattered = False
        if world_size() == 1 or self.arrivals.sharded:
            raise ValueError(
                "Gradients were changed between backward and step, and not by one factor, as by clipping of values, of "
                f"each group or each parameter: Momo's model of the loss would be wrong. {REMEDY}"
            )
        if not self._told:
            self._told = True
            warn(
                "Gradients were changed between backward and step, and not by one factor, as by averaging over ranks "
                "without DistributedDataParallel. Momo cannot see then whether they were clipped, too, and its model "
                f"of the loss would be wrong. {REMEDY}"
            )


def compared(
    pairs: Sequence[tuple[Tensor, Tensor]], device: torch.device, tolerance: float
) -> tuple[Tensor, Tensor, Tensor]:
    """How gradients of now compare with those of then.

    Args:
        pairs: Entries as they were, and the gradients of now.
        device: For the result.
        tolerance: Relative, of a gradient's entries together.

    Returns:
        The factor, 0-d, whether it is one, above 0, for all entries that were not set to zero, and whether there are
        any, all finite; else the factor is 1, for all.
    """
    then = _rows([seen for seen, _ in pairs], device)
    now = _rows([spaced(gradient) for _, gradient in pairs], device)
    left = torch.where(now == 0, 0.0, then)
    squares = left.square().sum(1)
    known = squares > 0
    ratios = torch.where(known, (left * now).sum(1) / squares, 0.0)
    ratio = ratios.sum() / known.sum()  # a mean of ones is one exactly
    rounded = ENTRIES * max(torch.finfo(g.dtype).smallest_normal * torch.finfo(g.dtype).eps for _, g in pairs)
    apart = torch.linalg.vector_norm(now - ratio * left, dim=1)
    common = (apart <= tolerance * ratio.abs() * squares.sqrt() + rounded).all() & (ratio > 0)
    usable = known.any() & now.isfinite().all() & then.isfinite().all()
    return torch.where(usable, ratio, 1.0), common | ~usable, usable


def _unread(factor: Tensor, tolerance: float, *, told: bool, known: bool) -> Tensor:
    """As `Unit.read` would say, as far as that can be said without waiting for the device; 1 if nobody saw any."""
    octaves = factor.log2()
    away = octaves - octaves.round()
    if told:
        away = factor - 1
    elif not known:
        away = torch.where(factor < 1, factor - 1, away)
    return torch.where((away.abs() <= 2 * tolerance) | factor.isnan(), 1.0, factor.clamp(max=1.0))


def _plain(factor: float, tolerance: float) -> bool:
    """Whether a factor is 1, one over a whole number or a power of two."""
    octaves, whole = math.log2(factor), 1 / factor
    return abs(octaves - round(octaves)) <= 2 * tolerance or (
        whole <= WHOLE and abs(whole - round(whole)) <= tolerance * whole
    )


def _rows(samples: Sequence[Tensor], device: torch.device) -> Tensor:
    return pad_sequence([sample.to(device, scalar_type(device)) for sample in samples], batch_first=True)
