"""The one check of options: what it takes, and that what it refuses is named with value, expectation and remedy."""

import re
from fractions import Fraction

import numpy as np
import pytest
import torch

from steepest.checks import check_keywords, choice, flag, number, optional, pair, shown, whole
from tests.cases import cases

PART = number(high=1.0)

REFUSED = [
    (number(), "1e-3", TypeError, "x must be a number, got '1e-3'. Write x=0.001, without quotes"),
    (number(), None, TypeError, "x must be a number, got None. Leave it out for the default."),
    (number(), [0.1], TypeError, "x must be a number, got [0.1]."),
    (number(), True, TypeError, "x must be a number, got True."),
    (number(), 1j, TypeError, "x must be a number, got 1j."),
    (number(), torch.ones(2), TypeError, "x must be a number, got a tensor of shape (2,)."),
    (number(), torch.tensor(0.5), TypeError, "x must be a number, got tensor(0.5000). Write .item() of it."),
    (number(), float("nan"), ValueError, "x must be finite and at least 0, got nan."),
    (number(), np.float64("nan"), ValueError, "x must be finite and at least 0, got "),
    (number(), 10**400, ValueError, "x must be finite and at least 0, got an integer of 1329 bits."),
    (number(above=True), 0, ValueError, "x must be finite and above 0, got 0."),
    (PART, 1.0, ValueError, "x must be in [0, 1), got 1.0."),
    (number(high=1.0, up_to=True), 1.5, ValueError, "x must be in [0, 1], got 1.5."),
    (whole(1), 2.0, TypeError, "x must be a whole number, got 2.0. Write x=2."),
    (whole(1), 0, ValueError, "x must be at least 1, got 0."),
    (flag, 1, TypeError, "x must be True or False, got 1."),
    (choice(["full", "none"]), "ful", ValueError, "Unknown x 'ful': did you mean 'full'? Valid: full, none."),
    (
        choice(["full", "none"]),
        torch.ones(2),
        TypeError,
        "x must be one of 'full', 'none', got a tensor of shape (2,).",
    ),
    (pair(PART, "two parts"), 0.9, TypeError, "x must be two parts, got 0.9."),
    (pair(PART, "two parts"), (0.9, 2), ValueError, "x must be two parts, got (0.9, 2)."),
]


@cases("option", range(len(REFUSED)))
def test_a_refusal_names_option_value_and_expectation(option):
    check, value, error, message = REFUSED[option]
    with pytest.raises(error, match=re.escape(message)):
        check("x", value)
    owned = message if not message.startswith("Unknown") else message.replace("Unknown", "Muon: Unknown", 1)
    with pytest.raises(error, match=re.escape(owned)):
        check("Muon: x", value)


def test_numbers_come_back_plain():
    given = (3, 0.5, np.float32(0.25), np.int64(2), Fraction(1, 4))
    taken = [number()("x", value) for value in given]
    assert taken == [3.0, 0.5, 0.25, 2.0, 0.25]
    assert {type(value) for value in taken} == {float}
    assert type(whole(0)("x", np.int64(4))) is int
    assert optional(whole(0))("x", None) is None
    assert number(-np.inf, infinite=True)("x", -np.inf) == -np.inf
    assert pair(PART, "")("x", [0.5, 0.25]) == (0.5, 0.25)


def test_values_are_shown_on_one_short_line():
    assert shown("x" * 1000).endswith("... (of type str)")
    assert "\n" not in shown(np.zeros((3, 3)))
    assert shown([10**5000]) == "[an integer of 16610 bits]"
    assert shown({3: 10**5000}) == "an object of type dict"
    assert shown((1,)) == "(1,)"
    assert shown([1] * 1000).endswith("... (of type list)")


def test_a_keyword_that_is_none_is_answered():
    with pytest.raises(TypeError, match=r"^Muon has no option 'rte'\. Did you mean 'rate'\?$"):
        check_keywords("Muon", ["rte"], ["rate", "decay"], {})
    with pytest.raises(TypeError, match=r"^Muon has no option 'zzz'\. Options are rate, decay\.$"):
        check_keywords("Muon", ["rate", "zzz"], ["rate", "decay"], {})
    with pytest.raises(TypeError, match=r"^Muon has no option 'speed'\. Write rate=\.$"):
        check_keywords("Muon", ["speed"], ["rate", "decay"], {"speed": "Write rate=."})
