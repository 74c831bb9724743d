"""`steepest sweep`: methods at many learning rates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

from steepest.lab.cli.command import Arg
from steepest.lab.cli.options import Few, by_method, racers
from steepest.lab.cli.study import Steps, StudyCommand

if TYPE_CHECKING:
    from steepest.lab.studies.sweep.plan import Sweep
    from steepest.lab.tasks.task import Task


class SweepCommand(StudyCommand):
    r"""Train several methods at many learning rates.

    examples:
      steepest sweep --task digits --methods adamw,muon --lrs 0.01,0.03 --seeds 1 --steps 50
      steepest sweep --methods adamw,muon --lrs 1e-4:1e1:log9 --preset tiny
      steepest sweep --methods adamw,muon --lrs 1e-4:1:log9 --lrs muon=1e-3:10:log9 --seeds 3
      steepest sweep --methods muon --lrs 0.01,0.02,0.04 --out /shared/muon \
        --storage postgresql+psycopg://user@host:5432/database

    Many machines share a sweep through PostgreSQL, see: steepest work --help. Leave the password out of the URL, and it
    is taken from PGPASSWORD or from ~/.pgpass.
    """

    lrs: Annotated[
        tuple[str, ...],
        Arg(
            "LOW:HIGH:logN or a list with commas; for all methods, or for one and then instead",
            "[METHOD=]RATES",
            "repeated",
        ),
    ]
    seeds: Annotated[Few, Arg("runs of each", "N")] = 2
    steps: Steps = None

    def plan(self, task: Task) -> tuple[Sweep, Mapping[str, object]]:
        """One of each method, rate and seed."""
        from steepest.lab.studies.sweep.plan import Sweep, rates_by_method

        methods = self.methods or racers(task.name)
        sweep = Sweep(
            task=task,
            methods=methods,
            seeds=tuple(range(self.seeds)),
            options=by_method(self.set),
            steps=self.steps,
            lrs=rates_by_method(self.lrs, methods),
        )
        return sweep, {}


COMMAND = SweepCommand
