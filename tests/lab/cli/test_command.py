"""What a typed record makes of a command line, and back."""

import functools
import shlex
from typing import Annotated, Literal

import pytest

from steepest.lab.cli import _parser
from steepest.lab.cli.command import Arg, Command, Group, add_commands, made, spelled_out
from steepest.lab.cli.options import AsJson, Assigned, Assignment, Count, Names, Number, OnThreads, count
from steepest.lab.cli.parser import Parser
from tests.cases import cases
from tests.lab.cli.test_numbers import commands


class Brew(Command, OnThreads, AsJson):
    """Make tea, and
    say so.

    examples:
      steepest tea brew green --cups 2

    Water comes first.
    """

    saves = True

    kind: Annotated[str, Arg("of leaves", "KIND", "place")]
    cups: Annotated[Count, Arg("to fill", "N")]
    guests: Annotated[Names, Arg("who drinks")] = ("all",)
    times: Annotated[tuple[Count, ...], Arg("in minutes; default: 3", "T")] = ()
    add: Annotated[tuple[Assigned, ...], Arg(how="repeated")] = ()
    size: Annotated[Literal["small", "large"], Arg()] = "small"
    degrees: Annotated[Annotated[int, functools.partial(count, least=60)] | None, Arg()] = None
    warm_pot: Annotated[bool, Arg("first")] = True
    green: Annotated[Number | None, Arg(one_of="colour")] = None
    black: Annotated[Number | None, Arg(one_of="colour")] = None

    def run(self):
        return self.cups


@pytest.fixture
def parser():
    parser = Parser(prog="steepest", allow_abbrev=False)
    add_commands(parser, {"tea": Group("Hot drinks.", {"brew": Brew})})
    return parser


def read(parser, words):
    options = parser.parse_args(shlex.split(words))
    return made(options.command, options)


def test_defaults_are_those_of_the_class(parser):
    found = read(parser, "tea brew green --cups 2 --green 1")
    assert found == Brew(kind="green", cups=2, green=1.0)
    assert (found.guests, found.times, found.add, found.size, found.warm_pot) == (("all",), (), (), "small", True)
    assert (found.threads, found.json, found.degrees, found.run()) == (1, False, None, 2)


def test_words_are_read_as_the_types_say(parser):
    words = "--guests me,you --times 3 5 --add milk=1 --add sugar=false --size large --degrees 80 --no-warm-pot --json"
    found = read(parser, f"tea brew green --cups 2 --green 1 {words} --threads 4")
    assert (found.guests, found.times, found.size, found.degrees) == (("me", "you"), (3, 5), "large", 80)
    assert found.add == (Assignment("milk", 1), Assignment("sugar", False))
    assert (found.warm_pot, found.json, found.threads) == (False, True, 4)


@cases(
    "words, text",
    [
        ("", "the following arguments are required: KIND, --cups"),
        ("green --cups 2", "one of the arguments --green --black is required"),
        ("green --cups 2 --green 1 --black 1", "not allowed with argument"),
        ("green --cups none --green 1", "'none' must be a whole number of at least 1"),
        ("green --cups 2 --green 1 --degrees 59", "'59' must be a whole number of at least 60"),
        ("green --cups 2 --green 1 --size big", "invalid choice: 'big'"),
    ],
)
def test_what_the_types_do_not_allow_is_refused(parser, capsys, words, text):
    with pytest.raises(SystemExit, match="2"):
        read(parser, f"tea brew {words}")
    told = capsys.readouterr().err
    assert text in told
    assert told.endswith("example:\n  steepest tea brew green --cups 2\n")


def test_the_docstring_is_the_help_and_own_options_come_first(parser, capsys):
    with pytest.raises(SystemExit, match="0"):
        parser.parse_args(["tea", "brew", "--help"])
    told = capsys.readouterr().out
    assert "\n\nMake tea, and say so.\n" in told
    assert told.endswith("\n\nexamples:\n  steepest tea brew green --cups 2\n\nWater comes first.\n")
    places = [told.index(f"\n  {word}") for word in ("--cups", "--black", "--threads", "--json")]
    assert places == sorted(places)
    for text in (
        "to fill\n",
        "who drinks\n",
        "in minutes; default: 3\n",
        "default: small\n",
        "CPU threads; default: 1\n",
    ):
        assert text in told
    with pytest.raises(SystemExit, match="0"):
        parser.parse_args(["tea", "--help"])
    assert "    brew      make tea, and say so\n" in capsys.readouterr().out


def test_a_command_can_be_spelled_out():
    assert spelled_out(Brew(kind="green", cups=2)) == [
        *("green", "--cups", "2", "--guests", "all", "--size", "small", "--threads", "1")
    ]
    whole = Brew(kind="green", cups=2, times=(3, 5), add=(Assignment("sugar", True),), warm_pot=False, black=0.5)
    words = "green --cups 2 --guests all --times 3 5 --add sugar=true --no-warm-pot --black 0.5"
    assert shlex.join(spelled_out(whole, but=("size", "threads"))) == words


def test_every_example_is_read_and_spelled_out_and_read_again():
    parser, seen = _parser(), set()
    for own in commands(parser).values():
        for line in (own.epilog or "").replace("\\\n", "").splitlines():
            if line.startswith("  steepest "):
                options = parser.parse_args(shlex.split(line)[1:])
                command = made(options.command, options)
                again = own.__class__.parse_args(options.parser, spelled_out(command))
                assert made(options.command, again) == command
                seen.add(options.command)
    assert len(seen) == sum(bool(own.get_default("command")) for own in commands(parser).values())
