"""`steepest race`: methods against each other."""

from __future__ import annotations

import argparse
from pathlib import Path

from steepest.lab.cli.options import Commands, by_method, checking_usage, racers
from steepest.lab.cli.options import add_command as declare
from steepest.lab.cli.study import add_study, run_plan

EXAMPLES = """examples:
  steepest race --task digits --methods adamw,muon --seeds 2 --steps 50
  steepest race --preset demo
  steepest race --methods adamw,muon --seeds 5 --out out/five
  steepest race --methods adamw,muon --set muon.lr=0.03 --set adamw.lr=0.005
  steepest race --task text --data my_corpus/ --preset tiny
"""


def add_command(commands: Commands) -> None:
    """Declare race."""
    parser = declare(commands, "race", _race, "train several methods alike and report who wins", EXAMPLES, saves=True)
    parser.add_argument("--baseline", metavar="METHOD", help="what others are compared with; default: the first method")
    add_study(parser, seeds=3, out="out/TASK-PRESET")


def _race(options: argparse.Namespace) -> int:
    from steepest.lab.studies.race.plan import Race
    from steepest.lab.tasks import make_task

    with checking_usage():
        task = make_task(options.task, options.preset, data=options.data)
        methods = tuple(options.methods or racers(task.name))
        baseline = options.baseline or methods[0]
        race = Race(
            task=task,
            methods=methods,
            seeds=tuple(range(options.seeds)),
            options=by_method(options.set),
            steps=options.steps,
            baseline=baseline,
        )
    own = ["--baseline", baseline]
    return run_plan(race, options, own, options.out or Path("out") / f"{task.name}-{task.preset}")
