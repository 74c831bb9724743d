"""How near the direction of an optimizer comes to the polar factor of its gradient."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from steepest.lab.bench.contestants import Contestant, Settings
from steepest.lab.bench.shapes import Shape, matrix_shape

Spectrum = Literal["gaussian", "decaying"]

MATRICES = 4  # of each shape
SMALLEST = 1e-3  # singular value of the decaying spectrum, relative to the largest
SETTINGS = Settings(lr=1.0)  # from weights of zero, so that the step is read off without rounding


@dataclass(frozen=True)
class Accuracy:
    """Of one direction D, k singular values, against P = U Vᵀ of its gradient; or the mean over several.

    `orthogonality_error` ‖Q Qᵀ - I‖_F / √k and `distance` ‖Q - P‖_F / √k are those of the best multiple Q = D / c,
    c = <D, P> / k: a common factor is the learning rate's affair. `alignment` is <G, D> / (‖G‖_nuc ‖D‖₂), the share of
    the steepest descent within the norm of D. `smallest` and `largest` are singular values of D as it is applied.
    """

    orthogonality_error: float
    distance: float
    alignment: float
    smallest: float
    largest: float


@dataclass(frozen=True)
class Oracle:
    """A gradient, its polar factor and its singular values, largest first, from a decomposition in float64."""

    gradient: Tensor
    polar: Tensor
    values: Tensor

    @property
    def nuclear(self) -> float:
        """The sum of the singular values."""
        return float(self.values.sum())


def sampled(shapes: Sequence[Shape]) -> list[Shape]:
    """At most `MATRICES` of each shape."""
    return [shape for shape, count in Counter(shapes).items() for _ in range(min(count, MATRICES))]


def gaussian(shape: Shape, generator: torch.Generator) -> Tensor:
    """Independent normal entries."""
    return torch.randn(shape, generator=generator, device="cpu")


def decaying(shape: Shape, generator: torch.Generator) -> Tensor:
    """Singular values in geometric progression from 1 to `SMALLEST`, random bases."""
    rows, columns = matrix_shape(shape)
    k = min(rows, columns)
    left, right = (
        torch.linalg.qr(torch.randn(side, k, generator=generator, dtype=torch.float64, device="cpu")).Q
        for side in (rows, columns)
    )
    values = torch.logspace(0, math.log10(SMALLEST), k, dtype=torch.float64, device="cpu")
    return ((left * values) @ right.mT).float().reshape(shape)


def draw_oracles(
    spectrum: Spectrum, shapes: Sequence[Shape], *, dtype: torch.dtype, device: str, seed: int
) -> list[Oracle]:
    """Seeded gradients of some of the shapes, with what they are to be compared with.

    Args:
        spectrum: "gaussian" or "decaying".
        shapes: Of the parameters.
        dtype: Of the parameters.
        device: Theirs, too.
        seed: Of the gradients.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    draw = {"gaussian": gaussian, "decaying": decaying}[spectrum]
    return [consult(draw(shape, generator).to(device, dtype)) for shape in sampled(shapes)]


def consult(gradient: Tensor) -> Oracle:
    """Decompose a gradient of any shape as (out, everything else)."""
    u, s, vh = torch.linalg.svd(gradient.detach().cpu().double().flatten(1), full_matrices=False)
    return Oracle(gradient, u @ vh, s)


def judge(direction: Tensor, oracle: Oracle) -> Accuracy:
    """Compare a direction (m, n) with the polar factor."""
    d = direction.double()
    wide = d if d.size(0) <= d.size(1) else d.mT
    k = wide.size(0)
    squares = torch.linalg.eigvalsh(wide @ wide.mT).clamp(min=0)  # of the singular values
    best = float((d * oracle.polar).sum()) / k
    largest = math.sqrt(float(squares[-1]))
    return Accuracy(
        orthogonality_error=float((squares / best**2 - 1).square().mean().sqrt()),
        distance=float((d / best - oracle.polar).norm()) / math.sqrt(k),
        alignment=float((oracle.gradient.cpu().double().flatten(1) * d).sum()) / (oracle.nuclear * largest),
        smallest=math.sqrt(float(squares[0])),
        largest=largest,
    )


def first_directions(contestant: Contestant, gradients: Sequence[Tensor]) -> list[Tensor]:
    """What one step from zero weights and no history adds, (m, n) each, without the factor √max(1, m / n).

    All contestants scale by that factor; the first momentum is a multiple of the gradient.
    """
    flat = [gradient.flatten(1) if contestant.matrices_only else gradient for gradient in gradients]
    params = [torch.zeros_like(gradient).requires_grad_() for gradient in flat]
    step = contestant.build(list(params), SETTINGS)
    for param, gradient in zip(params, flat, strict=True):
        param.grad = gradient.clone()
    step()
    matrices = [param.detach().flatten(1) for param in params]
    return [-matrix.cpu().double() / math.sqrt(max(1.0, matrix.size(0) / matrix.size(1))) for matrix in matrices]


def accuracy(contestant: Contestant, oracles: Sequence[Oracle]) -> Accuracy:
    """Means over the matrices of the errors, and the extremes of the singular values."""
    directions = first_directions(contestant, [oracle.gradient for oracle in oracles])
    each = [judge(direction, oracle) for direction, oracle in zip(directions, oracles, strict=True)]
    names = [field.name for field in dataclasses.fields(Accuracy)]
    means = {name: statistics.fmean(getattr(one, name) for one in each) for name in names}
    extremes = {"smallest": min(one.smallest for one in each), "largest": max(one.largest for one in each)}
    return Accuracy(**{**means, **extremes})
