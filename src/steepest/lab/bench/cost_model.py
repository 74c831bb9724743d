"""What a step costs: its operations, passes and calls, counted from the shapes of its buckets."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from steepest.anatomy import LINEAR, Bucket, Load
from steepest.lab.bench.machine import Machine, rate_at
from steepest.linalg import Coefficients, get_coefficients
from steepest.linalg.plan import Iteration, Job, choose
from steepest.linalg.polar import packed
from steepest.linalg.products import Together
from steepest.optim.packing import SHARES, default_cap, loads

# What a step of spectral descent does besides polar factors; a test counts again, call by call.
# Passes read and write the matrices so many times: weights, gradients and momenta of all layers, which no cache holds
# where there are many; and what is between of one load.
ALL_TRAFFIC, LOAD_TRAFFIC = 10, 2
# Of copies that transpose a tall matrix, there and back, where matrices are worked on one by one.
TRANSPOSED_TRAFFIC = 4
# Of passes over what a matrix has beyond a square one, in tensors that are new each time: absolute values, quotient,
# transposed copy, product, what oneDNN makes of both factors, result. Rates of products know those of square ones.
LONG_TRAFFIC = 7 * 3
# Calls for a step, a load, a shape in it, and for each part that memory divides its polar factors into, by whether
# these are computed one by one; more where they are computed together. Those of factors one by one are in the rate of
# products.
CALLS, CALLS_PER_LOAD, CALLS_PER_SHAPE, CALLS_PER_PART, CALLS_PER_PART_ALONE = 5, 10, 5, 4, 6
POLAR_CALLS, POLAR_CALLS_PER_SHAPE = 24, 30
# Of them in each step of an iteration, by its form and the number of its coefficients.
STEP_CALLS = {"newton-schulz": {3: 9, 5: 22}, "gram": {3: 14, 5: 25}}
# Python's own work, in the time of so many calls: from steps on 4 x 4 matrices.
PYTHON, PYTHON_PER_LOAD, PYTHON_PER_MATRIX = 60, 15, 4

Shape = tuple[int, int, int]
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Work:
    """What a step does with buckets.

    Args:
        products: Operations of the products in polar factors, a multiply-add counted as two, by their short side.
        passes: Bytes that passes in place read and write, by the bytes of what is passed over again and again.
        fresh: Likewise of passes that allocate what they write.
        transposed: Likewise of copies of tall matrices to wide ones and back.
        calls: Of functions of torch.
        python: Python's own work, in the time of so many calls.
    """

    products: dict[int, int] = field(default_factory=dict[int, int])
    passes: dict[int, float] = field(default_factory=dict[int, float])
    fresh: dict[int, float] = field(default_factory=dict[int, float])
    transposed: dict[int, float] = field(default_factory=dict[int, float])
    calls: int = 0
    python: int = 0


def count_work(
    shapes: Sequence[Shape],
    *,
    coefficients: str | Coefficients | Sequence[Sequence[float]] = "auto",
    dtype: torch.dtype = torch.float32,
) -> Work:
    """Count what a step does with buckets of equal matrices, on a CPU, in the loads that the optimizer packs.

    Args:
        shapes: (B, m, n) of each bucket.
        coefficients: Of the polynomial method.
        dtype: Of the products; all else is float32.

    Raises:
        ValueError: If there is no bucket, a number of a shape is below 1, or the coefficients are not known.
    """
    if not shapes or min(map(min, shapes)) < 1:
        raise ValueError(
            f"A step takes buckets of shapes (B, m, n) with numbers of at least 1, got {shapes}. Leave empty ones out."
        )
    chosen = get_coefficients(coefficients, dtype)
    ordered = sorted(shapes, key=lambda shape: sorted(shape[1:]))
    buckets = [Bucket((torch.empty(m, n, device="meta"),) * count, LINEAR) for count, m, n in ordered]
    total = sum(4 * math.prod(shape) for shape in shapes)
    cap = default_cap(buckets)
    packed_loads = list(loads(buckets, memory_cap=cap))
    outside = Work(
        passes={total: ALL_TRAFFIC * total},
        calls=CALLS + CALLS_PER_LOAD * len(packed_loads),
        python=PYTHON + PYTHON_PER_LOAD * len(packed_loads) + PYTHON_PER_MATRIX * sum(count for count, _, _ in shapes),
    )
    return _sum([outside, *(part for load in packed_loads for part in _of_load(load, chosen, dtype, cap))])


def _of_load(load: Load, chosen: Coefficients, dtype: torch.dtype, cap: int) -> Iterator[Work]:
    """What is done with a load: its passes, and its polar factors, short side by short side."""
    alike: dict[int, list[Job]] = {}
    for bucket in load.buckets:
        x = torch.empty(len(bucket.parameters), *bucket.parameters[0].shape, device="meta")
        job = Job.of(x, x, 1.0)
        alike.setdefault(job.rows, []).append(job)
        yield Work(fresh={4 * x.numel(): 4 * x.numel() * LOAD_TRAFFIC}, calls=CALLS_PER_SHAPE)
    for rows, jobs in alike.items():
        iteration = choose("auto", chosen, rows, [(len(job.source), job.columns) for job in jobs], dtype, CPU)
        for together in packed(jobs, iteration, max(1, (SHARES - 2) * cap // SHARES)):
            yield _of_polars(iteration, together)


def _of_polars(iteration: Iteration, jobs: Sequence[Job]) -> Work:
    """What polar factors take that are computed together."""
    work = Work(products={iteration.rows: sum(len(job.source) * iteration.flops(job.columns) for job in jobs)})
    together = isinstance(iteration.products, Together)
    for job in jobs:
        count, size = len(job.source), 4 * job.rows * job.columns
        beyond = count * (size - 4 * job.rows**2)
        work.fresh[size] = work.fresh.get(size, 0.0) + LONG_TRAFFIC * beyond
        if not together and not job.source.is_contiguous():
            work.transposed[size] = work.transposed.get(size, 0.0) + TRANSPOSED_TRAFFIC * count * size
    steps = sum(STEP_CALLS[iteration.form][len(step)] for step in iteration.chosen.steps)
    shared = POLAR_CALLS + steps + POLAR_CALLS_PER_SHAPE * len(jobs) if together else 0
    return replace(work, calls=CALLS_PER_PART + shared if together else CALLS_PER_PART_ALONE)


def _sum(works: Sequence[Work]) -> Work:
    result = Work(calls=sum(work.calls for work in works), python=sum(work.python for work in works))
    for work in works:
        for mine, its in zip(_tables(result), _tables(work), strict=True):
            for key, amount in its.items():
                mine[key] = mine.get(key, 0) + amount
    return result


def _tables(work: Work) -> Sequence[dict[int, Any]]:
    return (work.products, work.passes, work.fresh, work.transposed)


def cost(
    shapes: Sequence[Shape],
    machine: Machine,
    *,
    coefficients: str | Coefficients | Sequence[Sequence[float]] = "auto",
    dtype: torch.dtype = torch.float32,
) -> float:
    """Seconds of a step on buckets of equal matrices.

    Args:
        shapes: (B, m, n) of each bucket.
        machine: What works.
        coefficients: Of the polynomial method.
        dtype: Of the products; all else is float32.

    Raises:
        ValueError: As `count_work`.
    """
    work = count_work(shapes, coefficients=coefficients, dtype=dtype)
    rates = (machine.products, machine.passes, machine.fresh, machine.transposed)
    spent = sum(
        amount / rate_at(rate, key)
        for rate, table in zip(rates, _tables(work), strict=True)
        for key, amount in table.items()
    )
    return spent + (work.calls + work.python) * machine.seconds_per_call
