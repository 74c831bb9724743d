"""The benchmark of a step: everybody on the same matrices, in turns."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass

import torch

from steepest.lab.bench.accuracy import Accuracy
from steepest.lab.bench.contestants import BASELINE, Contestant, Settings, choose
from steepest.lab.bench.examine import Examined, Workload, examine, make_workload
from steepest.lab.bench.floor import FASTEST, Floor, find_floor, gemm_works, rates
from steepest.lab.bench.shapes import WIDTHS, Shape, make_shapes, matrix_shape
from steepest.lab.bench.timing import Quartiles, paired_ratio, quartiles, take_turns
from steepest.names import unknown_name

DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Bench:
    """What to measure.

    Args:
        shapes: A set of shapes.
        widths: One case each; None for the set's default, which for "many-small" is no width at all.
        layers: Of each; None for the set's default.
        peers: Names of contestants, or "all".
        pairs: Rounds, in each of which everybody steps once.
        warm_up: Rounds before those.
        threads: Of torch.
        dtype: Of parameters and gradients, "float32" or "bfloat16".
        device: Where they are.
        seed: Of weights and gradients.
        exact: Whether directions are compared with polar factors, which takes decompositions in float64 on the CPU.

    Raises:
        ValueError: If a name is not known, or a number does not fit.
    """

    shapes: str = "gpt2"
    widths: tuple[int, ...] | None = None
    layers: int | None = None
    peers: tuple[str, ...] = ("all",)
    pairs: int = 20
    warm_up: int = 3
    threads: int = 1
    dtype: str = "float32"
    device: str = "cpu"
    seed: int = 0
    exact: bool = True

    def __post_init__(self) -> None:
        if self.pairs < 2:
            raise ValueError(f"A benchmark takes at least 2 pairs, for their quartiles, got pairs={self.pairs}.")
        if self.dtype not in DTYPES:
            raise ValueError(unknown_name("dtype", self.dtype, DTYPES))
        choose(self.peers)
        for width in self.cases():
            self.shapes_of(width)

    def cases(self) -> tuple[int | None, ...]:
        """The widths, smallest first."""
        default = next((widths for name, widths in WIDTHS.items() if name == self.shapes), None)
        widths = self.widths or default
        return (None,) if widths is None else tuple(sorted(set(widths)))

    def shapes_of(self, width: int | None) -> list[Shape]:
        """All shapes of one case."""
        return make_shapes(self.shapes, width=width, layers=self.layers, seed=self.seed)


@dataclass(frozen=True)
class Row:
    """One contestant in one case; the `reason` says why it has no numbers.

    `milliseconds` of a step; `ratio` of its time to that of `steepest` in the same round; `gflops` are the operations
    of its matrix products, and `gflops_per_second` the rate it got through them; `of_floor` is its median time relative
    to the floor of its dtype, `of_limit` to the limit; `peak_bytes` is the most memory held within a step beyond that
    before it, `of_bucket` relative to the largest group of matrices of one shape.
    """

    contestant: str
    package: str
    version: str | None
    products: str
    note: str
    reason: str | None = None
    milliseconds: Quartiles | None = None
    ratio: Quartiles | None = None
    gflops: float | None = None
    gflops_per_second: float | None = None
    of_floor: float | None = None
    of_limit: float | None = None
    peak_bytes: int | None = None
    of_bucket: float | None = None
    gaussian: Accuracy | None = None
    decaying: Accuracy | None = None


@dataclass(frozen=True)
class Case:
    """All rows for one width.

    `floors` are by dtype of the products, `gemm_gflops_per_second` by dtype and sides; `limits` and
    `fastest_gflops_per_second` likewise, with products that torch has no public name for. `cpu_share` is the processor
    time of the rounds relative to the wall's: with one thread, well below 1 if the machine is busy with other work.
    `seconds` of every round are those of contestants and products.
    """

    shapes: str
    width: int | None
    layers: int | None
    matrices: int
    parameters: int
    largest_bucket_bytes: int
    floors: Mapping[str, Floor]
    limits: Mapping[str, Floor]
    gemm_gflops_per_second: Mapping[str, Mapping[str, float]]
    fastest_gflops_per_second: Mapping[str, Mapping[str, float]]
    cpu_share: float
    rows: tuple[Row, ...]
    seconds: Mapping[str, Sequence[float]]


def measure(
    bench: Bench, *, tell: Callable[[str], None], contestants: Sequence[Contestant] | None = None
) -> list[Case]:
    """Run the benchmark.

    Args:
        bench: What to measure.
        tell: Is told what is being done.
        contestants: Who steps, `steepest` among them; None: those that the benchmark names.

    Returns:
        A case per width.
    """
    with _threads(bench.threads):
        chosen = choose(bench.peers) if contestants is None else contestants
        return [_measure_case(bench, chosen, width, tell) for width in bench.cases()]


def _measure_case(
    bench: Bench, contestants: Sequence[Contestant], width: int | None, tell: Callable[[str], None]
) -> Case:
    shapes, dtype = bench.shapes_of(width), DTYPES[bench.dtype]
    label = bench.shapes if width is None else f"{bench.shapes} {width}"
    work = make_workload(
        shapes, dtype=dtype, device=bench.device, seed=bench.seed, settings=Settings(), exact=bench.exact
    )
    known = {contestant.name: contestant for contestant in contestants}
    found: dict[str, Examined | str] = {}
    for contestant in contestants:
        tell(f"{label}: {contestant.name}")
        found[contestant.name] = examine(contestant, work)
    ready = {name: one for name, one in found.items() if not isinstance(one, str)}
    dtypes = list(dict.fromkeys(known[name].products_dtype(dtype, bench.device) for name in ready))
    works = {name: one.step for name, one in ready.items()}
    works |= gemm_works(shapes, dtypes, device=bench.device, seed=bench.seed)
    tell(f"{label}: {bench.pairs} rounds of {', '.join(ready)}")
    wall, cpu = time.perf_counter(), time.process_time()
    seconds = take_turns(works, rounds=bench.pairs, warm_up=bench.warm_up)
    share = (time.process_time() - cpu) / (time.perf_counter() - wall)
    gemm = {_plain(one): rates(seconds, shapes, one) for one in dtypes}
    fastest = {_plain(one): rates(seconds, shapes, one, forms=FASTEST) for one in dtypes}
    floors, limits = ({name: find_floor(shapes, own) for name, own in one.items()} for one in (gemm, fastest))
    bucket = largest_bucket(shapes) * dtype.itemsize
    return Case(
        shapes=bench.shapes,
        width=width,
        layers=bench.layers,
        matrices=len(shapes),
        parameters=sum(weight.numel() for weight in work.weights),
        largest_bucket_bytes=bucket,
        floors=floors,
        limits=limits,
        gemm_gflops_per_second=_by_name(gemm),
        fastest_gflops_per_second=_by_name(fastest),
        cpu_share=share,
        rows=tuple(_row(known[name], one, work, seconds, (floors, limits), bucket) for name, one in found.items()),
        seconds=seconds,
    )


def _row(
    contestant: Contestant,
    found: Examined | str,
    work: Workload,
    seconds: Mapping[str, Sequence[float]],
    least: tuple[Mapping[str, Floor], Mapping[str, Floor]],
    bucket: int,
) -> Row:
    products = _plain(contestant.products_dtype(work.weights[0].dtype, work.device))
    row = Row(contestant.name, contestant.package, contestant.version(), products, contestant.note)
    if isinstance(found, str):
        return dataclasses.replace(row, reason=found)
    own = seconds[contestant.name]
    median = statistics.median(own)
    floor, limit = (one[products].seconds for one in least)
    return dataclasses.replace(
        row,
        milliseconds=quartiles([1e3 * one for one in own]),
        ratio=paired_ratio(own, seconds[BASELINE]),
        gflops=found.flops / 1e9,
        gflops_per_second=found.flops / 1e9 / median,
        of_floor=median / floor,
        of_limit=median / limit,
        peak_bytes=found.peak_bytes,
        of_bucket=found.peak_bytes / bucket,
        gaussian=found.accuracy.get("gaussian"),
        decaying=found.accuracy.get("decaying"),
    )


def largest_bucket(shapes: Sequence[Shape]) -> int:
    """Entries of the largest group of matrices of one shape."""
    counts = Counter(map(matrix_shape, shapes))
    return max(rows * columns * count for (rows, columns), count in counts.items())


def _by_name(rates: Mapping[str, Mapping[tuple[int, int], float]]) -> dict[str, dict[str, float]]:
    return {name: {f"{m}x{n}": rate / 1e9 for (m, n), rate in own.items()} for name, own in rates.items()}


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextlib.contextmanager
def _threads(count: int) -> Generator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
