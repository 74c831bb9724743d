"""Commands as typed records: from one class come the parser of a command, its help, and the call.

The fields are the options: type, default, and in `Annotated` how a word is read and what the help says. The docstring
is the rest of the help: what the command does, then examples, of which the first of this command, with what stands
before it, is shown when words are missing or wrong; it runs as it stands, and soon ends.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Annotated, Any, ClassVar, Literal, TypeVar, dataclass_transform, get_args, get_origin, get_type_hints

from steepest.lab.cli.parser import Parser, first_example

Tree = Mapping[str, "type[Command] | Group"]
Own = TypeVar("Own", bound="Command")


@dataclass(frozen=True)
class Arg:
    """What the help says of a field. Words and numbers that are defaults are added, unless it tells a default itself.

    Args:
        help: %(known)s in it are the names of all methods.
        metavar: Stands for the value.
        how: "named" by an option, which may be "repeated", or by its "place" among the words.
        one_of: A name that fields share of which exactly one must be given.
    """

    help: str = ""
    metavar: str | None = None
    how: Literal["named", "repeated", "place"] = "named"
    one_of: str | None = None


@dataclass_transform(frozen_default=True, kw_only_default=True)
class Options:
    """Fields that commands share; `Command` is one of its kind that can be run."""

    def __init_subclass__(cls) -> None:
        told = cls.__doc__ or ""
        dataclass(frozen=True, kw_only=True)(cls)
        cls.__doc__ = told  # without one, as under -OO, a dataclass writes one of its own


class Command(Options, ABC):
    """A command.

    Its own options come first in the help, then those of its other bases in their order.
    """

    saves: ClassVar[bool] = False  # whether what it has done outlives an interruption, and the same command goes on

    @abstractmethod
    def run(self) -> int:
        """Do it; returns the exit code."""


@dataclass(frozen=True)
class Group:
    """Commands behind a common word.

    Args:
        summary: What they do, in a line.
        parts: By name.
    """

    summary: str
    parts: Tree


class _Methods:
    """The names of all methods, looked up when a help text is printed: nothing else waits for the lab."""

    def __str__(self) -> str:
        from steepest.lab.methods import METHODS

        return ", ".join(sorted(METHODS))


def add_commands(parser: Parser, tree: Tree) -> None:
    """Declare commands.

    Args:
        parser: Of what stands before them.
        tree: All of them, by name.
    """
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, one in tree.items():
        summary, _, examples = (one.summary if isinstance(one, Group) else inspect.getdoc(one) or "").partition("\n\n")
        summary = " ".join(summary.split())
        own: Parser = commands.add_parser(
            name,
            help=f"{summary[:1].lower()}{summary[1:].removesuffix('.')}",
            description=summary,
            epilog=examples or None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if isinstance(one, Group):
            add_commands(own, one.parts)
            continue
        own.example = first_example(examples, of=own.prog)
        own.saves = one.saves
        own.set_defaults(command=one, parser=own)
        _add_fields(own, one)


def made(command: type[Own], words: argparse.Namespace) -> Own:
    """The command with the options that were read."""
    values = {field.name: getattr(words, field.name) for field in dataclasses.fields(command)}
    return command(**{name: tuple(one) if isinstance(one, list) else one for name, one in values.items()})


def spelled_out(command: Command, *, but: Collection[str] = ()) -> list[str]:
    """The words that ask for a command once more, with every option that is not None; `made` reads them back.

    Args:
        command: A whole one.
        but: Fields that are left out.
    """
    first: list[str] = []
    words: list[str] = []
    defaults = {field.name: field.default for field in dataclasses.fields(command)}
    for name, hint in _fields(type(command)).items():
        value, arg, option = getattr(command, name), _arg(hint), _option(name)
        if value is None or name in but:
            continue
        if arg.how == "place":
            first += map(str, value) if isinstance(value, tuple) else [str(value)]
        elif isinstance(value, bool):
            words += [] if value == defaults[name] else [option if value else _option(f"no_{name}")]
        elif arg.how == "repeated":
            words += [word for one in value for word in (option, str(one))]
        elif "nargs" in _reading(hint):
            words += [option, *map(str, value)] if value else []
        else:
            words += [option, ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return [*first, *words]


def _fields(command: type[Options]) -> dict[str, Any]:
    """Annotations by name, in the order of the help."""
    hints = get_type_hints(command, include_extras=True)
    known = {field.name for field in dataclasses.fields(command)}  # pyright: ignore[reportArgumentType] - it is one
    return {name: hints[name] for base in command.__mro__ for name in inspect.get_annotations(base) if name in known}


def _add_fields(parser: Parser, command: type[Command]) -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(command)}
    groups: dict[str, Any] = {}
    for name, hint in _fields(command).items():
        arg, place = _arg(hint), parser
        if arg.one_of is not None:
            if arg.one_of not in groups:
                groups[arg.one_of] = parser.add_mutually_exclusive_group(required=True)
            place = groups[arg.one_of]
        word = name if arg.how == "place" else _option(name)
        vars(place.add_argument(word, **_declared(arg, hint, defaults[name])))["known"] = _Methods()


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _declared(arg: Arg, hint: Any, default: Any) -> dict[str, Any]:
    """What argparse is told of a field."""
    plain = type(default) in (int, float, str)
    told = "default: %(default)s" if plain and "default" not in arg.help else ""
    shown = {"help": "; ".join(filter(None, (arg.help, told)))}
    if isinstance(default, bool):
        return {**shown, "action": argparse.BooleanOptionalAction if default else "store_true", "default": default}
    shown |= {"metavar": arg.metavar, **_reading(hint)}
    if arg.how == "place":
        return shown
    required = default is dataclasses.MISSING
    if arg.how == "repeated":
        return {
            **shown,
            "nargs": None,
            "action": "append",
            "required": required,
            "default": [] if required else [*default],
        }
    return {**shown, "required": required, "default": None if required else default}


def _arg(hint: Any) -> Arg:
    return next(note for note in get_args(hint) if isinstance(note, Arg))


def _reading(hint: Any) -> dict[str, Any]:
    """What argparse is told of a type: how a word is read, among which it is, and whether there are several."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        readers = [note for note in inner[1:] if callable(note)]
        return {"type": readers[0]} if readers else _reading(inner[0])
    if origin is Literal:
        return {"choices": inner}
    if origin is tuple:
        return {"nargs": "+", **_reading(inner[0])}
    if NoneType in inner:
        return _reading(next(one for one in inner if one is not NoneType))
    return {}
