"""Every option that takes a number: nothing that is no number gets in, in any command."""

import argparse
from pathlib import Path

import pytest

from steepest.lab.cli import _parser
from steepest.lab.cli.options import LARGEST, count, few, not_negative, number, positive, seed
from tests.cases import cases

NO_NUMBERS = ("nan", "NaN", "inf", "-inf", "1e999", "", " ", "one", "1_0", "٣", "9" * 5000)


def commands(parser, words=()):
    """Every command with its parser."""
    found = {words: parser}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                found |= commands(inner, (*words, name))
    return found


OPTIONS = {
    f"{' '.join(words)} {max(action.option_strings, default=action.dest, key=len)}": action.type
    for words, parser in commands(_parser()).items()
    for action in parser._actions
    if action.type is not None
}


def understood(kind, text):
    try:
        return kind(text)
    except (argparse.ArgumentTypeError, ValueError):
        return None


def takes_numbers(kind):
    return any(isinstance(understood(kind, text), int | float) for text in ("200", "0.5"))


@cases("option", [name for name, kind in OPTIONS.items() if takes_numbers(kind)])
def test_an_option_with_a_number_takes_nothing_else(option):
    for text in NO_NUMBERS:
        with pytest.raises(argparse.ArgumentTypeError) as refused:
            OPTIONS[option](text)
        assert "must " in str(refused.value)


def test_every_option_with_a_number_is_checked_here():
    numbers = {name for name, kind in OPTIONS.items() if takes_numbers(kind)}
    assert {"critical-batch branch --tolerance", "theory spike --kappa", "train --seed", "race --workers"} <= numbers
    assert not {kind for kind in OPTIONS.values() if kind in (int, float, Path)}


@pytest.mark.parametrize("text", ["nan,1", "inf", "2,-inf", "1e999"])
def test_losses_are_finite(text):
    with pytest.raises(argparse.ArgumentTypeError, match="must be losses"):
        OPTIONS["critical-batch measure --targets"](text)


def test_bounds():
    assert (count("7"), few("10000"), seed("0"), seed(str(LARGEST))) == (7, 10_000, 0, LARGEST)
    assert (number("-1e3"), positive("1e-300"), not_negative("0")) == (-1000.0, 1e-300, 0.0)
    for kind, text, message in (
        (few, "10001", "at most 10,000"),
        (seed, str(LARGEST + 1), "from 0 to 2"),
        (positive, "0", "must be a finite number above 0"),
        (not_negative, "-1", "must be a finite number of at least 0"),
    ):
        with pytest.raises(argparse.ArgumentTypeError, match=message):
            kind(text)
