"""Notices weights that something else than the optimizer wrote to."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from steepest.notices import warn as warn_user
from steepest.optim.momo.arrivals import spaced

SAME = 1e-5  # relative; of a sum over all weights in float32
NEVER = -1.0  # what no sum of absolute values is


class Changes:
    """Compares the weights that a step finds with those that the last one left.

    Within a process by the bits of a few entries of each parameter, so that weights that were swapped out and came back
    the same are no change. As others may be written to without touching these entries, the sum of the absolute values
    of each parameter is kept as well, one pass over the weights, from the first time on that torch's count of writes
    says that somebody wrote. Across a checkpoint or a copy by the sum of the absolute values of all weights.
    """

    def __init__(self) -> None:
        self._parameters: list[Tensor] = []
        self._versions: list[int] = []
        self._entries: list[Tensor] = []
        self._sums: list[Tensor] = []
        self._views: dict[Tensor, tuple[int, Tensor]] = {}
        self._written = False  # by somebody else, ever
        self._expected: tuple[list[Tensor], float] | None = None
        self._warned = False

    def note(self, parameters: Sequence[Tensor]) -> None:
        """The step is done: from here on, nobody else should write.

        Args:
            parameters: That the step moved.
        """
        self._parameters = list(parameters)
        self._versions = [parameter._version for parameter in parameters]
        self._entries = self._packed()
        self._sums = _sizes(parameters) if self._written else []
        self._expected = None

    def replaced(self) -> None:
        """Others stand where parameters stood that the last step moved, which is a change of weights."""
        if self._parameters:
            self._expected = (self._parameters, NEVER)

    def found(self, *, warn: bool) -> bool | Tensor:
        """Whether somebody else wrote other values to the weights.

        Args:
            warn: Whether to say so, the first time.

        Returns:
            True or False on the CPU, else a 0-d boolean on a device; it is waited for if somebody wrote at all, until
            the first warning.
        """
        written = any(p._version != v for p, v in zip(self._parameters, self._versions, strict=True))
        changed = self._differs()
        if self._expected is not None:
            members, total = self._expected
            changed = not math.isclose(total_size(members), total, rel_tol=SAME)
        self._written = self._written or written
        if isinstance(changed, Tensor) and written and not self._warned:
            changed = bool(changed)
        if changed is True and warn and not self._warned:
            self._warned = True
            warn_user(
                "Weights were changed since the last step by something else than this optimizer. Momo's model of the "
                "loss starts again from the present loss, now and whenever this happens again. If it happens at every "
                "step, use Momo(bookkeeping='direct')."
            )
        return changed

    def saved(self, parameters: Sequence[Tensor]) -> float:
        """What a checkpoint needs; waits for the device.

        Args:
            parameters: All of the optimizer's.
        """
        if self._expected is not None:
            return self._expected[1]
        if not self._parameters:
            return 0.0
        return NEVER if bool(self._differs()) else total_size(parameters)

    def load(self, parameters: Sequence[Tensor], total: float) -> None:
        """Expect the weights that `saved` saw; they may still be loaded after this."""
        self.__init__()
        self._expected = (list(parameters), total)

    def _differs(self) -> bool | Tensor:
        """Whether entries, or sums where they are kept, are others than the last step left."""
        if not self._parameters:
            return False
        pairs = list(zip(self._entries, self._packed(), strict=True))
        if any(then.shape != now.shape or then.dtype != now.dtype for then, now in pairs):
            return True
        if self._sums:
            pairs += zip(self._sums, _sizes(self._parameters), strict=True)
        device = self._parameters[0].device
        apart = torch.stack([(then != now.to(then.device)).any().to(device) for then, now in pairs]).any()
        return bool(apart) if device.type == "cpu" else apart

    def _packed(self) -> list[Tensor]:
        """Entries of all parameters, one tensor for each dtype and device."""
        alike: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for parameter in self._parameters:
            alike.setdefault((parameter.dtype, parameter.device), []).append(self._view(parameter))
        return [torch.cat(own) for own in alike.values()]

    def _view(self, parameter: Tensor) -> Tensor:
        """Entries of a parameter, as a view that is made once."""
        place, view = self._views.get(parameter, (None, None))
        if view is None or place != parameter.data_ptr():
            view = spaced(parameter)
            shared = view.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
            if shared:
                self._views[parameter] = (parameter.data_ptr(), view)
        return view

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle: entries and counts of writes are of this process' tensors, a sum is not."""
        total = self.saved(self._parameters)
        expected = (self._parameters, total) if self._parameters else self._expected
        return {**Changes().__dict__, "_written": self._written, "_expected": expected, "_warned": self._warned}


def _sizes(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [torch.linalg.vector_norm(p.detach(), ord=1, dtype=torch.float32) for p in parameters]


def total_size(parameters: Sequence[Tensor]) -> float:
    """Sum of the absolute values of all entries."""
    sums = [torch.linalg.vector_norm(p.detach().float(), ord=1) for p in parameters if p.numel()]
    return math.fsum(float(one) for one in sums)
