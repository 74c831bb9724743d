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
from typing import cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from steepest.notices import warn
from steepest.optim.momo.arrivals import ENTRIES, Arrivals, spaced
from steepest.ranks import scalar_type, world_size

WHOLE = 4096  # above, every number is near one over a whole number
FINE = 1e-5  # relative, of gradients' rounding; with more, factors are alike that have nothing to do with each other
REMEDY = (
    "Leave it out (max_grad_norm=0 in Trainer, gradient_clip_val=None in Lightning), as Momo's step size bounds the "
    "step; or clip all gradients together by their norm, as clip_grad_norm_ does."
)


class Witness:
    """Compares a few entries of each group's gradients, as backward left them, with those that a step finds.

    Args:
        groups: Of parameters.
    """

    def __init__(self, groups: Sequence[Sequence[Tensor]]) -> None:
        self.watch(groups)
        self._looks = 0
        self._warned = self._told = False
        self._scale: float | None = None
        self.undone: float | None = None  # what gradients were multiplied by besides; None where it was not read
        self._unit: float | None = None  # what stands for an unclipped gradient
        self._before: float | None = None
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

    def look(self) -> Tensor | float | None:
        """The factor by which the gradients were clipped; waits for an accelerator at steps 1, 2, 4, 8, ... only.

        Returns:
            In (0, 1], on this rank; None if nothing was seen and there is no other.

        Raises:
            ValueError: If gradients were changed by something that is not one factor, or not at most 1.
        """
        scale, self._scale, self.undone = self._scale, None, None
        factor = self._factor(1.0 if scale is None else scale, scaled=scale is not None)
        return 1.0 if factor is None and world_size() > 1 else factor

    def _factor(self, scale: float, *, scaled: bool) -> Tensor | float | None:
        pairs = [(s, p.grad) for s, p in zip(self.arrivals.seen, self.arrivals.watched, strict=False)]
        pairs = [(seen, now) for seen, now in pairs if seen is not None and now is not None and now.numel()]
        if not pairs:
            return None
        device = pairs[0][1].device
        rounding = max(torch.finfo(now.dtype).eps for _, now in pairs)
        ratio, common = compared(pairs, device, 8 * rounding)
        tolerance = _tolerance(rounding, sum(len(seen) for seen, _ in pairs))
        known = rounding <= FINE
        self._looks += 1
        if device.type != "cpu":
            self._scattered = self._scattered | ~common
            common = ~self._scattered
            if self._looks & (self._looks - 1):
                return _unread(ratio * (scale / (self._unit or 1.0)), tolerance, told=scaled, known=known)
        if not bool(common):
            return self._refuse_scattered()
        factor = float(ratio) * scale
        if not math.isfinite(factor):
            return factor
        clipping = self._read(factor, tolerance, told=scaled or (factor < 1 and not known))
        self.undone = cast(float, self._unit) / scale
        return clipping

    def _read(self, factor: float, tolerance: float, *, told: bool) -> float:
        """The part of a factor that is clipping; told: whatever else there is in it is known."""
        before, self._before = self._before, factor
        if self._unit is None:
            self._unit = factor if not told and _plain(factor, tolerance) else 1.0
        repeated = before is not None and before != 1.0 and math.isclose(before, factor, rel_tol=tolerance)
        octaves = math.log2(factor / self._unit)
        if not told and (repeated or abs(octaves - round(octaves)) <= 2 * tolerance):
            self._unit = factor
        if self._unit < factor <= 1:  # so the unit was clipping
            self._unit = factor if not told and _plain(factor, tolerance) else 1.0
        clipped = factor / self._unit
        if abs(clipped - 1) <= tolerance:
            return 1.0
        if clipped > 1:
            raise ValueError(
                f"Gradients were multiplied by {factor:.6g} between backward and step, and by {self._unit:.6g} before: "
                "Momo cannot tell what belongs to the loss. Scale the loss before backward() instead, and pass it "
                f"without what only guards against underflow. If this was clipping: {REMEDY}"
            )
        if not self._warned:
            self._warned = True
            warn(
                f"Gradients were changed between backward and step (by a factor of about {clipped:.3g}), as by "
                "clipping. Momo's model of the loss is clipped with them, from now on without a word. Clipping can be "
                "left out: its step size already bounds the step. If this was no clipping, scale the loss instead."
            )
        return clipped

    def _refuse_scattered(self) -> None:
        self._scattered = False
        if world_size() == 1:
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


def compared(pairs: Sequence[tuple[Tensor, Tensor]], device: torch.device, tolerance: float) -> tuple[Tensor, Tensor]:
    """How gradients of now compare with those of then.

    Args:
        pairs: Entries as they were, and the gradients of now.
        device: For the result.
        tolerance: Relative, of a gradient's entries together.

    Returns:
        The factor, 0-d, and whether it is one, above 0, for all entries that were not set to zero. Where there are
        none, or something is not finite: 1 and True.
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
    return torch.where(usable, ratio, 1.0), common | ~usable


def _tolerance(rounding: float, entries: int) -> float:
    """How far a factor may be off: it is rounded itself, in float32 most often, and each entry in its own type."""
    return 8 * max(rounding / math.sqrt(entries), min(rounding, torch.finfo(torch.float32).eps))


def _unread(factor: Tensor, tolerance: float, *, told: bool, known: bool) -> Tensor:
    """As `Witness._read` would say, as far as that can be said without waiting for the device."""
    octaves = factor.log2()
    away = octaves - octaves.round()
    if told:
        away = factor - 1
    elif not known:
        away = torch.where(factor < 1, factor - 1, away)
    return torch.where(away.abs() <= 2 * tolerance, 1.0, factor.clamp(max=1.0))


def _plain(factor: float, tolerance: float) -> bool:
    """Whether a factor is 1, one over a whole number or a power of two."""
    octaves, whole = math.log2(factor), 1 / factor
    return abs(octaves - round(octaves)) <= 2 * tolerance or (
        whole <= WHOLE and abs(whole - round(whole)) <= tolerance * whole
    )


def _rows(samples: Sequence[Tensor], device: torch.device) -> Tensor:
    return pad_sequence([sample.to(device, scalar_type(device)) for sample in samples], batch_first=True)
