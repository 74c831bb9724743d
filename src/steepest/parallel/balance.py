"""Who works on which matrices: what a bucket costs, and an assignment that burdens no rank much more than another."""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from steepest.linalg import Coefficients, flops, get_coefficients
from steepest.linalg.products import OneByOne, products_for
from steepest.parallel.machine import Machine

# What a step of spectral descent does besides matrix products; a test counts again, call by call.
# Elementwise passes read and write every matrix so many times,
TRAFFIC = 25
# and in each step of the polynomial its Gram matrix: where matrices are worked on one by one, and where all at once.
GRAM_TRAFFIC_EACH, GRAM_TRAFFIC_TOGETHER = 32 / 3, 25 / 3
# Calls for a bucket and for each of its matrices, and those of the polynomial, likewise for each matrix or for all.
CALLS, CALLS_PER_MATRIX = 36, 18
POLAR_CALLS_EACH, POLAR_CALLS_TOGETHER = 70, 138
# Python's own work for a bucket and for each matrix, in the time of so many calls: from steps on 4 x 4 matrices.
PYTHON, PYTHON_PER_MATRIX = 54, 10


@dataclass(frozen=True)
class Work:
    """What a step does with a bucket.

    Args:
        flops: Of matrix products, a multiply-add counted as two.
        side: Short side of the products.
        traffic: Bytes that passes over all matrices of the bucket read and write.
        size: Bytes of these matrices.
        gram_traffic: Bytes that passes over Gram matrices read and write.
        gram_size: Bytes of the Gram matrices that are worked on together.
        calls: Of functions of torch.
        python: Python's own work, in the time of so many calls.
    """

    flops: int
    side: int
    traffic: float
    size: int
    gram_traffic: float
    gram_size: int
    calls: int
    python: int


def count_work(
    shape: tuple[int, int, int],
    *,
    coefficients: str | Coefficients | Sequence[Sequence[float]] = "auto",
    dtype: torch.dtype = torch.float32,
) -> Work:
    """Count what a step does with a bucket of equal matrices, on a CPU.

    Args:
        shape: (B, m, n).
        coefficients: Of the polynomial method.
        dtype: Of the products; all else is float32.

    Raises:
        ValueError: If a number of the shape is below 1, or the coefficients are not known.
    """
    if min(shape) < 1:
        raise ValueError(f"A bucket has shape=(B, m, n) with numbers of at least 1, got {shape}. Leave empty ones out.")
    count, short, long = shape[0], min(shape[1:]), max(shape[1:])
    one_by_one = isinstance(products_for(short, dtype, torch.device("cpu")), OneByOne)
    steps = len(get_coefficients(coefficients, dtype).steps)
    size, grams = 4 * count * short * long, dtype.itemsize * count * short * short
    return Work(
        flops=count * flops(short, long, coefficients=coefficients, dtype=dtype),
        side=short,
        traffic=TRAFFIC * size,
        size=size,
        gram_traffic=(GRAM_TRAFFIC_EACH if one_by_one else GRAM_TRAFFIC_TOGETHER) * steps * grams,
        gram_size=grams // count if one_by_one else grams,
        calls=CALLS + CALLS_PER_MATRIX * count + (POLAR_CALLS_EACH * count if one_by_one else POLAR_CALLS_TOGETHER),
        python=PYTHON + PYTHON_PER_MATRIX * count,
    )


def cost(
    shape: tuple[int, int, int],
    machine: Machine,
    *,
    coefficients: str | Coefficients | Sequence[Sequence[float]] = "auto",
    dtype: torch.dtype = torch.float32,
) -> float:
    """Seconds of the part of a step that works on a bucket of equal matrices.

    Args:
        shape: (B, m, n).
        machine: What works.
        coefficients: Of the polynomial method.
        dtype: Of the products; all else is float32.

    Raises:
        ValueError: If a number of the shape is below 1, or the coefficients are not known.
    """
    work = count_work(shape, coefficients=coefficients, dtype=dtype)
    products = work.flops / machine.flops_per_s(work.side)
    passes = work.traffic / machine.bytes_per_s(work.size) + work.gram_traffic / machine.bytes_per_s(work.gram_size)
    return products + passes + (work.calls + work.python) * machine.seconds_per_call


def assign(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Share out work: the costliest first, each to the rank that has least so far.

    The rank with most then has at most 4/3 - 1/(3 ranks) times what it would have in the best assignment.

    Args:
        costs: Of each piece, any unit.
        ranks: How many share.

    Returns:
        Indices into `costs` for each rank, increasing; the same on every rank, ties going to the lower index and rank.

    Raises:
        ValueError: If there is no rank, or a cost is negative or not finite.

    Source:
        Graham, 1969, Bounds on multiprocessing timing anomalies, theorem 2.

    Examples:
        >>> assign([3, 1, 4, 1, 5], ranks=2)
        [[1, 3, 4], [0, 2]]
    """
    if ranks < 1:
        raise ValueError(f"assign takes ranks of at least 1, got {ranks}.")
    for index, each in enumerate(costs):
        if not 0 <= each < math.inf:
            raise ValueError(f"assign takes finite costs of at least 0, got costs[{index}] = {each}.")
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0.0, rank) for rank in range(ranks)]
    for index in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        load, rank = heapq.heappop(loads)
        shares[rank].append(index)
        heapq.heappush(loads, (load + costs[index], rank))
    return [sorted(share) for share in shares]
