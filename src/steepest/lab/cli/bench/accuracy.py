"""`steepest bench accuracy`: what each set of coefficients makes of the momenta of a training run."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

from steepest.lab.cli.bench.measured import BenchCommand, Measured
from steepest.lab.cli.command import Arg
from steepest.lab.cli.options import Count, OnTask, OnThreads, Seed, checking_usage, count
from steepest.lab.cli.outcome import Table

if TYPE_CHECKING:
    from steepest.lab.bench.momenta import Finding, Spectra

COLUMNS = ("coefficients", "MFLOP / matrix", "singular values", "median", "distance", "orthogonality", "alignment")
SPECTRA = ("matrices of", "count", "Frobenius / s1", "Schatten-8 / s1", "median s / s1", "tenth percentile")


def counts(text: str) -> list[int]:
    """Whole numbers with commas between them."""
    return [count(part.strip()) for part in text.split(",")]


class AccuracyBench(BenchCommand, OnTask, OnThreads):
    """Train with Muon, and compare what sets of coefficients make of its momenta with their polar factors.

    examples:
      steepest bench accuracy --out out/accuracy
      steepest bench accuracy --task digits --steps 60 --at 10,60 --dtype bfloat16

    Each set is compared with a singular value decomposition in float64, on the momenta of Muon with the lab's tuned
    options, and on normal matrices of the same shapes.
    """

    name = "accuracy"

    steps: Annotated[Count, Arg("of the run", "N")] = 150
    at: Annotated[tuple[int, ...], counts, Arg("steps; default: 20,80,150", "A,B")] = (20, 80, 150)
    dtype: Annotated[str, Arg("of products: float32 or bfloat16")] = "float32"
    seed: Annotated[Seed, Arg()] = 0

    def measure(self) -> Measured:
        """Train, and compare."""
        from steepest.lab.bench.momenta import collect_momenta, compare
        from steepest.lab.bench.step import DTYPES
        from steepest.names import unknown_name

        with checking_usage():
            if self.dtype not in DTYPES:
                raise ValueError(unknown_name("dtype", self.dtype, DTYPES))
            momenta = collect_momenta(self.load(), steps=self.steps, at=self.at, seed=self.seed)
        spectra, findings = compare(momenta, dtype=DTYPES[self.dtype], seed=self.seed)
        rows = [{"dtype": self.dtype, **dataclasses.asdict(found)} for found in findings]

        def draw() -> bytes:
            from steepest.lab.bench.momenta_png import momenta_png

            return momenta_png(findings)

        title = f"{self.task} {self.preset}, {self.dtype} products"
        reasons = dict.fromkeys(found.reason for found in findings if found.reason is not None)
        tables = [
            Table(
                f"{title}: {own.source}, {own.matrices} matrices",
                COLUMNS,
                [_cells(found) for found in findings if found.source == own.source],
            )
            for own in spectra
        ]
        refused = [f"Refused: {reason}" for reason in reasons]
        last = Table("Singular values and norms of the matrices", SPECTRA, list(map(_spectrum, spectra)), refused)
        return Measured({"spectra": list(map(dataclasses.asdict, spectra)), "rows": rows}, rows, [*tables, last], draw)


def _cells(found: Finding) -> list[str]:
    if found.flops is None:
        return [found.coefficients, *["refused"] * (len(COLUMNS) - 1)]
    numbers = (found.median, found.distance, found.orthogonality_error, found.alignment)
    return [
        found.coefficients,
        f"{found.flops / 1e6:.1f}",
        f"{found.smallest:.4f} to {found.largest:.4f}",
        *(f"{number:.4f}" for number in numbers),
    ]


def _spectrum(own: Spectra) -> list[str]:
    numbers = (own.frobenius, own.schatten8, own.median, own.tenth)
    return [own.source, str(own.matrices), *(f"{number:.4f}" for number in numbers)]
