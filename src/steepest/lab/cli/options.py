"""What the commands share: how words are read and checked, and options that several commands have."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

from steepest.lab.cli.command import Arg, Options
from steepest.lab.cli.hidden import FORM, may_hold_password
from steepest.lab.errors import Failure, UsageError
from steepest.lab.tasks import PRESETS, TASKS, entry

if TYPE_CHECKING:
    from steepest.lab.tasks.task import Task

LARGEST = 2**63 - 1  # what a 64-bit number holds
Value = bool | int | float | str
_DATA = "; ".join(
    f"{kind} for {', '.join(name for name, one in TASKS.items() if one.data == kind)}"
    for kind in dict.fromkeys(one.data for one in TASKS.values() if one.data)
)

_TRACKS = "; ".join(
    f"{', '.join(own for own in (*one.shapes, *one.tracks) if not own.endswith('-rehearsal'))} of {name}"
    for name, one in TASKS.items()
    if one.shapes or one.tracks
)


@contextlib.contextmanager
def checking_usage() -> Generator[None]:
    """Around what only reads options: there, a value that is refused was a wrong option, not a fault of the program."""
    try:
        yield
    except (Failure, UsageError):
        raise
    except (ValueError, TypeError, FileNotFoundError) as wrong:
        raise UsageError(str(wrong)) from wrong


def racers(task: str) -> tuple[str, ...]:
    """The methods that race on a task unless one says otherwise."""
    return entry(task).methods


class Assignment(NamedTuple):
    """An option of a method, and its value."""

    name: str
    value: Value

    def __str__(self) -> str:
        """As it is typed."""
        return f"{self.name}={written(self.value)}"


def written(value: Value) -> str:
    """A value as it is typed."""
    return json.dumps(value) if isinstance(value, bool) else str(value)


def names(text: str) -> list[str]:
    """Names with commas between them."""
    found = [name.strip() for name in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(f"{text!r} has an empty name; write them as adamw,muon")
    return found


def path(text: str) -> Path:
    """A file or a directory, and no storage by mistake."""
    if may_hold_password(text):
        raise argparse.ArgumentTypeError(
            f"what was given looks like the URL of a database, {FORM}, and is not repeated; a path with '@' in it is "
            "written as ./PATH"
        )
    return Path(text)


def count(text: str, *, least: int = 1, most: int = LARGEST) -> int:
    """A whole number of at least 1, or within other bounds."""
    if not _is_digits(text) or not least <= int(text) <= most:
        above = _is_digits(text) and int(text) > most
        bound = f"{least} and at most {most:,}" if above else f"{least}"
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least {bound}")
    return int(text)


few = functools.partial(count, most=10_000)  # of what is made at once: seeds, workers, threads


def seed(text: str) -> int:
    """Where random numbers start from."""
    if not _is_digits(text) or int(text) > LARGEST:
        raise argparse.ArgumentTypeError(f"seed must be a whole number from 0 to 2^63 - 1, got {text!r}")
    return int(text)


def number(text: str, *, least: float = -math.inf, above: float = -math.inf) -> float:
    """A finite number; what else is asked of it, who takes it says.

    Args:
        text: As typed.
        least: It may not be lower.
        above: It must be higher.
    """
    try:
        value = float(text) if text.isascii() and "_" not in text else math.nan
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < least or value <= above:
        bound = f" of at least {least:g}" if least > -math.inf else f" above {above:g}" if above > -math.inf else ""
        raise argparse.ArgumentTypeError(f"{text!r} must be a finite number{bound}")
    return value


positive = functools.partial(number, above=0.0)
not_negative = functools.partial(number, least=0.0)


def _is_digits(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 40


def parsed(text: str) -> Value:
    """A number or a truth value if it reads like one, otherwise the text."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, bool | int | float) else text


def assignment(text: str) -> Assignment:
    """NAME=VALUE."""
    name, equals, value = text.partition("=")
    if not equals or not name or not value:
        raise argparse.ArgumentTypeError(f"{text!r} must look like lr=0.02")
    return Assignment(name, parsed(value))


def by_method(assignments: Sequence[Assignment]) -> Mapping[str, dict[str, Value]]:
    """Options of each method, from METHOD.OPTION=VALUE."""
    found: dict[str, dict[str, Value]] = {}
    for name, value in assignments:
        method, dot, option = name.rpartition(".")
        if not dot or not method or not option:
            raise ValueError(f"--set {name}={value}: write METHOD.OPTION=VALUE, for example muon.lr=0.02.")
        found.setdefault(method, {})[option] = value
    return found


Count = Annotated[int, count]
Few = Annotated[int, few]
Seed = Annotated[int, seed]
Number = Annotated[float, number]
Names = Annotated[tuple[str, ...], names]
File = Annotated[Path, path]
Device = Annotated[Literal["auto", "cpu", "cuda"], Arg("where; auto: cuda if it is here")]
Assigned = Annotated[Assignment, assignment]


class AsJson(Options):
    """Whether people or programs read what a command prints."""

    json: Annotated[bool, Arg("print the result as JSON")] = False


def found_device(name: str) -> str:
    """The kind of device behind --device.

    Raises:
        UsageError: If this machine has no such device.
    """
    from steepest.lab.runs.device import find_device

    return find_device(name).type


class OnThreads(Options):
    """Of torch."""

    threads: Annotated[Few, Arg("CPU threads", "N")] = 1


class OnTask(Options):
    """Which task at which size on which data."""

    task: Annotated[str, Arg(", ".join(TASKS))] = "text"
    preset: Annotated[str, Arg(f"{', '.join(PRESETS)}, another shape or a track: {_TRACKS}")] = "demo"
    data: Annotated[File | None, Arg(_DATA, "PATH")] = None

    def load(self) -> Task:
        """The task, with its data.

        Raises:
            ValueError: If there is no such task, preset or data.
        """
        from steepest.lab.tasks import make_task

        return make_task(self.task, self.preset, data=self.data)
