"""The commands about one run: train and plan."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, cast

from steepest.lab.cli.command import Arg, Command, Tree
from steepest.lab.cli.options import AsJson, Assigned, Count, File, OnTask, OnThreads, Seed, checking_usage
from steepest.lab.cli.outcome import DONE, INTERRUPTED
from steepest.lab.errors import UsageError

if TYPE_CHECKING:
    from steepest.lab.runs.config import RunConfig
    from steepest.lab.runs.schedule import Schedule


class Train(Command, OnTask, OnThreads, AsJson):
    """Train one run.

    examples:
      steepest train --task digits --method muon --out out/muon-digits
      steepest train --method muon --out out/muon
      steepest train --method adamw --set lr=0.003 --task digits --seed 1 --out out/digits
    """

    saves = True

    method: Annotated[str, Arg("one of %(known)s")]
    seed: Annotated[Seed, Arg("of weights and data order")] = 0
    set: Annotated[tuple[Assigned, ...], Arg("change an option", "OPTION=VALUE", "repeated")] = ()
    out: Annotated[File, Arg("the run's directory", "DIR")]
    steps: Annotated[Count | None, Arg("instead of the preset's number", "N")] = None
    schedule: Annotated[str, Arg("of the learning rate, cooldown or constant")] = "cooldown"
    keep_checkpoint: Annotated[bool, Arg("keep the trained weights")] = False
    diagnostics: Annotated[bool, Arg("record the optimizer's numbers and the weights' norms, too")] = False

    def run(self) -> int:
        """Train it, and print how it ended."""
        from rich.console import Console

        from steepest.lab.disk.files import exists
        from steepest.lab.engine.display import StudyDisplay
        from steepest.lab.engine.stopping import counting_signals
        from steepest.lab.runs.train import Interrupted, train_run

        with checking_usage():
            config = self._config()
        finished = exists(self.out / "result.json")
        display = StudyDisplay({config.method: [self.out]}, steps=config.steps, console=Console(stderr=True))
        try:
            with counting_signals() as stopped, display:
                result = train_run(
                    config,
                    self.out,
                    data=self.data,
                    threads=self.threads,
                    keep_checkpoint=self.keep_checkpoint,
                    diagnostics=self.diagnostics,
                    stop=lambda: display.glance() or bool(stopped),
                )
        except Interrupted as interrupted:
            print(interrupted, file=sys.stderr)
            return INTERRUPTED
        if finished:
            self._check_kept()
        if self.json:
            print(result.to_json(), end="")
        elif result.final_loss is None:
            print(f"Diverged after {result.steps} steps; the rows are in {self.out}.")
        else:
            told = f"Final loss {result.final_loss:.4f} after {result.steps} steps in {result.train_s:.1f} s"
            print(f"{told}: {self.out}")
        return DONE

    def _check_kept(self) -> None:
        """Of a run that was finished before, refuse what only training can give."""
        from steepest.lab.disk.files import exists, read_lines

        rows = read_lines(self.out / "metrics.jsonl")
        for option, asked, there in (
            ("keep-checkpoint", self.keep_checkpoint, lambda: exists(self.out / "checkpoint.pt")),
            ("diagnostics", self.diagnostics, lambda: any('"kind": "diagnostics"' in row for row in rows)),
        ):
            if asked and not there():
                raise UsageError(
                    f"--{option}: the run in {self.out} is finished, and was trained without it. Train it into another "
                    f"directory with --{option}, or leave the option out."
                )

    def _config(self) -> RunConfig:
        from steepest.lab.methods import check_buildable
        from steepest.lab.runs.config import configure
        from steepest.optim import SteepestDescent

        task = self.load()
        config = configure(
            task,
            method=self.method,
            seed=self.seed,
            options=dict(self.set),
            steps=self.steps,
            schedule=cast("Schedule", self.schedule),
        )
        optimizer = check_buildable(config.method, task, config.options)
        if self.diagnostics and not isinstance(optimizer, SteepestDescent):
            raise ValueError(f"--diagnostics: {config.method!r} is not a method of this library; try muon or adam.")
        return config


class Plan(Command, OnTask, AsJson):
    """Print which parameter is optimised how, and why.

    examples:
      steepest plan --task text
      steepest plan --task digits --method adam --json
    """

    method: Annotated[str, Arg("a method of this library")] = "muon"
    json: Annotated[bool, Arg("print rows as JSON")] = False

    def run(self) -> int:
        """Print it."""
        from steepest.lab.methods import build_optimizer, resolve
        from steepest.optim import SteepestDescent

        with checking_usage():
            task = self.load()
            resolved = resolve(self.method, task=task.name, preset=task.preset, options={})
            optimizer = build_optimizer(self.method, task.build_model(0), resolved.options)
        if not isinstance(optimizer, SteepestDescent):
            raise UsageError(f"{self.method!r} is not a method of this library and has no plan; try muon or adam.")
        print(optimizer.plan.to_json() if self.json else optimizer.plan)
        return DONE


COMMANDS: Tree = {"train": Train, "plan": Plan}
