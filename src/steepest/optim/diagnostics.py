"""Scalars of the last step, kept on the device until somebody reads them."""

from dataclasses import dataclass, field

from torch import Tensor

from steepest.anatomy import Role
from steepest.geometry import Norm, Spectral, scale_factor
from steepest.optim.bucket import Bucket


@dataclass
class _Entry:
    role: Role
    size: Tensor  # sum of squares of the directions' entries
    lr: float | Tensor
    entries: int
    singular: tuple[float, int] | None  # scale s and number of singular values, for the spectral norm


@dataclass
class StepRecord:
    """One entry per bucket that moved in the last step."""

    entries: list[_Entry] = field(default_factory=list)

    def clear(self) -> None:
        """Forget the step before."""
        self.entries.clear()

    def add(self, role: Role, norm: Norm, bucket: Bucket, *, size: Tensor, lr: float | Tensor) -> None:
        """Note a bucket's directions.

        Args:
            role: Of its group.
            norm: Of its group.
            bucket: The parameters.
            size: 0-d sum of squares of all entries of the directions.
            lr: Learning rate that multiplied them.
        """
        count = len(bucket.parameters)
        singular = None
        if isinstance(norm, Spectral) and bucket.view is not None:
            blocks = bucket.view.blocks(bucket.parameters[0].shape)
            scales = {scale_factor(norm.scale, m, n) for _, m, n in blocks}
            if len(scales) == 1:  # parts of different shape have sizes that cannot be told apart in one sum
                singular = (scales.pop(), count * sum(stack * min(m, n) for stack, m, n in blocks))
        if isinstance(lr, Tensor):  # a scheduler may overwrite it before it is read
            lr = lr.clone()
        entries = count * bucket.parameters[0].numel()
        self.entries.append(_Entry(role, size, lr, entries, singular))

    def read(self) -> dict[str, float]:
        """Per role: "ROLE/update_rms" and, for spectral norms, "ROLE/orthogonality_error"."""
        result: dict[str, float] = {}
        for role in dict.fromkeys(entry.role for entry in self.entries):
            of_role = [entry for entry in self.entries if entry.role == role]
            squares = sum(float(entry.size) * float(entry.lr) ** 2 for entry in of_role)
            result[f"{role}/update_rms"] = (squares / sum(entry.entries for entry in of_role)) ** 0.5
            spectral = [(entry.size, *entry.singular) for entry in of_role if entry.singular is not None]
            if spectral:
                mean = sum(float(size) / scale**2 for size, scale, _ in spectral) / sum(n for _, _, n in spectral)
                result[f"{role}/orthogonality_error"] = abs(mean - 1)
        return result
