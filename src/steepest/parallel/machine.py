"""What products, elementwise passes and calls cost on a machine: measured on kernels alone, never on an optimizer."""

import bisect
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from steepest.linalg.products import OneByOne, Products, Together, X, products_for
from steepest.linalg.symmetric import work_share

Clock = Callable[[], float]

# Of the square matrices that are multiplied: two on either side of where the library changes its kernel, and others.
SIDES = (32, 64, 128, 160, 256, 512, 1024)
FLOPS, MOST = 2**27, 16  # of one timed batch of products, and matrices in it
PASS_BYTES = (2**16, 2**18, 2**20, 2**22, 2**24, 2**26)  # of the tensors that are passed over
CHAINS, CALLS = 16, 9  # of calls on tiny tensors, and calls in one, as torch dispatches them; a test counts
REPETITIONS = 7

Rates = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Machine:
    """How fast one device, with one number of threads, is at the three things that a step is made of.

    Args:
        products: Pairs of the side of square matrices, increasing, and operations per second of their products, a
            multiply-add counted as two.
        passes: Pairs of the bytes of a tensor, increasing, and bytes read and written per second by an elementwise
            pass that allocates what it writes. Small tensors stay in a cache, large ones do not.
        seconds_per_call: Of a call on a tensor so small that only the call counts.

    Raises:
        ValueError: If a number is not finite and positive, or pairs are not increasing.
    """

    products: Rates
    passes: Rates
    seconds_per_call: float

    def __post_init__(self) -> None:
        for name, pairs in (("products", self.products), ("passes", self.passes)):
            sizes = [0, *(size for size, _ in pairs)]
            if len(sizes) == 1 or any(a >= b for a, b in itertools.pairwise(sizes)):
                raise ValueError(f"Machine takes {name}=((size, rate), ...) of increasing sizes, got {pairs}.")
        numbers = (self.seconds_per_call, *(rate for _, rate in (*self.products, *self.passes)))
        if not all(0 < number < math.inf for number in numbers):
            raise ValueError(f"Machine takes finite positive numbers, got {self}. Measure one with calibrate().")

    def flops_per_s(self, side: float) -> float:
        """Rate of products of matrices whose short side is `side`."""
        return _between(self.products, side)

    def bytes_per_s(self, size: float) -> float:
        """Rate of elementwise passes over tensors of `size` bytes."""
        return _between(self.passes, size)


def calibrate(*, dtype: torch.dtype = torch.float32, clock: Clock = time.perf_counter) -> Machine:
    """Measure this machine's CPU with the present number of threads, in about a second.

    Every number is a median, as a prediction of medians asks for: what a kernel does at its luckiest, no step sees.

    Args:
        dtype: Of the matrix products; passes are over float32.
        clock: Tells seconds.
    """
    generator = torch.Generator().manual_seed(0)
    products = tuple((side, _product_rate(side, dtype, generator, clock)) for side in SIDES)
    passes = tuple((size, _pass_rate(size, clock)) for size in PASS_BYTES)
    return Machine(products, passes, _call_seconds(clock))


def typical(machines: Sequence[Machine]) -> Machine:
    """The median of every number, of one machine measured several times.

    Args:
        machines: At least one, all with the same sizes.
    """
    return Machine(
        _medians([machine.products for machine in machines]),
        _medians([machine.passes for machine in machines]),
        statistics.median(machine.seconds_per_call for machine in machines),
    )


def _medians(tables: Sequence[Rates]) -> Rates:
    sizes = [size for size, _ in tables[0]]
    rates = zip(*([rate for _, rate in table] for table in tables), strict=True)
    return tuple((size, statistics.median(of_size)) for size, of_size in zip(sizes, rates, strict=True))


def _between(table: Rates, size: float) -> float:
    """A power law between two sizes; beyond the ends, the rate there."""
    right = bisect.bisect_right([known for known, _ in table], size)
    if right in (0, len(table)):
        return table[min(right, len(table) - 1)][1]
    (low, slow), (high, fast) = table[right - 1 : right + 1]
    return slow * (fast / slow) ** (math.log(size / low) / math.log(high / low))


def _multiply(products: Products[X], gram: Tensor, x: X) -> None:
    products.apply(products.product(gram, gram), x)


def _product_rate(side: int, dtype: torch.dtype, generator: torch.Generator, clock: Clock) -> float:
    """Operations per second of the two products of which most of a step consists, by the library's own kernels."""
    products = products_for(side, dtype, torch.device("cpu"))
    count = 1 if isinstance(products, OneByOne) else max(1, min(MOST, FLOPS // (2 * side**3)))
    x = torch.randn(count, side, side, generator=generator).to(dtype)
    if isinstance(products, OneByOne):
        multiply = partial(_multiply, products, products.gram(x[0]), x[0])
    else:
        multiply = partial(_multiply, products, products.gram([x]), [x])
    repeated = max(1, FLOPS // (4 * count * side**3))
    seconds = _median(lambda: [multiply() for _ in range(repeated)], clock) / repeated
    share = work_share(products.parts) if isinstance(products, Together) else 1.0
    return (1 + share) * count * 2 * side**3 / seconds


def _pass_rate(size: int, clock: Clock) -> float:
    """Bytes per second of x + y, two tensors read and a new one written."""
    a = torch.ones(size // 4)
    b = torch.ones(size // 4)
    return 3 * size / _median(lambda: a + b, clock)


def _call_seconds(clock: Clock) -> float:
    """Seconds of one call, from calls of the kinds that a step consists of."""
    x = torch.ones(1, 4, 4)

    def calls() -> None:
        y = x
        for _ in range(CHAINS):
            norm = torch.linalg.vector_norm(y, dim=(-2, -1), keepdim=True)
            inverse = 1 / torch.where(norm == 0, 1.0, norm)
            y = torch.baddbmm(y, x, x, beta=0.5, alpha=0.1).mul_(inverse).mT

    return _median(calls, clock) / (CHAINS * CALLS)


def _median(function: Callable[[], object], clock: Clock) -> float:
    function()
    seconds: list[float] = []
    for _ in range(REPETITIONS):
        start = clock()
        function()
        seconds.append(clock() - start)
    return statistics.median(seconds)
