"""The table of a report: one line for each method, each cell a number and what lies behind it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

Row = TypeVar("Row")  # results of a method

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
