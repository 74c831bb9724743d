"""How near each set of coefficients brings the momenta of a training run to their polar factors."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from steepest.lab.bench.accuracy import Oracle, consult
from steepest.lab.methods import build_optimizer, resolve
from steepest.lab.runs.schedule import cooldown
from steepest.lab.tasks.order import ExampleOrder
from steepest.lab.tasks.task import Task
from steepest.linalg import COEFFICIENTS, Coefficients, flops, get_coefficients, minimax, polar
from steepest.optim import SteepestDescent
from steepest.optim.state import MOMENTUM

METHOD = "muon"
NAMES = ("nonic", "polar_express", "jordan", "quintic", "cans", "polar_express_1.02", "deepseek_v4")
SHORT = minimax(3e-3, 4, norm="schatten8")
SETS: dict[str, Coefficients] = {
    **{name: COEFFICIENTS[name] for name in NAMES},
    "minimax(3e-3, 4, schatten8)": SHORT,
}
NORMAL = "normal"  # where matrices of independent normal entries come from


@dataclass(frozen=True)
class Spectra:
    """Singular values of the matrices of one source, relative to the largest s1 of each.

    `frobenius` and `schatten8` are ‖M‖ / s1, by how much the norms that matrices are divided by are above the largest
    singular value, means over the matrices; `median` and `tenth` are the median and the tenth percentile of all s / s1.
    """

    source: str
    matrices: int
    frobenius: float
    schatten8: float
    median: float
    tenth: float


@dataclass(frozen=True)
class Finding:
    """What one set of coefficients makes of the matrices of one source; all None, with a reason, if it is refused.

    With M a matrix of k singular values, P = U Vᵀ and Q what the set makes of M: `smallest`, `median` and `largest` are
    singular values of all Q; means over the matrices are `distance` ‖Q - P‖_F / √k, `orthogonality_error`
    ‖Q Qᵀ - I‖_F / √k and `alignment` <M, Q> / ‖M‖_nuc, which is 1 for P and may be above 1 where Q is longer than P.
    `flops` are those of the products of one matrix, a mean too.
    """

    source: str
    coefficients: str
    reason: str | None = None
    flops: float | None = None
    smallest: float | None = None
    median: float | None = None
    largest: float | None = None
    distance: float | None = None
    orthogonality_error: float | None = None
    alignment: float | None = None


def collect_momenta(task: Task, *, steps: int, at: Sequence[int], seed: int) -> dict[int, list[Tensor]]:
    """Train with the lab's Muon, and take the momenta of all matrices out on the way.

    Args:
        task: Loaded; its tuned options are taken.
        steps: Length of the run, for which the learning rate falls.
        at: Steps after which momenta are taken, at most `steps`.
        seed: Of the weights and of the order of examples.

    Returns:
        By step, in order, matrices (m, n).

    Raises:
        ValueError: If a step is outside of the run, or a loss is not finite, or a momentum is zero.
    """
    wanted = sorted(set(at))
    if not wanted or wanted[0] < 1 or wanted[-1] > steps:
        raise ValueError(f"at takes steps from 1 to steps={steps}, got {list(at)}.")
    found: dict[int, list[Tensor]] = {}
    for step, optimizer in _training(task, steps, seed):
        if step in wanted:
            found[step] = momenta_of(optimizer)
            if not all(matrix.any() for matrix in found[step]):
                raise ValueError(f"A momentum is zero after step {step} and has no direction. Look at a later step.")
        if step == wanted[-1]:
            break
    return found


def _training(task: Task, steps: int, seed: int) -> Iterator[tuple[int, SteepestDescent]]:
    """One step of training after the other, and the optimizer after each."""
    model = task.build_model(seed)
    options = resolve(METHOD, task=task.name, preset=task.preset, options={}).options
    optimizer = cast(SteepestDescent, build_optimizer(METHOD, model, options))
    scheduler = LambdaLR(optimizer, partial(cooldown, steps=steps))
    order = ExampleOrder(task.train_size, seed=seed)
    for step in range(1, steps + 1):
        loss = task.loss(model, task.batch(order.take(task.budget.batch_size)))
        if not math.isfinite(value := loss.item()):
            raise ValueError(f"The loss became {value} in step {step}. Take fewer steps, or another seed.")
        loss.backward()
        optimizer.step(loss=loss)
        scheduler.step()
        optimizer.zero_grad()
        yield step, optimizer


def momenta_of(optimizer: SteepestDescent) -> list[Tensor]:
    """Copies of the momenta of all trainable matrices, (m, n) each, as their views divide the parameters."""
    return [
        matrix.clone()
        for row in optimizer.plan
        if row.role == "matrix" and row.trainable and row.view is not None
        for batch in row.view.split_tensor(optimizer.state[row.parameter][MOMENTUM])
        for matrix in batch
    ]


def normal_like(matrices: Sequence[Tensor], *, seed: int) -> list[Tensor]:
    """Matrices of the same shapes with independent normal entries."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return [torch.randn(matrix.shape, generator=generator, device="cpu") for matrix in matrices]


def look_at_spectra(source: str, known: Sequence[Oracle]) -> Spectra:
    """Of at least one matrix."""
    relative = [one.values / one.values[0] for one in known]
    norms = {order: [float(torch.linalg.vector_norm(s, order)) for s in relative] for order in (2, 8)}
    tenth, median = torch.cat(relative).quantile(torch.tensor([0.1, 0.5], dtype=torch.float64, device="cpu")).tolist()
    means = {order: statistics.fmean(own) for order, own in norms.items()}
    return Spectra(source, len(known), means[2], means[8], median, tenth)


def assess(source: str, name: str, known: Sequence[Oracle], *, dtype: torch.dtype) -> Finding:
    """Compare what a set makes of matrices with their polar factors.

    Args:
        source: Of the matrices.
        name: A key of `SETS`.
        known: At least one.
        dtype: Of the products.
    """
    chosen = SETS[name]
    try:
        get_coefficients(chosen, dtype)
    except ValueError as refusal:
        return Finding(source, name, reason=str(refusal))
    counts, values, errors = list[int](), list[Tensor](), list[tuple[float, float, float]]()
    for one in known:
        matrix, k = one.gradient, len(one.values)
        q = polar(matrix, coefficients=chosen, dtype=dtype).double()
        s = torch.linalg.svdvals(q)
        counts.append(flops(*matrix.shape, coefficients=chosen, dtype=dtype))
        values.append(s)
        errors.append(
            (
                float((q - one.polar).norm()) / math.sqrt(k),
                float((s.square() - 1).norm()) / math.sqrt(k),
                float((matrix.double() * q).sum()) / one.nuclear,
            )
        )
    together = torch.cat(values)
    distance, orthogonality, alignment = map(statistics.fmean, zip(*errors, strict=True))
    return Finding(
        source,
        name,
        flops=statistics.fmean(counts),
        smallest=float(together.min()),
        median=float(together.median()),
        largest=float(together.max()),
        distance=distance,
        orthogonality_error=orthogonality,
        alignment=alignment,
    )


def compare(momenta: dict[int, list[Tensor]], *, dtype: torch.dtype, seed: int) -> tuple[list[Spectra], list[Finding]]:
    """All sets on the momenta of each step, and on normal matrices of the same shapes.

    Args:
        momenta: By step, as `collect_momenta` returns them.
        dtype: Of the products.
        seed: Of the normal matrices.
    """
    first = next(iter(momenta.values()))
    sources = {**{f"step {step}": own for step, own in momenta.items()}, NORMAL: normal_like(first, seed=seed)}
    spectra, findings = list[Spectra](), list[Finding]()
    for source, matrices in sources.items():
        known = list(map(consult, matrices))
        spectra.append(look_at_spectra(source, known))
        findings += [assess(source, name, known, dtype=dtype) for name in SETS]
    return spectra, findings
