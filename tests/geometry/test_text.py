"""A norm or view stands in a group as text: the text builds it again, and nothing else."""

from dataclasses import dataclass

import pytest
import torch

from steepest import Scaled, Schatten, Sign, Spectral, View, minimax
from steepest.geometry import NORMS, get_norm
from steepest.geometry.text import Textual, built, text_of
from tests.cases import cases

SEVERAL = [
    *(kind() for kind in NORMS.values()),
    Spectral(scale="none", coefficients="cubic12", dtype=torch.float32),
    Spectral(coefficients=minimax(0.01, 5)),
    Spectral(coefficients=[(1.0, 0.0, 0.0)]),
    Schatten(p=3.0),
    Scaled(Scaled(Sign(), "inverse_fan_in"), 2.5),
]


@cases("norm", SEVERAL)
def test_the_text_of_a_norm_builds_it(norm):
    text = text_of(norm)
    assert type(text) is str
    assert get_norm(text) == norm
    assert norm == text
    assert text == norm
    assert hash(norm) == hash(text)


@pytest.mark.parametrize("view", [View(), View(split=(6, 2, 4), heads=(3, 1, 2)), View(groups=4, transposed=True)])
def test_the_text_of_a_view_builds_it(view):
    assert built(text_of(view), {"View": View}) == view
    assert view != View(groups=7)


@cases(
    "text",
    [
        "Spectral(scale='orig')",
        "os.system('true')",
        "__import__('os').getcwd()",
        "Spectral(scale=print)",
        "Spectral(*[1])",
        "Spectral(**{})",
        "Spectral('none')",
        "Spectral(dtype=torch.nn)",
        "Spectral(scale=open('x'))",
        "((",
        "Spectral(" * 5000,
    ],
)
def test_other_text_is_refused_and_not_run(text):
    with pytest.raises(ValueError, match=r"known are|Unknown scale"):
        get_norm(text)


def test_what_prints_otherwise_has_its_name_as_text():
    class Plain:
        pass

    @dataclass
    class Local(Textual):
        number: int = 3

    assert text_of(Plain()) == "Plain(...)"
    assert text_of(Local()) == "Local(number=3)"
