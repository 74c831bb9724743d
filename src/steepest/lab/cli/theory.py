"""The commands about the theory: scores of random quadratics, the model with one large input, a trained model."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from steepest.lab.cli.options import Commands, UsageError, add_command, checking_usage, count, few, number, path, seed
from steepest.lab.cli.outcome import DONE, failed

if TYPE_CHECKING:
    from steepest.lab.runs.trained import TrainedRun
    from steepest.theory import LayerDirections

CASES = ("few-large", "many-large", "few-tokens", "no-spike")  # a test compares them with the study's
SCORES_EXAMPLES = """examples:
  steepest theory scores
  steepest theory scores --case few-large --simulations 64 --plot scores.png
"""
SPIKE_EXAMPLES = """examples:
  steepest theory spike
  steepest theory spike --kappa 10 100 1000 --eps 1e-6 --plot spike.png
"""
DIRECTIONS_EXAMPLES = """examples:
  steepest train --task digits --method muon --steps 50 --keep-checkpoint --out out/kept
  steepest theory directions out/kept
  steepest train --method muon --keep-checkpoint --out out/muon
  steepest theory directions out/muon --layers 'blocks.1.*' head --examples 32 --ridge 1e-6
"""


def add_commands(commands: Commands) -> None:
    """Declare theory and its three commands."""
    summary = "compare update directions: on quadratics, on a model that can be solved, on a trained one"
    parser = commands.add_parser(
        "theory", help=summary, description=summary[0].upper() + summary[1:] + ".", allow_abbrev=False
    )
    inner = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    scores = add_command(inner, "scores", _scores, "score directions on random quadratics", SCORES_EXAMPLES)
    scores.add_argument("--simulations", type=few, default=4, metavar="N", help="per case; default: %(default)s")
    scores.add_argument("--seed", type=seed, default=0, help="of the simulations; default: %(default)s")
    scores.add_argument("--case", action="append", choices=CASES, help="may be repeated; default: all")

    spike = add_command(inner, "spike", _spike, "count steps on inputs with one large direction", SPIKE_EXAMPLES)
    kappas = [2.0, 4.0, 16.0, 64.0, 256.0]
    spike.add_argument("--kappa", type=number, nargs="+", default=kappas, help="its variance; default: 2 4 16 64 256")
    spike.add_argument("--eps", type=number, default=1e-3, help="error to reach; default: %(default)s")

    directions = add_command(
        inner, "directions", _directions, "score directions on a trained model", DIRECTIONS_EXAMPLES
    )
    directions.add_argument("run", type=path, metavar="RUN_DIR", help="of a run trained with --keep-checkpoint")
    directions.add_argument("--layers", nargs="+", default=["*"], metavar="PATTERN", help="default: all linear ones")
    directions.add_argument("--examples", type=count, default=8, metavar="N", help="in the batch; default: %(default)s")
    directions.add_argument("--ridge", type=number, default=0.2, help="relative to tr(K)/n; default: %(default)s")
    directions.add_argument("--data", type=path, metavar="PATH", help="what the run was trained on, if given to it")

    for command in (scores, spike, directions):
        command.add_argument("--plot", type=_png, metavar="FILE.png", help="draw the result")
        command.add_argument("--json", action="store_true", help="print the result as JSON")


def _png(text: str) -> Path:
    if not text.endswith(".png"):
        raise argparse.ArgumentTypeError(f"{text!r} must end in .png")
    return Path(text)


def _scores(options: argparse.Namespace) -> int:
    from steepest.theory import simulate

    with checking_usage():
        studies = {
            case: simulate(case, simulations=options.simulations, seed=options.seed) for case in options.case or CASES
        }
    means = {case: {name: float(values.mean()) for name, values in study.items()} for case, study in studies.items()}
    ratios = {
        case: {name: float((values / study["newton"]).mean()) for name, values in study.items()}
        for case, study in studies.items()
    }

    def draw() -> bytes:
        from steepest.lab.report.theory_png import scores_png

        return scores_png(ratios)

    names = list(next(iter(means.values())))
    rows = [[name, *(f"{means[case][name]:.0f} {ratios[case][name]:6.3f}" for case in means)] for name in names]
    title = f"Mean score and share of Newton's, {options.simulations} simulations"
    content = {"simulations": options.simulations, "seed": options.seed, "scores": means, "of_newton": ratios}
    return _show(options, content, title, ["direction", *means], rows, draw)


def _spike(options: argparse.Namespace) -> int:
    from steepest.theory import iterations

    with checking_usage():
        counts = {kappa: iterations(kappa, eps=options.eps) for kappa in options.kappa}

    def draw() -> bytes:
        from steepest.lab.report.theory_png import spike_png

        return spike_png(counts, eps=options.eps)

    methods = list(next(iter(counts.values())))
    rows = [
        [f"{kappa:g}", *(" / ".join(map(str, dataclasses.astuple(found[method]))) for method in methods)]
        for kappa, found in counts.items()
    ]
    content = [
        {"kappa": kappa, **{method: dataclasses.asdict(steps) for method, steps in found.items()}}
        for kappa, found in counts.items()
    ]
    title = f"Steps to errors of {options.eps:g}: reached / settled / guaranteed"
    return _show(options, {"eps": options.eps, "rows": content}, title, ["kappa", *methods], rows, draw)


def _directions(options: argparse.Namespace) -> int:
    from steepest.lab.disk.fields import RecordError
    from steepest.lab.runs.checkpoint import CheckpointError
    from steepest.lab.runs.trained import load_trained

    try:
        run = load_trained(options.run, examples=options.examples, data=options.data)
    except (CheckpointError, RecordError) as failure:
        return failed(failure)
    except (ValueError, FileNotFoundError) as wrong:
        raise UsageError(str(wrong)) from wrong
    if not run.same_code:
        print(
            "note: another version of the code trained this run; model and data are built by this one.", file=sys.stderr
        )
    with checking_usage():
        layers = _score(run, options)

    def draw() -> bytes:
        from steepest.lab.report.theory_png import directions_png

        return directions_png(layers)

    title = f"{options.run} after {run.step} steps, {options.examples} examples, ridge {options.ridge:g}"
    columns = ["layer and direction", "alignment", "curvature", "score", "decrease"]
    content = {"run": str(options.run), "step": run.step, "examples": options.examples, "ridge": options.ridge}
    return _show(options, {**content, "layers": _records(layers)}, title, columns, _rows(layers), draw)


def _score(run: TrainedRun, options: argparse.Namespace) -> list[LayerDirections]:
    from steepest.theory import linear_layers, score_directions

    inputs, targets = (part.double() if part.is_floating_point() else part for part in run.batch)
    return score_directions(
        run.model,
        lambda model: run.task.loss(model, (inputs, targets)),
        linear_layers(run.model, options.layers),
        ridge=options.ridge,
        second_moments={name.removesuffix(".weight"): v for name, v in run.second_moments.items()},
    )


def _rows(layers: Sequence[LayerDirections]) -> list[list[str]]:
    """A block per layer; where there is no score, the reason."""
    rows: list[list[str]] = []
    for layer in layers:
        raised = f", ridge x {10**layer.raised:,}" if layer.raised else ""
        rows.append([f"{layer.layer} (condition {layer.condition:.2g}{raised})", "", "", "", ""])
        for name, score in layer.scores.items():
            value = score.status if score.value is None else f"{score.value:.3g}"
            decrease = "" if score.decrease is None else f"{score.decrease:.3g}"
            rows.append([f"  {name}", f"{score.alignment:.3f}", f"{score.curvature:.3g}", value, decrease])
    return rows


def _records(layers: Sequence[LayerDirections]) -> list[dict[str, object]]:
    return [
        {
            "layer": layer.layer,
            "shape": layer.shape,
            "condition": layer.condition if math.isfinite(layer.condition) else None,
            "ridge_raised": layer.raised,
            "scores": {
                name: {**dataclasses.asdict(score), "score": score.value, "decrease": score.decrease}
                for name, score in layer.scores.items()
            },
        }
        for layer in layers
    ]


def _show(
    options: argparse.Namespace,
    content: Mapping[str, object],
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    draw: Callable[[], bytes],
) -> int:
    """Write the plot if one was asked for, then print the result."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.measure import Measurement
    from rich.table import Table

    from steepest.lab.disk.files import write_whole

    if options.plot is not None:
        write_whole(options.plot, draw())
    if options.json:
        print(json.dumps(content, indent=2, allow_nan=False))
        return DONE
    table = Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(escape, row))
    console = Console()
    needed = Measurement.get(console, console.options.update(max_width=1000), table).maximum
    Console(width=max(needed, console.width)).print(table)  # no number is cut short on a narrow terminal
    return DONE
