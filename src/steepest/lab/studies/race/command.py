"""`steepest race`: methods against each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

from steepest.lab.cli.command import Arg
from steepest.lab.cli.options import by_method, racers
from steepest.lab.cli.study import Steps, StudyCommand

if TYPE_CHECKING:
    from steepest.lab.studies.race.plan import Race
    from steepest.lab.tasks.task import Task


class RaceCommand(StudyCommand):
    """Train several methods alike and report who wins.

    examples:
      steepest race --task digits --methods adamw,muon --seeds 2 --steps 50
      steepest race --preset demo
      steepest race --methods adamw,muon --seeds 5 --out out/five
      steepest race --methods adamw,muon --set muon.lr=0.03 --set adamw.lr=0.005
      steepest race --task text --data my_corpus/ --preset tiny
    """

    baseline: Annotated[str | None, Arg("what others are compared with; default: the first method", "METHOD")] = None
    steps: Steps = None

    def plan(self, task: Task) -> tuple[Race, Mapping[str, object]]:
        """One of each method and seed."""
        from steepest.lab.studies.race.plan import Race

        methods = self.methods or racers(task.name)
        race = Race(
            task=task,
            methods=methods,
            seeds=tuple(range(self.seeds)),
            options=by_method(self.set),
            steps=self.steps,
            baseline=self.baseline or methods[0],
        )
        return race, {"baseline": race.baseline}


COMMAND = RaceCommand
