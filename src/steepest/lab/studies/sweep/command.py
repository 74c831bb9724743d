"""`steepest sweep`: methods at many learning rates."""

from __future__ import annotations

import argparse
from pathlib import Path

from steepest.lab.cli.options import Commands, by_method, checking_usage, racers
from steepest.lab.cli.options import add_command as declare
from steepest.lab.cli.study import add_study, run_plan

EXAMPLES = """examples:
  steepest sweep --task digits --methods adamw,muon --lrs 0.01,0.03 --seeds 1 --steps 50
  steepest sweep --methods adamw,muon --lrs 1e-4:1e1:log9 --preset tiny
  steepest sweep --methods adamw,muon --lrs 1e-4:1:log9 --lrs muon=1e-3:10:log9 --seeds 3
  steepest sweep --methods muon --lrs 0.01,0.02,0.04 --out /shared/muon \\
    --storage postgresql+psycopg://user@host:5432/database

Many machines share a sweep through PostgreSQL, see: steepest work --help. Leave the password out of the URL, and it
is taken from PGPASSWORD or from ~/.pgpass.
"""


def add_command(commands: Commands) -> None:
    """Declare sweep."""
    parser = declare(commands, "sweep", _sweep, "train several methods at many learning rates", EXAMPLES, saves=True)
    parser.add_argument(
        "--lrs",
        action="append",
        required=True,
        metavar="[METHOD=]RATES",
        help="LOW:HIGH:logN or a list with commas; for all methods, or for one and then instead",
    )
    add_study(parser, seeds=2, out="out/sweep-TASK-PRESET")


def _sweep(options: argparse.Namespace) -> int:
    from steepest.lab.studies.sweep.plan import Sweep, rates_by_method
    from steepest.lab.tasks import make_task

    with checking_usage():
        task = make_task(options.task, options.preset, data=options.data)
        methods = tuple(options.methods or racers(task.name))
        sweep = Sweep(
            task=task,
            methods=methods,
            seeds=tuple(range(options.seeds)),
            options=by_method(options.set),
            steps=options.steps,
            lrs=rates_by_method(options.lrs, methods),
        )
    own = [word for rates in options.lrs for word in ("--lrs", rates)]
    return run_plan(sweep, options, own, options.out or Path("out") / f"sweep-{task.name}-{task.preset}")
