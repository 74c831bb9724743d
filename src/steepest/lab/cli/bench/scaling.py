"""`steepest bench scaling`: how time and memory of a step grow, and what the cost model predicts."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING

from steepest.lab.cli.bench.results import check_out, described, print_table, write_results
from steepest.lab.cli.options import Commands, checking_usage, count, few, path
from steepest.lab.cli.options import add_command as declare
from steepest.lab.cli.outcome import DONE

if TYPE_CHECKING:
    from steepest.lab.bench.scaling import Row

COLUMNS = ("point", "matrices", "ms", "quartiles", "predicted ms", "error", "extra MiB", "state MiB", "steps")
EXAMPLES = """examples:
  steepest bench scaling --out out/scaling
  steepest bench scaling --widths 128 256 --layers 1 4 --aspects 1 4 --rounds 5 --threads 2

The prediction knows how fast this machine computes polar factors of square matrices, passes over memory, transposes and
calls, and the counts of a step; it has seen no step.
"""


def add_command(commands: Commands) -> None:
    """Declare scaling."""
    summary = "time steps of Muon against width, layers and aspect ratio, beside the prediction of the cost model"
    parser = declare(commands, "scaling", _scaling, summary, EXAMPLES)
    parser.add_argument("--widths", type=count, nargs="+", metavar="W", help="of one layer; default: 128 to 1536")
    parser.add_argument("--layers", type=count, nargs="+", metavar="L", help="at width 256; default: 1 2 4 8 16")
    parser.add_argument("--aspects", type=count, nargs="+", metavar="A", help="at short side 256; default: 1 2 4 8 16")
    parser.add_argument("--rounds", type=count, default=15, help="most steps of a point; default: %(default)s")
    parser.add_argument("--threads", type=few, default=1, metavar="N", help="CPU threads; default: %(default)s")
    parser.add_argument("--out", type=path, metavar="DIR", help="where scaling.json, scaling.csv and scaling.png go")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _scaling(options: argparse.Namespace) -> int:
    import torch

    from steepest.lab.bench.scaling import measure_scaling, points

    check_out(options.out)
    torch.set_num_threads(options.threads)
    chosen = {name: getattr(options, name) for name in ("widths", "layers", "aspects")}
    with checking_usage():
        at = points(**{name: values for name, values in chosen.items() if values is not None})
        rows, machine = measure_scaling(at, rounds=options.rounds)
    flat = list(map(_row, rows))
    raw = {row.point.name: row.seconds for row in rows}
    content = described({"machine": dataclasses.asdict(machine), "rows": flat, "seconds": raw})
    if options.out is not None:

        def draw() -> bytes:
            from steepest.lab.bench.scaling_png import scaling_png

            return scaling_png(rows)

        write_results(options.out, "scaling", content, flat, draw)
    if options.json:
        print(json.dumps(content, indent=2, allow_nan=False))
        return DONE
    print_table(f"Steps of Muon, float32, {options.threads} thread(s)", COLUMNS, list(map(_cells, rows)))
    worst = max(rows, key=lambda row: abs(row.error))
    within = sum(abs(row.error) <= 0.25 for row in rows)
    print(
        f"Within 25 % of the prediction: {within} of {len(rows)}; the worst is {worst.point.name}: {worst.error:+.1%}."
    )
    return DONE


def _row(row: Row) -> dict[str, object]:
    """A line of the CSV."""
    return {
        "axis": row.point.axis,
        "value": row.point.value,
        "matrices": len(row.point.shapes),
        "parameters": sum(rows * columns for rows, columns in row.point.shapes),
        "ms": row.ms.median,
        "ms_low": row.ms.low,
        "ms_high": row.ms.high,
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
        f"{row.ms.low:.2f} to {row.ms.high:.2f}",
        f"{row.predicted_ms:.2f}",
        f"{row.error:+.1%}",
        f"{row.peak_extra_bytes / 2**20:.1f}",
        f"{row.state_bytes / 2**20:.1f}",
        str(len(row.seconds)),
    ]
