"""How measurements leave a command: a table or JSON on the terminal; JSON, CSV and PNG in a directory."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from steepest.lab.cli.options import UsageError


def described(content: Mapping[str, object]) -> dict[str, object]:
    """A result with what led to it: the command line, and the machine it ran on, whose commit is told apart."""
    from steepest.lab.runs.environment import describe_environment

    environment = describe_environment()
    return {"command": sys.argv[1:], "commit": environment["git_commit"], "environment": environment, **content}


def check_out(directory: Path | None) -> None:
    """Refuse to write beside somebody else's files, before anything is measured.

    Raises:
        UsageError: If the directory is not empty and holds no results of ours.
    """
    from steepest.lab.disk.ours import refusal

    if directory is not None and (problem := refusal(directory, "bench")) is not None:
        raise UsageError(problem)


def write_results(
    directory: Path,
    name: str,
    content: Mapping[str, object],
    rows: Sequence[Mapping[str, object]],
    draw: Callable[[], bytes] | None = None,
) -> None:
    """Write NAME.json, NAME.csv and, if there is something to draw, NAME.png.

    Args:
        directory: Made if it is not there.
        name: Of the files.
        content: Of the JSON.
        rows: Of the CSV, at least one, all with the same keys.
        draw: Makes the PNG; None: there is none.
    """
    from steepest.lab.disk.files import make_directory, write_whole
    from steepest.lab.report.sheet import neutral

    make_directory(directory)
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: neutral(v) if isinstance(v, str) else v for key, v in row.items()} for row in rows)
    write_whole(directory / f"{name}.json", json.dumps(content, indent=2, allow_nan=False) + "\n")
    write_whole(directory / f"{name}.csv", table.getvalue())
    if draw is not None:
        write_whole(directory / f"{name}.png", draw())


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table whose first column is a name; no number is cut short on a narrow terminal."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.measure import Measurement
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        table.add_column(escape(column), justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(escape, row))
    console = Console()
    needed = Measurement.get(console, console.options.update(max_width=1000), table).maximum
    Console(width=max(needed, console.width)).print(table)
