"""`steepest bench momo | newton-muon`: what these add to a training step, and how often intervals hold the truth."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from steepest.lab.cli.bench.results import check_out, described, print_table, write_results
from steepest.lab.cli.options import Commands, add_task, checking_usage, count, few, path
from steepest.lab.cli.options import add_command as declare
from steepest.lab.cli.outcome import DONE

MOMO = """examples:
  steepest bench momo --pairs 60 --out out/momo_cost

Each pair is one training step of a method and one of its Momo version, on the same weights and batch, in alternating
order; the ratio is the median over pairs.
"""
NEWTON = """examples:
  steepest bench newton-muon --width 256 --tokens 2048 --pairs 24 --out out/newton_muon_cost

Each pair is one training step of Muon and one of Newton-Muon. Steps that refresh are measured apart, one in four, and
weighed as one in --every steps.
"""
COVERAGE = """examples:
  steepest bench coverage --replications 20 --out out/coverage

Runs with known answers are made up and fitted, many times: how often do 90% intervals of the critical batch size hold
the truth? Where a range is answered instead of a number, it counts in the column "contained".
"""


def add_commands(commands: Commands) -> None:
    """Declare momo, newton-muon and coverage."""
    momo = declare(commands, "momo", _momo, "time training steps with Momo in turns with those without", MOMO)
    add_task(momo)
    newton = declare(commands, "newton-muon", _newton, "time steps of Newton-Muon in turns with those of Muon", NEWTON)
    newton.add_argument("--width", type=count, default=768, metavar="W", help="default: %(default)s")
    newton.add_argument("--layers", type=count, default=1, metavar="L", help="default: %(default)s")
    newton.add_argument("--tokens", type=count, nargs="+", default=[2048, 8192], metavar="N", help="of a step")
    newton.add_argument("--every", type=count, default=32, metavar="N", help="steps per refresh; default: %(default)s")
    for parser, pairs, name in ((momo, 60, "momo"), (newton, 24, "cost")):
        parser.add_argument("--pairs", type=count, default=pairs, metavar="N", help="of steps; default: %(default)s")
        parser.add_argument("--threads", type=few, default=1, metavar="T", help="CPU threads; default: %(default)s")
        _add_out(parser, name)
    summary = "how often intervals of the critical batch size hold the truth, on made-up runs"
    coverage = declare(commands, "coverage", _coverage, summary, COVERAGE)
    coverage.add_argument("--replications", type=count, default=500, metavar="N", help="default: %(default)s")
    coverage.add_argument("--resamples", type=_resamples, default=500, metavar="N", help="default: %(default)s")
    _add_out(coverage, "coverage")


def _add_out(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument("--out", type=path, metavar="DIR", help=f"where {name}.json and {name}.csv go")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _momo(options: argparse.Namespace) -> int:
    import torch

    check_out(options.out)
    from steepest.lab.bench.momo_cost import RECIPES, momo_cost
    from steepest.lab.tasks import make_task

    torch.set_num_threads(options.threads)
    with checking_usage():
        task = make_task(options.task, options.preset, data=options.data)
    where = {"preset": options.preset, "threads": options.threads}
    rows = [
        {**where, **momo_cost(task, name, dual, pairs=options.pairs)}
        for name in RECIPES
        for dual in ("stale", "cached")
    ]
    return _leave(options, "momo", rows)


def _newton(options: argparse.Namespace) -> int:
    import torch

    check_out(options.out)
    from steepest.lab.bench.newton_muon_cost import CASES, newton_muon_cost
    from steepest.lab.models.gpt import GPTConfig

    torch.set_num_threads(options.threads)
    config = GPTConfig(vocabulary=256, layers=options.layers, width=options.width, head_size=64)
    rows: list[dict[str, object]] = []
    for tokens in options.tokens:
        window = min(1024, tokens)
        generator = torch.Generator(device="cpu").manual_seed(0)
        batch = torch.randint(256, (tokens // window, window + 1), generator=generator, device="cpu")
        for name in CASES:
            row = newton_muon_cost(name, config, batch, every=options.every, pairs=options.pairs)
            rows.append({"threads": options.threads, **row})
    return _leave(options, "cost", rows)


def _coverage(options: argparse.Namespace) -> int:
    check_out(options.out)
    from steepest.lab.studies.batch.coverage import coverage_row, measure, settings

    many = {"replications": options.replications, "resamples": options.resamples}
    rows = [coverage_row(setting, measure(setting, **many), options.replications) for setting in settings()]
    return _leave(options, "coverage", rows)


def _resamples(text: str) -> int:
    """A whole number of at least 100, as intervals of 90% need."""
    if (number := count(text)) < 100:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 100")
    return number


def _leave(options: argparse.Namespace, name: str, rows: Sequence[dict[str, object]]) -> int:
    content = described({"rows": rows})
    if options.out is not None:
        write_results(options.out, name, content, rows)
    if options.json:
        print(json.dumps(content, indent=2, allow_nan=False))
        return DONE
    print_table(name, list(rows[0]), [list(map(str, row.values())) for row in rows])
    return DONE
