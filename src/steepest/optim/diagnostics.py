"""Scalars of the last step, kept on the device until somebody reads them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from steepest.anatomy import Role
from steepest.geometry import Norm


@dataclass
class _Entry:
    role: Role
    size: Tensor  # sum of squares of the directions' entries
    length: float | Tensor
    entries: int
    factors: list[tuple[Tensor, float]]  # one direction of each shape, and what its polar factor was multiplied with


@dataclass
class StepRecord:
    """One entry per load that moved in the last step, and numbers of the step as a whole."""

    entries: list[_Entry] = field(default_factory=list[_Entry])
    scalars: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    counts: dict[str, list[Tensor]] = field(default_factory=dict[str, list[Tensor]])
    _seen: set[tuple[str, int, torch.Size]] = field(default_factory=set[tuple[str, int, torch.Size]])

    def clear(self) -> None:
        """Forget the step before."""
        self.entries.clear()
        self.scalars.clear()
        self.counts.clear()
        self._seen.clear()

    def sample(self, role: Role, norm: Norm, batches: Sequence[Tensor], radius: float) -> list[tuple[Tensor, float]]:
        """One direction of each shape, for norms of polar factors; copies, so that the batches need not stay in memory.

        Args:
            role: Of its group.
            norm: Of its group.
            batches: Directions, (B, m, n) each.
            radius: Their norm.
        """
        scales = [norm.polar_scale(*batch.shape[-2:]) for batch in batches]
        of_shape = {
            (role, id(norm), batch.shape[-2:]): (batch, scale)
            for batch, scale in zip(batches, scales, strict=True)
            if scale is not None
        }
        new = {kind: found for kind, found in of_shape.items() if kind not in self._seen}
        self._seen.update(new)
        return [(batch[0].clone(), radius * scale) for batch, scale in new.values()]

    def add(
        self,
        role: Role,
        size: Tensor,
        entries: int,
        *,
        length: float | Tensor,
        sample: Sequence[tuple[Tensor, float]],
        accept: Tensor | None = None,
    ) -> None:
        """Note how far a load moves.

        Args:
            role: Of its group.
            size: Sum of the squares of what moves it, on all ranks.
            entries: How many it has.
            length: Multiplies what moves it.
            sample: What `sample` returned.
            accept: A 0-d boolean; where it is False, nothing moves. None means True.
        """
        if isinstance(length, Tensor):  # a scheduler may overwrite it before it is read
            length = length.clone()
        noted = size if accept is None else torch.where(accept, size, 0.0)
        self.entries.append(_Entry(role, noted, length, entries, list(sample)))

    def note(self, **scalars: Tensor) -> None:
        """Note numbers of the whole step, 0-d each."""
        self.scalars.update(scalars)

    def count(self, name: str, number: Tensor, accept: Tensor | None) -> None:
        """Note how many matrices of a load something happened to.

        Args:
            name: Of what.
            number: 0-d.
            accept: A 0-d boolean; where it is False, nothing happened. None means True.
        """
        self.counts.setdefault(name, []).append(number if accept is None else torch.where(accept, number, 0))

    def read(self) -> dict[str, float]:
        """The step's numbers; per role "ROLE/update_rms" and, for spectral norms, "ROLE/orthogonality_error"."""
        result = {name: float(number) for name, number in self.scalars.items()}
        result |= {name: float(sum(map(int, numbers))) for name, numbers in self.counts.items()}
        for role in dict.fromkeys(entry.role for entry in self.entries):
            of_role = [entry for entry in self.entries if entry.role == role]
            squares = sum(float(entry.size) * (float(entry.length) * float(entry.length)) for entry in of_role)
            result[f"{role}/update_rms"] = (squares / sum(entry.entries for entry in of_role)) ** 0.5
            residuals = [float(_residual(move / factor)) for entry in of_role for move, factor in entry.factors]
            if residuals:
                result[f"{role}/orthogonality_error"] = max(residuals)
        return result


def _residual(factor: Tensor) -> Tensor:
    """‖Q Qᵀ Q - Q‖_F / ‖Q‖_F: zero exactly if every singular value is 0 or 1; 0 for a zero matrix."""
    wide = factor.mT if factor.size(-2) > factor.size(-1) else factor
    error = torch.linalg.vector_norm(wide @ wide.mT @ wide - wide)
    norm = torch.linalg.vector_norm(wide)
    return error / torch.where(norm == 0, 1.0, norm)
