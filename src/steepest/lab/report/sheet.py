"""Tables: of a page, where each cell is a number and what lies behind it, and for spreadsheets and other programs."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from steepest.lab.report.wording import plain

Row = TypeVar("Row")  # results of a method
Cells = Sequence[object]  # None is left empty
# after these a spreadsheet takes the rest for a formula; the last four are their wide forms
_STARTS = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")

DOT = " \N{MIDDLE DOT} "


@dataclass(frozen=True)
class Cell:
    """What is read first, and the lines of small print under it."""

    text: str
    details: tuple[str, ...] = ()


@dataclass(frozen=True)
class Column(Generic[Row]):
    """A column of a table over methods; `note` says in a few words what its title leaves open."""

    title: str
    cell: Callable[[Row], Cell]
    note: str = ""


def sheet(head: Sequence[str], rows: Iterable[Cells]) -> str:
    """Head and rows as CSV; control characters in text are shown, and none of it is a formula."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(["" if cell is None else _written(cell) for cell in row] for row in rows)
    return text.getvalue()


def _written(cell: object) -> object:
    return str(cell).lower() if isinstance(cell, bool) else neutral(plain(cell)) if isinstance(cell, str) else cell


def neutral(text: str) -> str:
    """The text, with an apostrophe before what would be a formula: a name may come from a stranger.

    Examples:
        >>> neutral("=1+1"), neutral("muon")
        ("'=1+1", 'muon')
    """
    return f"'{text}" if text.startswith(_STARTS) else text
