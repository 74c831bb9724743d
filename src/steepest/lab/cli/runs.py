"""The commands about one run: train and plan."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from steepest.lab.cli.options import (
    Commands,
    UsageError,
    add_command,
    add_task,
    assignment,
    checking_usage,
    count,
    few,
    naming_methods,
    path,
    seed,
)
from steepest.lab.cli.outcome import DONE, INTERRUPTED, failed

if TYPE_CHECKING:
    from steepest.lab.runs.config import RunConfig

TRAIN_EXAMPLES = """examples:
  steepest train --task digits --method muon --out out/muon-digits
  steepest train --method muon --out out/muon
  steepest train --method adamw --set lr=0.003 --task digits --seed 1 --out out/digits
"""
PLAN_EXAMPLES = """examples:
  steepest plan --task text
  steepest plan --task digits --method adam --json
"""


def add_commands(commands: Commands) -> None:
    """Declare train and plan."""
    train = add_command(commands, "train", _train, "train one run", TRAIN_EXAMPLES, saves=True)
    naming_methods(train.add_argument("--method", required=True, help="one of %(known)s"))
    train.add_argument("--seed", type=seed, default=0, help="of weights and data order; default: %(default)s")
    add_task(train)
    train.add_argument("--set", action="append", type=assignment, default=[], metavar="OPTION=VALUE")
    train.add_argument("--out", type=path, required=True, metavar="DIR", help="the run's directory")
    train.add_argument("--steps", type=count, metavar="N", help="instead of the preset's number")
    train.add_argument(
        "--schedule", default="cooldown", help="of the learning rate, cooldown or constant; default: %(default)s"
    )
    train.add_argument("--threads", type=few, default=1, metavar="N", help="CPU threads; default: %(default)s")
    train.add_argument("--keep-checkpoint", action="store_true", help="keep the trained weights")
    train.add_argument(
        "--diagnostics", action="store_true", help="record the optimizer's numbers and the weights' norms, too"
    )
    train.add_argument("--json", action="store_true", help="print the result as JSON")

    plan = add_command(commands, "plan", _plan, "print which parameter is optimised how, and why", PLAN_EXAMPLES)
    plan.add_argument("--method", default="muon", help="a method of this library; default: %(default)s")
    add_task(plan)
    plan.add_argument("--json", action="store_true", help="print rows as JSON")


def _train(options: argparse.Namespace) -> int:
    from rich.console import Console

    from steepest.lab.disk.fields import RecordError
    from steepest.lab.disk.files import exists
    from steepest.lab.disk.ledger import RunBusyError
    from steepest.lab.engine.display import StudyDisplay
    from steepest.lab.engine.stopping import counting_signals
    from steepest.lab.runs.checkpoint import CheckpointError
    from steepest.lab.runs.train import Interrupted, RunMismatchError, train_run

    config = _config(options)
    finished = exists(options.out / "result.json")
    display = StudyDisplay({config.method: [options.out]}, steps=config.steps, console=Console(stderr=True))
    try:
        with counting_signals() as stopped, display:
            result = train_run(
                config,
                options.out,
                data=options.data,
                threads=options.threads,
                keep_checkpoint=options.keep_checkpoint,
                diagnostics=options.diagnostics,
                stop=lambda: display.glance() or bool(stopped),
            )
    except Interrupted as interrupted:
        print(interrupted, file=sys.stderr)
        return INTERRUPTED
    except RunMismatchError as wrong:
        raise UsageError(str(wrong)) from wrong
    except (CheckpointError, RecordError, RunBusyError) as failure:
        return failed(failure)
    if finished:
        _check_kept(options)
    if options.json:
        print(result.to_json(), end="")
    elif result.final_loss is None:
        print(f"Diverged after {result.steps} steps; the rows are in {options.out}.")
    else:
        print(f"Final loss {result.final_loss:.4f} after {result.steps} steps in {result.train_s:.1f} s: {options.out}")
    return DONE


def _check_kept(options: argparse.Namespace) -> None:
    """Of a run that was finished before, refuse what only training can give."""
    from steepest.lab.disk.files import exists, read_lines

    for option, there in (
        ("keep-checkpoint", exists(options.out / "checkpoint.pt")),
        ("diagnostics", any('"kind": "diagnostics"' in row for row in read_lines(options.out / "metrics.jsonl"))),
    ):
        if getattr(options, option.replace("-", "_")) and not there:
            raise UsageError(
                f"--{option}: the run in {options.out} is finished, and was trained without it. Train it into another "
                f"directory with --{option}, or leave the option out."
            )


def _config(options: argparse.Namespace) -> RunConfig:
    from steepest.lab.methods import check_buildable
    from steepest.lab.runs.config import configure
    from steepest.lab.tasks import make_task
    from steepest.optim import SteepestDescent

    with checking_usage():
        task = make_task(options.task, options.preset, data=options.data)
        config = configure(
            task,
            method=options.method,
            seed=options.seed,
            options=dict(options.set),
            steps=options.steps,
            schedule=options.schedule,
        )
        optimizer = check_buildable(config.method, task, config.options)
        if options.diagnostics and not isinstance(optimizer, SteepestDescent):
            raise ValueError(f"--diagnostics: {config.method!r} is not a method of this library; try muon or adam.")
    return config


def _plan(options: argparse.Namespace) -> int:
    from steepest.lab.methods import build_optimizer, resolve
    from steepest.lab.tasks import make_task
    from steepest.optim import SteepestDescent

    with checking_usage():
        task = make_task(options.task, options.preset, data=options.data)
        resolved = resolve(options.method, task=task.name, preset=task.preset, options={})
        optimizer = build_optimizer(options.method, task.build_model(0), resolved.options)
    if not isinstance(optimizer, SteepestDescent):
        raise UsageError(f"{options.method!r} is not a method of this library and has no plan; try muon or adam.")
    print(optimizer.plan.to_json() if options.json else optimizer.plan)
    return DONE
