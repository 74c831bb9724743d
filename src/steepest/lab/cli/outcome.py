"""How a command ends: tables or JSON on the terminal, a message where it failed, and its exit code."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import NamedTuple

from steepest.lab.cli.hidden import without_passwords

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


class Table(NamedTuple):
    """What people read: cells in columns, of which the first is a name, and lines below."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


def failed(text: str, words: Sequence[str] = (), *, code: int = FAILED) -> int:
    """Tell what went wrong, without a password, and return the exit code.

    Args:
        text: What went wrong.
        words: Of the command line, which the text may repeat.
        code: The exit code.
    """
    print(f"error: {without_passwords(text, words)}", file=sys.stderr)
    return code


def print_json(content: object) -> int:
    """Print numbers and texts for programs, and return the exit code."""
    print(json.dumps(content, indent=2, allow_nan=False))
    return DONE


def print_tables(tables: Sequence[Table]) -> int:
    """Print tables, no number of which is cut short on a narrow terminal, and return the exit code."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.measure import Measurement
    from rich.table import Table as Shown

    for title, columns, rows, notes in tables:
        table = Shown(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD)
        for index, column in enumerate(columns):
            table.add_column(escape(column), justify="left" if index == 0 else "right", no_wrap=True)
        for row in rows:
            table.add_row(*map(escape, row))
        console = Console()
        needed = Measurement.get(console, console.options.update(max_width=1000), table).maximum
        Console(width=max(needed, console.width)).print(table)
        for note in notes:
            print(note)
    return DONE
