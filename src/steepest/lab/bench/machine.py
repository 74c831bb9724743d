"""What polar factors, passes and calls cost on a machine: measured on kernels alone, never on an optimizer."""

import bisect
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from steepest.linalg.polar import flops, polars
from steepest.linalg.products import Together, products_for

Clock = Callable[[], float]

# Of square matrices: two on either side of where the library changes its kernel, and others.
SIDES = (32, 64, 128, 160, 256, 512, 1024)
# Matrices in one timed batch of polar factors: as many as a layer has with one short side, more or fewer where that is
# less than the least or more than the most operations.
MATRICES, LEAST_FLOPS, MOST_FLOPS = 6, 2**27, 2**32
# Of the tensors that are passed over, and of tall ones that are transposed. Above 32 MB, the C library takes memory
# from the system anew for each.
PASS_BYTES = (2**16, 2**18, 2**20, 2**22, 2**24, 2**25, 2**26)
TRANSPOSED_BYTES = (2**16, 2**18, 2**20, 2**22, 2**24)
TALL = 4  # long side / short side of these
CHAINS, CALLS = 8, 120  # of polar factors of a tiny matrix, and calls in one, as torch dispatches them; a test counts
REPETITIONS = 7

Rates = tuple[tuple[int, float], ...]
TABLES = ("products", "passes", "fresh", "transposed")


@dataclass(frozen=True)
class Machine:
    """How fast one device, with one number of threads, is at the things that a step is made of.

    Args:
        products: Pairs of the side of square matrices, increasing, and operations per second of the products in their
            polar factors, a multiply-add counted as two; passes over Gram matrices in between slow them down.
        passes: Pairs of the bytes of a tensor, increasing, and bytes read and written per second by an elementwise
            pass in place. Small tensors stay in a cache, large ones do not.
        fresh: Likewise by a pass that allocates what it writes.
        transposed: Likewise by copies of a tall matrix to a wide one and back.
        seconds_per_call: Of a call on a tensor so small that only the call counts, with Python's work around it.

    Raises:
        ValueError: If a number is not finite and positive, or pairs are not increasing.
    """

    products: Rates
    passes: Rates
    fresh: Rates
    transposed: Rates
    seconds_per_call: float

    def __post_init__(self) -> None:
        tables = {name: getattr(self, name) for name in TABLES}
        for name, pairs in tables.items():
            sizes = [0, *(size for size, _ in pairs)]
            if len(sizes) == 1 or any(a >= b for a, b in itertools.pairwise(sizes)):
                raise ValueError(f"Machine takes {name}=((size, rate), ...) of increasing sizes, got {pairs}.")
        numbers = (self.seconds_per_call, *(rate for _, rate in itertools.chain(*tables.values())))
        if not all(0 < number < math.inf for number in numbers):
            raise ValueError(f"Machine takes finite positive numbers, got {self}. Measure one with calibrate().")


def calibrate(*, dtype: torch.dtype = torch.float32, clock: Clock = time.perf_counter) -> Machine:
    """Measure this machine's CPU with the present number of threads, in one or two seconds.

    Every number is a median, as a prediction of medians asks for: what a kernel does at its luckiest, no step sees.

    Args:
        dtype: Of the matrix products; passes are over float32.
        clock: Tells seconds.
    """
    generator = torch.Generator(device="cpu").manual_seed(0)
    tiny = _tiny_seconds(clock)
    products = tuple((side, _product_rate(side, dtype, tiny, generator, clock)) for side in SIDES)
    return Machine(
        products,
        passes=tuple((size, _pass_rate(size, clock)) for size in PASS_BYTES),
        fresh=tuple((size, _fresh_rate(size, clock)) for size in PASS_BYTES),
        transposed=tuple((size, _transposed_rate(size, clock)) for size in TRANSPOSED_BYTES),
        seconds_per_call=tiny / CALLS,
    )


def typical(machines: Sequence[Machine]) -> Machine:
    """The median of every number, of one machine measured several times.

    Args:
        machines: At least one, all with the same sizes.
    """
    return Machine(
        **{name: _medians([getattr(machine, name) for machine in machines]) for name in TABLES},
        seconds_per_call=statistics.median(machine.seconds_per_call for machine in machines),
    )


def _medians(tables: Sequence[Rates]) -> Rates:
    sizes = [size for size, _ in tables[0]]
    rates = zip(*([rate for _, rate in table] for table in tables), strict=True)
    return tuple((size, statistics.median(of_size)) for size, of_size in zip(sizes, rates, strict=True))


def rate_at(table: Rates, size: float) -> float:
    """A power law between two sizes; beyond the ends, the rate there.

    Args:
        table: Of a machine.
        size: Between whose sizes.
    """
    right = bisect.bisect_right([known for known, _ in table], size)
    if right in (0, len(table)):
        return table[min(right, len(table) - 1)][1]
    (low, slow), (high, fast) = table[right - 1 : right + 1]
    return slow * (fast / slow) ** (math.log(size / low) / math.log(high / low))


def _product_rate(side: int, dtype: torch.dtype, tiny: float, generator: torch.Generator, clock: Clock) -> float:
    """Operations per second of polar factors, besides calls that are made once for all matrices."""
    products = products_for(side, dtype, torch.device("cpu"))
    together = isinstance(products, Together)
    each = flops(side, side, dtype=dtype)
    count = max(1, min(MOST_FLOPS // each, max(MATRICES, LEAST_FLOPS // each)))
    x = torch.randn(count, side, side, generator=generator, device="cpu")
    seconds = _median(lambda: polars([x], dtype=dtype, times=[-1.0]), clock)
    # at least half: a machine that is disturbed may take as long for a tiny one
    return count * each / (max(seconds - tiny, seconds / 2) if together else seconds)


def _pass_rate(size: int, clock: Clock) -> float:
    """Bytes per second of a += b, two tensors read and one written."""
    a = torch.zeros(size // 4, device="cpu")
    b = torch.ones(size // 4, device="cpu")
    return 3 * size / _median(lambda: a.add_(b), clock)


def _fresh_rate(size: int, clock: Clock) -> float:
    """Bytes per second of a + b, two tensors read and a new one written."""
    a = torch.ones(size // 4, device="cpu")
    b = torch.ones(size // 4, device="cpu")
    return 3 * size / _median(lambda: a + b, clock)


def _transposed_rate(size: int, clock: Clock) -> float:
    """Bytes per second of a copy of a tall matrix to a wide one, and of a product written back."""
    short = math.isqrt(size // (4 * TALL))
    tall = torch.ones(TALL * short, short, device="cpu")
    return 4 * size / _median(lambda: torch.mul(tall.mT.contiguous(), 2.0, out=tall.mT), clock)


def _tiny_seconds(clock: Clock) -> float:
    """Seconds of the polar factor of a matrix so small that only calls count."""
    x = torch.ones(1, 4, 4, device="cpu")

    def several() -> None:
        for _ in range(CHAINS):
            polars([x], coefficients="nonic", dtype=torch.float32, times=[-1.0])

    return _median(several, clock) / CHAINS


def _median(function: Callable[[], object], clock: Clock) -> float:
    function()
    seconds: list[float] = []
    for _ in range(REPETITIONS):
        start = clock()
        function()
        seconds.append(clock() - start)
    return statistics.median(seconds)
