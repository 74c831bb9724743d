"""`steepest bench step`: what a step of Muon costs, ours and those of others, and how exact it is."""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING, Annotated

from steepest.lab.cli.bench.measured import BenchCommand, Measured
from steepest.lab.cli.command import Arg
from steepest.lab.cli.options import Count, Names, OnThreads, Seed, checking_usage
from steepest.lab.cli.outcome import Table

if TYPE_CHECKING:
    from steepest.lab.bench import Case, Row
    from steepest.lab.bench.timing import Quartiles

# spelled out, so that --help does not wait for torch; a test compares them with the library's
SHAPES = "gpt2, llama, conv, many-small"
CONTESTANTS = (
    "steepest, steepest-jordan, steepest-bf16, torch, torch-fp32, pytorch-optimizer, heavyball, heavyball-eager"
)
QUIET = 0.9  # processor time relative to the wall's
COLUMNS = (
    *("contestant", "products", "ms", "/ steepest", "GFLOP/s", "/ floor", "/ limit", "extra MiB", "/ bucket"),
    *("orthogonality", "distance", "alignment", "singular values"),
)


class StepBench(BenchCommand, OnThreads):
    """Time steps of Muon in turns with others', and measure their memory and accuracy.

    examples:
      steepest bench step
      steepest bench step --shapes gpt2 --width 256 512 --pairs 30 --out out/step
      steepest bench step --shapes many-small --peers torch,torch-fp32 --json

    Peers come with: pip install 'steepest[bench]'. heavyball compiles itself first, which takes minutes.
    """

    name = "step"

    shapes: Annotated[str, Arg(SHAPES)] = "gpt2"
    width: Annotated[tuple[Count, ...], Arg("one case each; default: the set's", "W")] = ()
    layers: Annotated[Count | None, Arg("default: the set's", "L")] = None
    peers: Annotated[Names, Arg(f"all, or of {CONTESTANTS}", "A,B,...")] = ("all",)
    pairs: Annotated[Count, Arg("rounds", "N")] = 20
    warm_up: Annotated[Count, Arg("rounds before", "N")] = 3
    dtype: Annotated[str, Arg("of the weights: float32 or bfloat16")] = "float32"
    device: Annotated[str, Arg()] = "cpu"
    seed: Annotated[Seed, Arg("of weights and gradients")] = 0

    def measure(self) -> Measured:
        """Every width."""
        from steepest.lab.bench import Bench, measure

        with checking_usage():
            bench = Bench(
                shapes=self.shapes,
                widths=self.width or None,
                layers=self.layers,
                peers=self.peers,
                pairs=self.pairs,
                warm_up=self.warm_up,
                threads=self.threads,
                dtype=self.dtype,
                device=self.device,
                seed=self.seed,
            )
        cases = measure(bench, tell=lambda text: print(text, file=sys.stderr))

        def draw() -> bytes:
            from steepest.lab.bench.step_png import cases_png

            return cases_png(cases)

        rows = [
            {"shapes": case.shapes, "width": case.width, **flat(dataclasses.asdict(row))}
            for case in cases
            for row in case.rows
        ]
        content = {"bench": dataclasses.asdict(bench), "cases": list(map(dataclasses.asdict, cases))}
        widths = tuple(width for width in bench.cases() if width is not None)
        return Measured(content, rows, list(map(_table, cases)), draw, {"width": widths})


def flat(record: dict[str, object]) -> dict[str, object]:
    """Records within a record become columns of their own; what is None is left out.

    Examples:
        >>> flat({"ratio": {"low": 1, "high": 2}, "note": "", "reason": None})
        {'ratio_low': 1, 'ratio_high': 2, 'note': ''}
    """
    found: dict[str, object] = {}
    for name, value in record.items():
        if isinstance(value, dict):
            found |= {f"{name}_{part}": own for part, own in value.items()}
        elif value is not None:
            found[name] = value
    return found


def _table(case: Case) -> Table:
    size = "" if case.width is None else f" {case.width}"
    title = f"{case.shapes}{size}: {case.matrices} matrices, {case.parameters / 1e6:.3g} M entries"
    notes = [f"{row.contestant} has no numbers. {row.reason}" for row in case.rows if row.reason is not None]
    for dtype, floor in case.floors.items():
        forms = "; ".join(dict.fromkeys(floor.forms.values()))
        took = f"{1e3 * floor.seconds:.4g} ms, {floor.flops / 1e9:.3g} GFLOP ({forms})"
        limit = f"{1e3 * case.limits[dtype].seconds:.4g} ms"
        notes += [f"floor of {dtype} products: {took}", f"limit, the same with the fastest product found: {limit}"]
    busy = "" if case.cpu_share > QUIET else "; the machine was busy with something else: repeat this"
    notes.append(f"CPU time / wall time of the rounds: {case.cpu_share:.2f}{busy}")
    notes.append("Accuracy: on normal gradients, then on gradients of condition 1000.\n")
    return Table(title, COLUMNS, list(map(_cells, case.rows)), notes)


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
        " | ".join(f"{one.orthogonality_error:.3f}" for one in both),
        " | ".join(f"{one.distance:.3f}" for one in both),
        " | ".join(f"{one.alignment:.3f}" for one in both),
        " | ".join(f"{one.smallest:.2f} to {one.largest:.2f}" for one in both),
    ]


def _quartiles(found: Quartiles | None, form: str) -> str:
    return "" if found is None else f"{found.median:{form}} ({found.span(form)})"
