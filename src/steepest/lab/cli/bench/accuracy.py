"""`steepest bench accuracy`: what each set of coefficients makes of the momenta of a training run."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING

from steepest.lab.cli.bench.results import check_out, described, print_table, write_results
from steepest.lab.cli.options import Commands, add_task, checking_usage, count, few, path, seed
from steepest.lab.cli.options import add_command as declare
from steepest.lab.cli.outcome import DONE

if TYPE_CHECKING:
    from steepest.lab.bench.momenta import Finding, Spectra

COLUMNS = ("coefficients", "MFLOP / matrix", "singular values", "median", "distance", "orthogonality", "alignment")
SPECTRA = ("matrices of", "count", "Frobenius / s1", "Schatten-8 / s1", "median s / s1", "tenth percentile")
EXAMPLES = """examples:
  steepest bench accuracy --out out/accuracy
  steepest bench accuracy --task digits --steps 60 --at 10,60 --dtype bfloat16

Each set is compared with a singular value decomposition in float64, on the momenta of Muon with the lab's tuned
options, and on normal matrices of the same shapes.
"""


def add_command(commands: Commands) -> None:
    """Declare accuracy."""
    summary = "train with Muon, and compare what sets of coefficients make of its momenta with their polar factors"
    parser = declare(commands, "accuracy", _accuracy, summary, EXAMPLES)
    add_task(parser)
    parser.add_argument("--steps", type=count, default=150, metavar="N", help="of the run; default: %(default)s")
    parser.add_argument("--at", type=_counts, default=[20, 80, 150], metavar="A,B", help="steps; default: 20,80,150")
    parser.add_argument("--dtype", default="float32", help="of products: float32 or bfloat16; default: %(default)s")
    parser.add_argument("--seed", type=seed, default=0, help="default: %(default)s")
    parser.add_argument("--threads", type=few, default=1, metavar="N", help="CPU threads; default: %(default)s")
    parser.add_argument("--out", type=path, metavar="DIR", help="where accuracy.json, accuracy.csv and accuracy.png go")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _accuracy(options: argparse.Namespace) -> int:
    import torch

    from steepest.lab.bench.momenta import collect_momenta, compare

    check_out(options.out)
    from steepest.lab.bench.step import DTYPES
    from steepest.lab.tasks import make_task
    from steepest.names import unknown_name

    torch.set_num_threads(options.threads)
    with checking_usage():
        if options.dtype not in DTYPES:
            raise ValueError(unknown_name("dtype", options.dtype, DTYPES))
        task = make_task(options.task, options.preset, data=options.data)
        momenta = collect_momenta(task, steps=options.steps, at=options.at, seed=options.seed)
    spectra, findings = compare(momenta, dtype=DTYPES[options.dtype], seed=options.seed)
    rows = [{"dtype": options.dtype, **dataclasses.asdict(found)} for found in findings]
    content = described({"spectra": list(map(dataclasses.asdict, spectra)), "rows": rows})
    if options.out is not None:

        def draw() -> bytes:
            from steepest.lab.bench.momenta_png import momenta_png

            return momenta_png(findings)

        write_results(options.out, "accuracy", content, rows, draw)
    if options.json:
        print(json.dumps(content, indent=2, allow_nan=False))
        return DONE
    for own in spectra:
        title = f"{options.task} {options.preset}, {options.dtype} products: {own.source}, {own.matrices} matrices"
        print_table(title, COLUMNS, [_cells(found) for found in findings if found.source == own.source])
    print_table("Singular values and norms of the matrices", SPECTRA, list(map(_spectrum, spectra)))
    for reason in dict.fromkeys(found.reason for found in findings if found.reason is not None):
        print(f"Refused: {reason}")
    return DONE


def _counts(text: str) -> list[int]:
    """Whole numbers with commas between them."""
    return [count(part.strip()) for part in text.split(",")]


def _cells(found: Finding) -> list[str]:
    if found.flops is None:
        return [found.coefficients, *["refused"] * (len(COLUMNS) - 1)]
    return [
        found.coefficients,
        f"{found.flops / 1e6:.1f}",
        f"{found.smallest:.4f} to {found.largest:.4f}",
        f"{found.median:.4f}",
        f"{found.distance:.4f}",
        f"{found.orthogonality_error:.4f}",
        f"{found.alignment:.4f}",
    ]


def _spectrum(own: Spectra) -> list[str]:
    numbers = (own.frobenius, own.schatten8, own.median, own.tenth)
    return [own.source, str(own.matrices), *(f"{number:.4f}" for number in numbers)]
