"""Scalars of the last step, kept on the device until somebody reads them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from steepest.anatomy import Role
from steepest.geometry import Norm, Spectral, scale_factor


@dataclass
class _Entry:
    role: Role
    size: Tensor  # sum of squares of the directions' entries
    lr: float | Tensor
    entries: int
    factor: Tensor | None  # one polar factor of the bucket


@dataclass
class StepRecord:
    """One entry per bucket that moved in the last step."""

    entries: list[_Entry] = field(default_factory=list[_Entry])

    def clear(self) -> None:
        """Forget the step before."""
        self.entries.clear()

    def add(self, role: Role, norm: Norm, batches: Sequence[Tensor], *, lr: float | Tensor) -> None:
        """Note a bucket's directions.

        Args:
            role: Of its group.
            norm: Of its group.
            batches: Directions, (B, m, n) each.
            lr: Learning rate that multiplies them.
        """
        size = torch.stack([torch.linalg.vector_norm(batch).square() for batch in batches]).sum()
        factor = None
        if isinstance(norm, Spectral):  # a copy: the batch itself would stay in memory with it
            factor = batches[0][0] / scale_factor(norm.scale, *batches[0].shape[-2:])
        if isinstance(lr, Tensor):  # a scheduler may overwrite it before it is read
            lr = lr.clone()
        self.entries.append(_Entry(role, size, lr, sum(batch.numel() for batch in batches), factor))

    def read(self) -> dict[str, float]:
        """Per role: "ROLE/update_rms" and, for spectral norms, "ROLE/orthogonality_error"."""
        result: dict[str, float] = {}
        for role in dict.fromkeys(entry.role for entry in self.entries):
            of_role = [entry for entry in self.entries if entry.role == role]
            squares = sum(float(entry.size) * float(entry.lr) ** 2 for entry in of_role)
            result[f"{role}/update_rms"] = (squares / sum(entry.entries for entry in of_role)) ** 0.5
            residuals = [float(_residual(entry.factor)) for entry in of_role if entry.factor is not None]
            if residuals:
                result[f"{role}/orthogonality_error"] = max(residuals)
        return result


def _residual(factor: Tensor) -> Tensor:
    """‖Q Qᵀ Q - Q‖_F / ‖Q‖_F: zero exactly if every singular value is 0 or 1; 0 for a zero matrix."""
    wide = factor.mT if factor.size(-2) > factor.size(-1) else factor
    error = torch.linalg.vector_norm(wide @ wide.mT @ wide - wide)
    norm = torch.linalg.vector_norm(wide)
    return error / torch.where(norm == 0, 1.0, norm)
