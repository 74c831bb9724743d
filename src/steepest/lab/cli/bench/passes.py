"""`steepest bench passes`: what momentum, decay and the move of the weights cost beside the least calls for them."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from steepest.lab.cli.bench.measured import BenchCommand, Measured
from steepest.lab.cli.bench.step import SHAPES
from steepest.lab.cli.command import Arg
from steepest.lab.cli.options import Count, OnThreads, Seed, checking_usage
from steepest.lab.cli.outcome import Table

COLUMNS = ("passes", "ms", "quartiles", "/ plain", "quartiles")


class PassesBench(BenchCommand, OnThreads):
    """Time the momentum and decay passes of a step in turns with plain calls of torch.

    examples:
      steepest bench passes --width 256 512 --out out/passes
      steepest bench passes --shapes many-small --pairs 200

    Plain is one torch._foreach_lerp_ of all momenta and one torch._foreach_add_ of all weights. Ours are the library's
    own functions, called for one load after the other, as a step does. Directions are there before; nothing else is
    timed.
    """

    name = "passes"

    shapes: Annotated[str, Arg(SHAPES)] = "gpt2"
    width: Annotated[tuple[Count, ...], Arg("one case each; default: the set's", "W")] = ()
    layers: Annotated[Count | None, Arg("default: the set's", "L")] = None
    pairs: Annotated[Count, Arg("rounds", "N")] = 100
    seed: Annotated[Seed, Arg("of the numbers")] = 0

    def measure(self) -> Measured:
        """Every width."""
        from steepest.lab.bench import Bench
        from steepest.lab.bench.passes import measure_passes

        with checking_usage():
            bench = Bench(self.shapes, self.width or None, self.layers, pairs=self.pairs, seed=self.seed)
        cases = {
            self.shapes if width is None else f"{self.shapes} {width}": measure_passes(
                bench.shapes_of(width), pairs=self.pairs, seed=self.seed
            )
            for width in bench.cases()
        }

        def draw() -> bytes:
            from steepest.lab.bench.passes_png import passes_png

            return passes_png(cases)

        rows = [
            {"case": title, "passes": row.way, **row.ms.columns("ms"), **row.ratio.columns("ratio")}
            for title, case in cases.items()
            for row in case.rows
        ]
        tables = [
            Table(
                f"{title}: {case.matrices} matrices, {case.entries / 1e6:.3g} M entries, {case.loads} load(s), "
                f"float32, {self.threads} thread(s)",
                COLUMNS,
                [
                    [row.way, *(cell for own in (row.ms, row.ratio) for cell in (f"{own.median:.3f}", own.span(".3f")))]
                    for row in case.rows
                ],
            )
            for title, case in cases.items()
        ]
        whole = {title: dataclasses.asdict(case) for title, case in cases.items()}
        content = {"threads": self.threads, "pairs": self.pairs, "rows": rows, "cases": whole}
        return Measured(content, rows, tables, draw)
