"""What the commands share that make a study and train it."""

from __future__ import annotations

import dataclasses
import json
import shlex
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from steepest.lab.cli.command import Arg, Command, spelled_out
from steepest.lab.cli.options import AsJson, Assigned, Count, Few, File, Names, OnTask, checking_usage, racers
from steepest.lab.cli.outcome import DONE

if TYPE_CHECKING:
    from steepest.lab.studies.study import StudyPlan
    from steepest.lab.tasks.task import Task

_RACERS = f"of %(known)s; default: {','.join(racers('text'))}, as far as they take the task's model"
Racers = Annotated[Names | None, Arg(_RACERS, "A,B,...")]
Steps = Annotated[Count | None, Arg("of a run; default: the preset's, for which it is tuned", "N")]


class StudyCommand(Command, OnTask, AsJson):
    """Makes a study, trains its runs and writes its report."""

    saves = True

    methods: Racers = None
    seeds: Annotated[Few, Arg("runs of each", "N")] = 3
    set: Annotated[tuple[Assigned, ...], Arg("change an option", "METHOD.OPTION=VALUE", "repeated")] = ()
    out: Annotated[File | None, Arg("where runs and report go; default: out/[KIND-]TASK-PRESET", "DIR")] = None
    workers: Annotated[Few | None, Arg("runs at once; default: one per core", "N")] = None
    storage: Annotated[str | None, Arg("hands out the runs; default: DIR/optuna.db", "URL")] = None
    json: Annotated[bool, Arg("print where the report is as JSON")] = False

    @abstractmethod
    def plan(self, task: Task) -> tuple[StudyPlan, Mapping[str, object]]:
        """What to train, and what was chosen for options of its own that were not given.

        Args:
            task: Loaded.

        Raises:
            ValueError: If the options cannot be meant.
        """

    def run(self) -> int:
        """Train it and print where its report is."""
        from rich.console import Console

        from steepest.lab.engine.storage import parse_url, public_url
        from steepest.lab.engine.study import default_workers, run_study
        from steepest.lab.studies import KINDS

        with checking_usage():
            task = self.load()
            plan, chosen = self.plan(task)
            plan.configs()
            prefix = "" if plan.kind == "race" else f"{plan.kind}-"
            out = self.out or Path("out") / f"{prefix}{task.name}-{task.preset}"
            public = None if self.storage is None else public_url(parse_url(self.storage))
            whole = dataclasses.replace(self, methods=plan.methods, out=out, storage=public, **chosen)
        words = ["steepest", *KINDS[plan.kind].command, *spelled_out(whole, but=("workers", "json"))]
        report = run_study(
            plan,
            out,
            command=shlex.join(words),  # every choice spelled out; of a storage on a server, the form only
            workers=self.workers or default_workers(),
            data=self.data,
            storage=self.storage,
            console=Console(stderr=True),
        )
        print(json.dumps({"report": str(report)}) if self.json else f"Report: {report}")
        return DONE
