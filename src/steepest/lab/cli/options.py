"""What the commands share: how options are declared, read and checked."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from steepest.lab.cli.hidden import FORM, may_hold_password
from steepest.lab.cli.parser import Parser, first_example
from steepest.lab.tasks import PRESETS, TASKS, entry

LARGEST = 2**63 - 1  # what a 64-bit number holds
Commands: TypeAlias = "argparse._SubParsersAction[Parser]"  # argparse has no public name for what it returns
Value = bool | int | float | str


class _Methods:
    """The names of all methods, looked up when a help text is printed: nothing else waits for the lab."""

    def __str__(self) -> str:
        from steepest.lab.methods import METHODS

        return ", ".join(sorted(METHODS))


def naming_methods(argument: argparse.Action) -> None:
    """Let the help of an argument name all methods where it says %(known)s."""
    vars(argument)["known"] = _Methods()


class UsageError(Exception):
    """What was asked for cannot be meant."""


@contextlib.contextmanager
def checking_usage() -> Generator[None]:
    """Around what only reads options: there, a value that is refused was a wrong option, not a fault of the program."""
    try:
        yield
    except (ValueError, TypeError, FileNotFoundError) as wrong:
        raise UsageError(str(wrong)) from wrong


def racers(task: str) -> tuple[str, ...]:
    """The methods that race on a task unless one says otherwise."""
    return entry(task).methods


def add_command(
    commands: Commands,
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
    examples: str,
    *,
    saves: bool = False,
) -> Parser:
    """Declare a command.

    Args:
        commands: All of them.
        name: What one types.
        run: Takes the options, and returns the exit code.
        summary: What it does, in a line.
        examples: Shown at the end of its help. The first one of this command, with what stands before it, is shown
            when words are missing or wrong: it runs as it stands, and soon ends.
        saves: Whether what it has done so far outlives an interruption, and the same command goes on from there.
    """
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.example = first_example(examples, of=parser.prog)
    parser.saves = saves
    parser.set_defaults(command=run, parser=parser)
    return parser


def add_task(parser: argparse.ArgumentParser) -> None:
    """Declare which task at which size on which data."""
    taken = dict.fromkeys(one.data for one in TASKS.values() if one.data)
    data = [f"{kind} for {', '.join(name for name, one in TASKS.items() if one.data == kind)}" for kind in taken]
    parser.add_argument("--task", default="text", help=f"{', '.join(TASKS)}; default: %(default)s")
    parser.add_argument("--preset", default="demo", help=f"{', '.join(PRESETS)}; default: %(default)s")
    parser.add_argument("--data", type=path, metavar="PATH", help="; ".join(data))


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


def count(text: str, *, most: int = LARGEST) -> int:
    """A whole number of at least 1."""
    if not _is_digits(text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    if int(text) > most:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1 and at most {most:,}")
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


def assignment(text: str) -> tuple[str, Value]:
    """NAME=VALUE; the value is a number or a truth value if it reads like one."""
    name, equals, value = text.partition("=")
    if not equals or not name or not value:
        raise argparse.ArgumentTypeError(f"{text!r} must look like lr=0.02")
    try:
        parsed = json.loads(value)
    except ValueError:
        parsed = value
    return name, parsed if isinstance(parsed, bool | int | float) else value


def by_method(assignments: Sequence[tuple[str, Value]]) -> Mapping[str, dict[str, Value]]:
    """Options of each method, from METHOD.OPTION=VALUE."""
    found: dict[str, dict[str, Value]] = {}
    for name, value in assignments:
        method, dot, option = name.rpartition(".")
        if not dot or not method or not option:
            raise ValueError(f"--set {name}={value}: write METHOD.OPTION=VALUE, for example muon.lr=0.02.")
        found.setdefault(method, {})[option] = value
    return found
