"""What every benchmark does with what it measured: tables or JSON on the terminal; JSON, CSV and PNG in a directory."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

from steepest.lab.cli.command import Arg, Command, spelled_out
from steepest.lab.cli.options import AsJson, File, OnThreads
from steepest.lab.cli.outcome import Table, print_json, print_tables
from steepest.lab.errors import UsageError


@dataclass(frozen=True)
class Measured:
    """Of a benchmark.

    Args:
        content: All of it, for the JSON.
        rows: Lines of the CSV, at least one.
        tables: What people read.
        draw: Makes the PNG; None: there is none.
        chosen: What was taken for options that were not given.
    """

    content: Mapping[str, object]
    rows: Sequence[Mapping[str, object]]
    tables: Sequence[Table]
    draw: Callable[[], bytes] | None = None
    chosen: Mapping[str, object] = field(default_factory=dict[str, object])


class BenchCommand(Command, AsJson):
    """Measures something."""

    name: ClassVar[str]
    files: ClassVar[str | None] = None  # their name, if it is another

    out: Annotated[File | None, Arg("where its JSON and CSV go, and its PNG if there is one", "DIR")] = None

    @abstractmethod
    def measure(self) -> Measured:
        """Do it.

        Raises:
            UsageError: If the options cannot be meant.
        """

    def run(self) -> int:
        """Measure, print and write; somebody else's files are refused before anything is measured."""
        from steepest.lab.disk.ours import refusal
        from steepest.lab.runs.environment import describe_environment

        if self.out is not None and (problem := refusal(self.out, "bench")) is not None:
            raise UsageError(problem)
        environment = describe_environment()
        if isinstance(self, OnThreads):
            import torch

            torch.set_num_threads(self.threads)
            environment["threads"] = self.threads
        measured = self.measure()
        words = spelled_out(dataclasses.replace(self, **measured.chosen), but=("out", "json"))
        content = {
            "command": shlex.join(["steepest", "bench", self.name, *words]),
            "commit": environment["git_commit"],
            "environment": environment,
            **measured.content,
        }
        code = print_json(content) if self.json else print_tables(measured.tables)
        if self.out is not None:
            _write(self.out, self.files or self.name, content, measured)
        return code


def _write(directory: Path, name: str, content: Mapping[str, object], measured: Measured) -> None:
    from steepest.lab.disk.files import make_directory, write_whole
    from steepest.lab.report.sheet import sheet

    make_directory(directory)
    columns = list(dict.fromkeys(column for row in measured.rows for column in row))
    files: dict[str, str | bytes] = {
        "json": json.dumps(content, indent=2, allow_nan=False) + "\n",
        "csv": sheet(columns, ([row.get(column) for column in columns] for row in measured.rows)),
    }
    if measured.draw is not None:
        files["png"] = measured.draw()
    for ending, text in files.items():
        write_whole(directory / f"{name}.{ending}", text)
        print(directory / f"{name}.{ending}", file=sys.stderr)
