"""`steepest bench passes`: what momentum, decay and the move of the weights cost beside the least calls for them."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING

from steepest.lab.cli.bench.results import check_out, described, print_table, write_results
from steepest.lab.cli.bench.step import SHAPES
from steepest.lab.cli.options import Commands, checking_usage, count, few, path, seed
from steepest.lab.cli.options import add_command as declare
from steepest.lab.cli.outcome import DONE

if TYPE_CHECKING:
    from steepest.lab.bench.passes import Row

COLUMNS = ("passes", "ms", "quartiles", "/ plain", "quartiles")
EXAMPLES = """examples:
  steepest bench passes --width 256 512 --out out/passes
  steepest bench passes --shapes many-small --pairs 200

Plain is one torch._foreach_lerp_ of all momenta and one torch._foreach_add_ of all weights. Ours are the library's own
functions, called for one load after the other, as a step does. Directions are there before; nothing else is timed.
"""


def add_command(commands: Commands) -> None:
    """Declare passes."""
    summary = "time the momentum and decay passes of a step in turns with plain calls of torch"
    parser = declare(commands, "passes", _passes, summary, EXAMPLES)
    parser.add_argument("--shapes", default="gpt2", help=f"{SHAPES}; default: %(default)s")
    parser.add_argument("--width", type=count, nargs="+", metavar="W", help="one case each; default: the set's")
    parser.add_argument("--layers", type=count, metavar="L", help="default: the set's")
    parser.add_argument("--pairs", type=count, default=100, metavar="N", help="rounds; default: %(default)s")
    parser.add_argument("--threads", type=few, default=1, metavar="T", help="CPU threads; default: %(default)s")
    parser.add_argument("--seed", type=seed, default=0, help="of the numbers; default: %(default)s")
    parser.add_argument("--out", type=path, metavar="DIR", help="where passes.json, passes.csv and passes.png go")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _passes(options: argparse.Namespace) -> int:
    import torch

    from steepest.lab.bench import Bench

    check_out(options.out)
    from steepest.lab.bench.passes import measure_passes

    torch.set_num_threads(options.threads)
    with checking_usage():
        widths = None if options.width is None else tuple(options.width)
        bench = Bench(options.shapes, widths, options.layers, pairs=options.pairs, seed=options.seed)
    cases = {
        options.shapes if width is None else f"{options.shapes} {width}": measure_passes(
            bench.shapes_of(width), pairs=options.pairs, seed=options.seed
        )
        for width in bench.cases()
    }
    rows = [_row(title, row) for title, case in cases.items() for row in case.rows]
    whole = {title: dataclasses.asdict(case) for title, case in cases.items()}
    content = described({"threads": options.threads, "pairs": options.pairs, "rows": rows, "cases": whole})
    if options.out is not None:

        def draw() -> bytes:
            from steepest.lab.bench.passes_png import passes_png

            return passes_png(cases)

        write_results(options.out, "passes", content, rows, draw)
    if options.json:
        print(json.dumps(content, indent=2, allow_nan=False))
        return DONE
    for title, case in cases.items():
        size = f"{case.matrices} matrices, {case.entries / 1e6:.3g} M entries, {case.loads} load(s)"
        print_table(f"{title}: {size}, float32, {options.threads} thread(s)", COLUMNS, list(map(_cells, case.rows)))
    return DONE


def _row(title: str, row: Row) -> dict[str, object]:
    """A line of the CSV; medians with their quartiles."""
    flat: dict[str, object] = {"case": title, "passes": row.way}
    for name, own in (("ms", row.ms), ("ratio", row.ratio)):
        flat |= {name: own.median, f"{name}_low": own.low, f"{name}_high": own.high}
    return flat


def _cells(row: Row) -> list[str]:
    return [
        row.way,
        f"{row.ms.median:.3f}",
        f"{row.ms.low:.3f} to {row.ms.high:.3f}",
        f"{row.ratio.median:.3f}",
        f"{row.ratio.low:.3f} to {row.ratio.high:.3f}",
    ]
