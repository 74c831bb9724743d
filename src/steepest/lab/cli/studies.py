"""The commands about studies: one for each kind that makes such a study, then work, report, pack and unpack."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

from steepest.lab.cli.command import Arg, Command, Tree
from steepest.lab.cli.hidden import may_hold_password
from steepest.lab.cli.options import Few, File, OnThreads, checking_usage
from steepest.lab.cli.outcome import DONE
from steepest.lab.studies import KINDS


class Work(Command, OnThreads):
    """Help with a race or sweep that was started elsewhere.

    examples:
      steepest sweep --task digits --methods sgd --lrs 0.03,0.1 --seeds 1 --steps 50 --out out/shared
      steepest work out/shared
      steepest work postgresql+psycopg://user@host:5432/database --runs /shared/muon --workers 8
    """

    saves = True

    storage: Annotated[str, Arg("what it was given as --storage, or else as --out", "STORAGE", "place")]
    runs: Annotated[File | None, Arg("what it was given as --out, as this machine sees it", "DIR")] = None
    workers: Annotated[Few | None, Arg("runs at once; default: one per core", "N")] = None
    data: Annotated[File | None, Arg("what it was given as --data", "PATH")] = None

    def run(self) -> int:
        """Train what is left."""
        from rich.console import Console

        from steepest.lab.engine.storage import parse_url
        from steepest.lab.engine.study import default_workers, join_study
        from steepest.lab.studies.records import read_kind

        directory = None if may_hold_password(self.storage) or "://" in self.storage else Path(self.storage)
        with checking_usage():
            if directory is None:
                parse_url(self.storage)
            if (out := self.runs or directory) is None:
                raise ValueError(
                    "Behind a URL, --runs DIR says where the runs are: what race or sweep was given as --out."
                )
            if directory is not None and directory.resolve() != out.resolve():
                raise ValueError(f"The storage {directory} is a directory, --runs {out} another one. Leave --runs out.")
        number = join_study(
            out,
            workers=self.workers or default_workers(),
            threads=self.threads,
            data=self.data,
            storage=None if directory else self.storage,
            console=Console(stderr=True),
        )
        report = shlex.join(["steepest", "report", str(out)])
        print(f"All {number} runs in {out} are finished. To write the report: {report}")
        if KINDS[read_kind(out)].grows:
            print("Whoever started it may find more to train: if nobody does, repeat that command.")
        return DONE


class Report(Command):
    """Write the report anew from its records.

    examples:
      steepest race --task digits --methods adamw,muon --seeds 1 --steps 50 --out out/digits
      steepest report out/digits
    """

    directory: Annotated[File, Arg("what race or sweep was given as --out", "DIR", "place")]

    def run(self) -> int:
        """Write it."""
        from steepest.lab.studies.report import write_report

        print(f"Report: {write_report(self.directory)}")
        return DONE


class Pack(Command):
    """Write a finished study's records into one file.

    examples:
      steepest race --task digits --methods adamw,muon --seeds 1 --steps 50 --out out/digits
      steepest pack out/digits
      steepest pack out/digits --delete
      steepest report out/digits

    The file holds every record to the byte: `xz -dc DIR/runs.jsonl.xz` shows it, one line per run. A packed study is
    reported and fitted like any other; before it is repeated or grown, unpack it.
    """

    directory: Annotated[File, Arg("what race or sweep was given as --out", "DIR", "place")]
    delete: Annotated[bool, Arg("delete its runs and study.json once they are packed")] = False

    def run(self) -> int:
        """Pack them."""
        from steepest.lab.studies.pack import pack_study

        print(f"Packed: {pack_study(self.directory, delete=self.delete)}")
        return DONE


class Unpack(Command):
    """Write a packed study's runs anew.

    examples:
      steepest race --task digits --methods adamw,muon --seeds 1 --steps 50 --out out/digits
      steepest pack out/digits --delete
      steepest unpack out/digits
    """

    directory: Annotated[File, Arg("what pack was given", "DIR", "place")]

    def run(self) -> int:
        """Write them."""
        from steepest.lab.studies.pack import unpack_study

        print(f"Unpacked: {unpack_study(self.directory)} runs in {self.directory / 'runs'}")
        return DONE


COMMANDS: Tree = {
    # others are part of a command of their own
    **{kind.command[0]: kind.load_command() for kind in KINDS.values() if len(kind.command) == 1},
    "work": Work,
    "report": Report,
    "pack": Pack,
    "unpack": Unpack,
}
