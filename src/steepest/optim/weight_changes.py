"""Notices weights that something else than the optimizer wrote to."""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

SAME = 1e-5  # relative; of a sum over all weights in float32
CALLER = 6  # from the warning through this file, the step and torch's wrappers of it to the line that called step()


class Changes:
    """Compares the weights that a step finds with those that the last one left.

    Within a process by torch's count of writes to each tensor, which costs nothing and misses only what is written
    through `.data`; across a checkpoint or a copy by the sum of the absolute values of all weights.
    """

    def __init__(self) -> None:
        self._versions: dict[Tensor, int] = {}
        self._expected: tuple[list[Tensor], float] | None = None
        self._warned = False

    def note(self, parameters: Sequence[Tensor]) -> None:
        """The step is done: from here on, nobody else should write.

        Args:
            parameters: That the step moved.
        """
        self._versions = {parameter: parameter._version for parameter in parameters}
        self._expected = None

    def found(self, parameters: Sequence[Tensor], *, warn: bool) -> bool:
        """Whether somebody else wrote to the weights.

        Args:
            parameters: That the step is about to move.
            warn: Whether to say so, the first time.
        """
        changed = any(self._versions.get(p, p._version) != p._version for p in parameters)
        if self._expected is not None:
            members, total = self._expected
            changed = not math.isclose(total_size(members), total, rel_tol=SAME)
        if changed and warn and not self._warned:
            self._warned = True
            warnings.warn(
                "Weights were changed since the last step by something else than this optimizer. Momo's model of the "
                "loss starts again from the present loss, now and whenever this happens again. If it happens at every "
                "step, use Momo(bookkeeping='direct').",
                UserWarning,
                stacklevel=CALLER,
            )
        return changed

    def saved(self, parameters: Sequence[Tensor]) -> float:
        """What a checkpoint needs; waits for the device.

        Args:
            parameters: All of the optimizer's.
        """
        if self._expected is not None:
            return self._expected[1]
        return total_size(parameters) if self._versions else 0.0

    def load(self, parameters: Sequence[Tensor], total: float) -> None:
        """Expect the weights that `saved` saw; they may still be loaded after this."""
        self._versions = {}
        self._expected = (list(parameters), total)

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle: counts of writes are of this process' tensors, a sum over the weights is not."""
        members = list(self._versions)
        expected = (members, total_size(members)) if members else self._expected
        return {"_versions": {}, "_expected": expected, "_warned": self._warned}


def total_size(parameters: Sequence[Tensor]) -> float:
    """Sum of the absolute values of all entries."""
    sums = [torch.linalg.vector_norm(p.detach().float(), ord=1) for p in parameters if p.numel()]
    return math.fsum(float(one) for one in sums)
