"""The commands about many runs: race, sweep, work, report, pack and unpack."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from steepest.lab.cli.hidden import may_hold_password
from steepest.lab.cli.options import (
    METHODS,
    Commands,
    UsageError,
    add_command,
    add_task,
    assignment,
    by_method,
    checking_usage,
    count,
    few,
    names,
    path,
    racers,
)
from steepest.lab.cli.outcome import DONE, failed

if TYPE_CHECKING:
    from steepest.lab.studies.study import StudyPlan

RACE_EXAMPLES = """examples:
  steepest race --task digits --methods adamw,muon --seeds 2 --steps 50
  steepest race --preset demo
  steepest race --methods adamw,muon --seeds 5 --out out/five
  steepest race --methods adamw,muon --set muon.lr=0.03 --set adamw.lr=0.005
  steepest race --task text --data my_corpus/ --preset tiny
"""
SWEEP_EXAMPLES = """examples:
  steepest sweep --task digits --methods adamw,muon --lrs 0.01,0.03 --seeds 1 --steps 50
  steepest sweep --methods adamw,muon --lrs 1e-4:1e1:log9 --preset tiny
  steepest sweep --methods adamw,muon --lrs 1e-4:1:log9 --lrs muon=1e-3:10:log9 --seeds 3
  steepest sweep --methods muon --lrs 0.01,0.02,0.04 --out /shared/muon \\
    --storage postgresql+psycopg://user@host:5432/database

Many machines share a sweep through PostgreSQL, see: steepest work --help. Leave the password out of the URL, and it
is taken from PGPASSWORD or from ~/.pgpass.
"""
WORK_EXAMPLES = """examples:
  steepest sweep --task digits --methods sgd --lrs 0.03,0.1 --seeds 1 --steps 50 --out out/shared
  steepest work out/shared
  steepest work postgresql+psycopg://user@host:5432/database --runs /shared/muon --workers 8
"""
REPORT_EXAMPLES = """examples:
  steepest race --task digits --methods adamw,muon --seeds 1 --steps 50 --out out/digits
  steepest report out/digits
"""
PACK_EXAMPLES = """examples:
  steepest race --task digits --methods adamw,muon --seeds 1 --steps 50 --out out/digits
  steepest pack out/digits
  steepest pack out/digits --delete
  steepest report out/digits

The file holds every record to the byte: `xz -dc DIR/runs.jsonl.xz` shows it, one line per run. A packed study is
reported and fitted like any other; before it is repeated or grown, unpack it.
"""
UNPACK_EXAMPLES = """examples:
  steepest race --task digits --methods adamw,muon --seeds 1 --steps 50 --out out/digits
  steepest pack out/digits --delete
  steepest unpack out/digits
"""


def add_commands(commands: Commands) -> None:
    """Declare race, sweep, work, report, pack and unpack."""
    race = add_command(
        commands, "race", _race, "train several methods alike and report who wins", RACE_EXAMPLES, saves=True
    )
    race.add_argument("--baseline", metavar="METHOD", help="what others are compared with; default: the first method")
    _add_study(race, seeds=3, out="out/TASK-PRESET")

    sweep = add_command(
        commands, "sweep", _sweep, "train several methods at many learning rates", SWEEP_EXAMPLES, saves=True
    )
    sweep.add_argument(
        "--lrs",
        action="append",
        required=True,
        metavar="[METHOD=]RATES",
        help="LOW:HIGH:logN or a list with commas; for all methods, or for one and then instead",
    )
    _add_study(sweep, seeds=2, out="out/sweep-TASK-PRESET")

    work = add_command(
        commands, "work", _work, "help with a race or sweep that was started elsewhere", WORK_EXAMPLES, saves=True
    )
    work.add_argument("storage", metavar="STORAGE", help="what it was given as --storage, or else as --out")
    work.add_argument("--runs", type=path, metavar="DIR", help="what it was given as --out, as this machine sees it")
    work.add_argument("--workers", type=few, metavar="N", help="runs at once; default: one per core")
    work.add_argument("--threads", type=few, default=1, metavar="N", help="CPU threads each; default: %(default)s")
    work.add_argument("--data", type=path, metavar="PATH", help="what it was given as --data")

    report = add_command(commands, "report", _report, "write the report anew from its records", REPORT_EXAMPLES)
    report.add_argument("directory", type=path, metavar="DIR", help="what race or sweep was given as --out")

    packing = add_command(commands, "pack", _pack, "write a finished study's records into one file", PACK_EXAMPLES)
    packing.add_argument("directory", type=path, metavar="DIR", help="what race or sweep was given as --out")
    packing.add_argument("--delete", action="store_true", help="delete its runs and study.json once they are packed")

    unpacking = add_command(commands, "unpack", _unpack, "write a packed study's runs anew", UNPACK_EXAMPLES)
    unpacking.add_argument("directory", type=path, metavar="DIR", help="what pack was given")


def _add_study(parser: argparse.ArgumentParser, *, seeds: int, out: str) -> None:
    parser.add_argument(
        "--methods",
        type=names,
        metavar="A,B,...",
        help=f"of {METHODS}; default: {','.join(racers('text'))}, as far as they take the task's model",
    )
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


def _work(options: argparse.Namespace) -> int:
    from rich.console import Console

    from steepest.lab.disk.fields import RecordError
    from steepest.lab.engine.storage import StorageError, parse_url
    from steepest.lab.engine.study import FailedRunsError, default_workers, join_study
    from steepest.lab.studies import KINDS
    from steepest.lab.studies.records import read_kind
    from steepest.lab.studies.study import StudyMismatchError

    directory = None if may_hold_password(options.storage) or "://" in options.storage else Path(options.storage)
    with checking_usage():
        if directory is None:
            parse_url(options.storage)
        if (out := options.runs or directory) is None:
            raise ValueError("Behind a URL, --runs DIR says where the runs are: what race or sweep was given as --out.")
        if directory is not None and directory.resolve() != out.resolve():
            raise ValueError(f"The storage {directory} is a directory, --runs {out} another one. Leave --runs out.")
    try:
        number = join_study(
            out,
            workers=options.workers or default_workers(),
            threads=options.threads,
            data=options.data,
            storage=None if directory else options.storage,
            console=Console(stderr=True),
        )
    except StudyMismatchError as wrong:
        raise UsageError(str(wrong)) from wrong
    except (FailedRunsError, RecordError, StorageError) as failure:
        return failed(failure)
    print(
        f"All {number} runs in {out} are finished. To write the report: {shlex.join(['steepest', 'report', str(out)])}"
    )
    if KINDS[read_kind(out)].grows:
        print("Whoever started it may find more to train: if nobody does, repeat that command.")
    return DONE


def _report(options: argparse.Namespace) -> int:
    from steepest.lab.disk.fields import RecordError
    from steepest.lab.studies.report import write_report

    try:
        print(f"Report: {write_report(options.directory)}")
    except RecordError as failure:
        return failed(failure)
    return DONE


def _pack(options: argparse.Namespace) -> int:
    from steepest.lab.disk.ledger import RunBusyError
    from steepest.lab.studies.pack import pack_study

    try:
        print(f"Packed: {pack_study(options.directory, delete=options.delete)}")
    except RunBusyError as failure:
        return failed(failure)
    return DONE


def _unpack(options: argparse.Namespace) -> int:
    from steepest.lab.disk.ledger import RunBusyError
    from steepest.lab.studies.pack import unpack_study

    try:
        print(f"Unpacked: {unpack_study(options.directory)} runs in {options.directory / 'runs'}")
    except RunBusyError as failure:
        return failed(failure)
    return DONE
