"""The commands about studies: one for each kind that makes such a study, then work, report, pack and unpack."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from steepest.lab.cli.hidden import may_hold_password
from steepest.lab.cli.options import Commands, UsageError, add_command, checking_usage, few, path
from steepest.lab.cli.outcome import DONE, failed
from steepest.lab.studies import KINDS

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
    """Declare race, sweep and what else makes a study, work, report, pack and unpack."""
    for kind in KINDS.values():
        if len(kind.command) == 1:  # others are part of a command of their own
            kind.add_command(commands)

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


def _work(options: argparse.Namespace) -> int:
    from rich.console import Console

    from steepest.lab.disk.fields import RecordError
    from steepest.lab.engine.storage import StorageError, parse_url
    from steepest.lab.engine.study import FailedRunsError, default_workers, join_study
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
