"""`steepest bench step`: what a step of Muon costs, ours and those of others, and how exact it is."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from typing import TYPE_CHECKING

from steepest.lab.cli.bench.results import check_out
from steepest.lab.cli.options import Commands, checking_usage, count, few, names, path, seed
from steepest.lab.cli.options import add_command as declare
from steepest.lab.cli.outcome import DONE

if TYPE_CHECKING:
    from steepest.lab.bench import Bench, Case, Row
    from steepest.lab.bench.accuracy import Accuracy
    from steepest.lab.bench.timing import Quartiles

# spelled out, so that --help does not wait for torch; a test compares them with the library's
SHAPES = "gpt2, llama, conv, many-small"
CONTESTANTS = (
    "steepest, steepest-jordan, steepest-bf16, torch, torch-fp32, pytorch-optimizer, heavyball, heavyball-eager"
)
QUIET = 0.9  # processor time relative to the wall's
EXAMPLES = """examples:
  steepest bench step
  steepest bench step --shapes gpt2 --width 256 512 --pairs 30 --out out/step
  steepest bench step --shapes many-small --peers torch,torch-fp32 --json

Peers come with: pip install 'steepest[bench]'. heavyball compiles itself first, which takes minutes.
"""


def add_command(commands: Commands) -> None:
    """Declare step."""
    summary = "time steps of Muon in turns with others', and measure their memory and accuracy"
    parser = declare(commands, "step", _step, summary, EXAMPLES)
    parser.add_argument("--shapes", default="gpt2", help=f"{SHAPES}; default: %(default)s")
    parser.add_argument("--width", type=count, nargs="+", metavar="W", help="one case each; default: the set's")
    parser.add_argument("--layers", type=count, metavar="L", help="default: the set's")
    parser.add_argument("--peers", type=names, default=["all"], metavar="A,B,...", help=f"all, or of {CONTESTANTS}")
    parser.add_argument("--pairs", type=count, default=20, metavar="N", help="rounds; default: %(default)s")
    parser.add_argument("--warm-up", type=count, default=3, metavar="N", help="rounds before; default: %(default)s")
    parser.add_argument("--threads", type=few, default=1, metavar="T", help="of torch; default: %(default)s")
    parser.add_argument("--dtype", default="float32", help="of the weights: float32 or bfloat16; default: %(default)s")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--seed", type=seed, default=0, help="of weights and gradients; default: %(default)s")
    parser.add_argument("--out", type=path, metavar="DIR", help="where step.json, step.csv and step.png go")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _step(options: argparse.Namespace) -> int:
    from steepest.lab.bench import Bench, measure
    from steepest.lab.bench.step_files import step_content, write_step

    check_out(options.out)
    with checking_usage():
        bench = Bench(
            shapes=options.shapes,
            widths=None if options.width is None else tuple(options.width),
            layers=options.layers,
            peers=tuple(options.peers),
            pairs=options.pairs,
            warm_up=options.warm_up,
            threads=options.threads,
            dtype=options.dtype,
            device=options.device,
            seed=options.seed,
        )
    command = shlex.join(_words(bench))
    cases = measure(bench, tell=lambda text: print(text, file=sys.stderr))
    if options.json:
        print(json.dumps(step_content(bench, cases, command=command), indent=2, allow_nan=False))
    else:
        for case in cases:
            _show(case)
    if options.out is not None:
        for path in write_step(options.out, bench, cases, command=command):
            print(path, file=sys.stderr)
    return DONE


def _words(bench: Bench) -> list[str]:
    """The command that measures the same again, every choice spelled out."""
    widths = [width for width in bench.cases() if width is not None]
    words = ["steepest", "bench", "step", "--shapes", bench.shapes]
    words += ["--width", *map(str, widths)] if widths else []
    words += ["--layers", str(bench.layers)] if bench.layers is not None else []
    words += ["--peers", ",".join(bench.peers), "--pairs", str(bench.pairs), "--warm-up", str(bench.warm_up)]
    words += ["--threads", str(bench.threads), "--dtype", bench.dtype, "--device", bench.device]
    return [*words, "--seed", str(bench.seed)]


def _show(case: Case) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.measure import Measurement
    from rich.table import Table

    size = "" if case.width is None else f" {case.width}"
    title = f"{case.shapes}{size}: {case.matrices} matrices, {case.parameters / 1e6:.3g} M entries"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("contestant", no_wrap=True)
    headings = ("products", "ms", "/ steepest", "GFLOP/s", "/ floor", "/ limit", "extra MiB", "/ bucket")
    for column in (*headings, "orthogonality", "distance", "alignment", "singular values"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in case.rows:
        table.add_row(*map(escape, _cells(row)))
    console = Console()
    needed = Measurement.get(console, console.options.update(max_width=1000), table).maximum
    console = Console(width=max(needed, console.width))
    console.print(table)  # no number is cut short on a narrow terminal
    for row in case.rows:
        if row.reason is not None:
            console.print(f"{row.contestant} has no numbers. {row.reason}", markup=False, highlight=False)
    for dtype, floor in case.floors.items():
        forms = "; ".join(dict.fromkeys(floor.forms.values()))
        text = f"floor of {dtype} products: {1e3 * floor.seconds:.4g} ms, {floor.flops / 1e9:.3g} GFLOP ({forms})"
        console.print(text, markup=False, highlight=False)
        text = f"limit, the same with the fastest product found: {1e3 * case.limits[dtype].seconds:.4g} ms"
        console.print(text, markup=False, highlight=False)
    busy = "" if case.cpu_share > QUIET else "; the machine was busy with something else: repeat this"
    console.print(f"CPU time / wall time of the rounds: {case.cpu_share:.2f}{busy}", highlight=False)
    console.print("Accuracy: on normal gradients, then on gradients of condition 1000.\n", highlight=False)


def _cells(row: Row) -> list[str]:
    if row.gaussian is None or row.decaying is None or row.peak_bytes is None:
        return [row.contestant, row.products]
    both = (row.gaussian, row.decaying)
    return [
        row.contestant,
        row.products,
        _quartiles(row.milliseconds, ".4g"),
        _quartiles(row.ratio, ".3f"),
        f"{row.gflops_per_second:.1f}",
        f"{row.of_floor:.2f}",
        f"{row.of_limit:.2f}",
        f"{row.peak_bytes / 2**20:.2f}",
        f"{row.of_bucket:.2f}",
        _both([f"{one.orthogonality_error:.3f}" for one in both]),
        _both([f"{one.distance:.3f}" for one in both]),
        _both([f"{one.alignment:.3f}" for one in both]),
        _both(list(map(_range, both))),
    ]


def _quartiles(found: Quartiles | None, form: str) -> str:
    return "" if found is None else f"{found.median:{form}} ({found.low:{form}} to {found.high:{form}})"


def _both(texts: list[str]) -> str:
    return " | ".join(texts)


def _range(found: Accuracy) -> str:
    return f"{found.smallest:.2f} to {found.largest:.2f}"
