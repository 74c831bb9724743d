"""`steepest bench scaling`: how time and memory of a step grow, and what the cost model predicts."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

from steepest.lab.cli.bench.measured import BenchCommand, Measured
from steepest.lab.cli.command import Arg
from steepest.lab.cli.options import Count, OnThreads, checking_usage
from steepest.lab.cli.outcome import Table

if TYPE_CHECKING:
    from steepest.lab.bench.scaling import Row

COLUMNS = ("point", "matrices", "ms", "quartiles", "predicted ms", "error", "extra MiB", "state MiB", "steps")


class ScalingBench(BenchCommand, OnThreads):
    """Time steps of Muon against width, layers and aspect ratio, beside the prediction of the cost model.

    examples:
      steepest bench scaling --out out/scaling
      steepest bench scaling --widths 128 256 --layers 1 4 --aspects 1 4 --rounds 5 --threads 2

    The prediction knows how fast this machine computes polar factors of square matrices, passes over memory, transposes
    and calls, and the counts of a step; it has seen no step.
    """

    name = "scaling"

    widths: Annotated[tuple[Count, ...], Arg("of one layer; default: 128 to 1536", "W")] = ()
    layers: Annotated[tuple[Count, ...], Arg("at width 256; default: 1 2 4 8 16", "L")] = ()
    aspects: Annotated[tuple[Count, ...], Arg("at short side 256; default: 1 2 4 8 16", "A")] = ()
    rounds: Annotated[Count, Arg("most steps of a point")] = 15

    def measure(self) -> Measured:
        """Every point."""
        from steepest.lab.bench.scaling import measure_scaling, points

        chosen = {"widths": self.widths, "layers": self.layers, "aspects": self.aspects}
        with checking_usage():
            at = points(**{name: values for name, values in chosen.items() if values})
            found, machine = measure_scaling(at, rounds=self.rounds)

        def draw() -> bytes:
            from steepest.lab.bench.scaling_png import scaling_png

            return scaling_png(found)

        rows = list(map(_row, found))
        raw = {row.point.name: row.seconds for row in found}
        worst = max(found, key=lambda row: abs(row.error))
        within = sum(abs(row.error) <= 0.25 for row in found)
        note = (
            f"Within 25 % of the prediction: {within} of {len(found)}; the worst is {worst.point.name}: "
            f"{worst.error:+.1%}."
        )
        table = Table(f"Steps of Muon, float32, {self.threads} thread(s)", COLUMNS, list(map(_cells, found)), [note])
        content = {"machine": dataclasses.asdict(machine), "rows": rows, "seconds": raw}
        return Measured(content, rows, [table], draw)


def _row(row: Row) -> dict[str, object]:
    """A line of the CSV."""
    return {
        "axis": row.point.axis,
        "value": row.point.value,
        "matrices": len(row.point.shapes),
        "parameters": sum(rows * columns for rows, columns in row.point.shapes),
        **row.ms.columns("ms"),
        "predicted_ms": row.predicted_ms,
        "error": row.error,
        "peak_extra_bytes": row.peak_extra_bytes,
        "state_bytes": row.state_bytes,
        "steps": len(row.seconds),
    }


def _cells(row: Row) -> list[str]:
    return [
        row.point.name,
        str(len(row.point.shapes)),
        f"{row.ms.median:.2f}",
        row.ms.span(".2f"),
        f"{row.predicted_ms:.2f}",
        f"{row.error:+.1%}",
        f"{row.peak_extra_bytes / 2**20:.1f}",
        f"{row.state_bytes / 2**20:.1f}",
        str(len(row.seconds)),
    ]
