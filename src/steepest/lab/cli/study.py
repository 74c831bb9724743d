"""What the commands share that make a study and train it."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from steepest.lab.cli.options import (
    UsageError,
    add_task,
    assignment,
    checking_usage,
    count,
    few,
    names,
    naming_methods,
    path,
    racers,
)
from steepest.lab.cli.outcome import DONE, failed

if TYPE_CHECKING:
    from steepest.lab.studies.study import StudyPlan


def add_study(parser: argparse.ArgumentParser, *, seeds: int, out: str) -> None:
    """Declare methods, seeds and task of a study, and all that `add_running` does.

    Args:
        parser: Of a command that makes a study.
        seeds: How many there are by default.
        out: As for `add_running`.
    """
    methods = parser.add_argument(
        "--methods",
        type=names,
        metavar="A,B,...",
        help=f"of %(known)s; default: {','.join(racers('text'))}, as far as they take the task's model",
    )
    naming_methods(methods)
    parser.add_argument("--seeds", type=few, default=seeds, metavar="N", help="runs of each; default: %(default)s")
    add_task(parser)
    parser.add_argument(
        "--steps", type=count, metavar="N", help="of a run; default: the preset's, for which it is tuned"
    )
    add_running(parser, out=out)


def add_running(parser: argparse.ArgumentParser, *, out: str) -> None:
    """Declare how the runs of a study are changed, kept and trained.

    Args:
        parser: Of a command that makes a study.
        out: Where they are kept by default, for its help.
    """
    parser.add_argument(
        "--set", action="append", type=assignment, default=[], metavar="METHOD.OPTION=VALUE", help="change an option"
    )
    parser.add_argument("--out", type=path, metavar="DIR", help=f"where runs and report go; default: {out}")
    parser.add_argument("--workers", type=few, metavar="N", help="runs at once; default: one per core")
    parser.add_argument("--storage", metavar="URL", help="hands out the runs; default: DIR/optuna.db")
    parser.add_argument("--json", action="store_true", help="print where the report is as JSON")


def run_plan(plan: StudyPlan, options: argparse.Namespace, own: list[str], out: Path) -> int:
    """Train a study and print where its report is.

    Args:
        plan: What to train.
        options: Those of the command line that every kind has.
        own: The words of its command that other kinds do not have.
        out: Its directory.

    Returns:
        Exit code.
    """
    from rich.console import Console

    from steepest.lab.disk.fields import RecordError
    from steepest.lab.disk.ledger import RunBusyError
    from steepest.lab.engine.storage import StorageError
    from steepest.lab.engine.study import FailedRunsError, default_workers, run_study
    from steepest.lab.studies.study import StudyMismatchError

    with checking_usage():
        plan.configs()
        command = _repeat(plan, options, own, out)
    try:
        report = run_study(
            plan,
            out,
            command=command,
            workers=options.workers or default_workers(),
            data=options.data,
            storage=options.storage,
            console=Console(stderr=True),
        )
    except StudyMismatchError as wrong:
        raise UsageError(str(wrong)) from wrong
    except (FailedRunsError, RecordError, RunBusyError, StorageError) as failure:
        return failed(failure)
    print(json.dumps({"report": str(report)}) if options.json else f"Report: {report}")
    return DONE


def _repeat(plan: StudyPlan, options: argparse.Namespace, own: list[str], out: Path) -> str:
    """The command that repeats a study, every choice spelled out; of a storage on a server, the form only."""
    from steepest.lab.engine.storage import parse_url, public_url
    from steepest.lab.studies import KINDS

    words = [
        "steepest",
        *KINDS[plan.kind].command,
        "--methods",
        ",".join(plan.methods),
        *own,
        "--seeds",
        str(options.seeds),
    ]
    words += ["--task", options.task, "--preset", options.preset]
    if plan.steps is not None:
        words += ["--steps", str(plan.steps)]
    if options.data is not None:
        words += ["--data", str(options.data)]
    for name, value in options.set:
        words += ["--set", f"{name}={json.dumps(value) if isinstance(value, bool) else value}"]
    if options.storage is not None:
        words += ["--storage", public_url(parse_url(options.storage))]
    return shlex.join([*words, "--out", str(out)])
