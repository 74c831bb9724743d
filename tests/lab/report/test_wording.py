"""Numbers and names as a reader sees them."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steepest.lab.report import wording
from steepest.lab.report.statistics import Interval, Ratio, Summary
from tests.cases import cases


def spaced(text: str) -> str:
    return re.sub(r"\s", " ", text)


@given(name=st.text(max_size=60))
def test_names_keep_what_can_be_seen_and_show_what_cannot(name: str) -> None:
    text = wording.plain(name)
    assert len(text) == len(name)
    assert text.isprintable()
    assert all(shown in (char, "\N{REPLACEMENT CHARACTER}") for char, shown in zip(name, text, strict=True))
    assert len(wording.shortened(name)) <= 20


def test_short_names_stay_whole() -> None:
    assert wording.shortened("newton-muonmax-momo") == "newton-muonmax-momo"
    assert wording.shortened("newton-muonmax-momo-x") == "newton-muonmax-momo…"


@pytest.mark.slow
@cases(
    "text, expected",
    [
        (wording.rate(0.0316227766), "0.03162"),
        (wording.rate(3e-5), "3e-05"),
        (wording.decades(1.618), "1.62"),
        (wording.decades(0.0046, more=True), "≥ 0.0046"),
        (wording.decades(0.0), "0"),
        (wording.listed([]), ""),
        (wording.listed(["a"]), "a"),
        (wording.listed(["a", "b", "c"]), "a, b and c"),
        (wording.counted(1, "run"), "1 run"),
        (wording.counted(1000, "run"), "1,000 runs"),
        (wording.loss(1.7312), "1.731"),
        (wording.loss(0.01234), "0.0123"),
        (wording.loss(0.00123), "0.0012"),
        (wording.loss(12345.0), "1.2e+04"),
        (wording.loss(0.0), "0.000"),
        (wording.loss(0.0078, like=1.7), "0.008"),
        (wording.signed(-0.114), "−0.114"),
        (wording.signed(0.114), "+0.114"),
        (wording.spread(None), "–"),
        (wording.spread(Summary(1.7, None, 1)), "1.700"),
        (wording.spread(Summary(1.7, 0.0123, 3)), "1.700 ± 0.012"),
        (wording.between(Interval(0.1, 0.2)), "0.100 to 0.200"),
        (wording.between(Interval(-0.1, 0.2)), "−0.100 to +0.200"),
        (wording.between(Interval(0.0021, 0.1353)), "0.002 to 0.135"),
        (wording.between(Interval(-0.00001, 0.0017)), "−0.0000 to +0.0017"),
        (wording.milliseconds(12.34), "12.3 ms"),
        (wording.milliseconds(142.4), "142 ms"),
        (wording.percent(0.594), "59%"),
        (wording.percent(47.74), "48 times"),
        (wording.share(Ratio(0.5, None, 1, 0)), "50%"),
        (wording.share(Ratio(0.5, None, 3, 1)), "at least 50%"),
        (wording.p_value(0.0123), "p = 0.012"),
        (wording.p_value(0.0), "p < 0.001"),
        (wording.duration(0.4), "0.4 s"),
        (wording.duration(119.4), "119 s"),
        (wording.duration(245), "4 min 05 s"),
        (wording.duration(7620), "2 h 07 min"),
        (wording.size(512), "512 B"),
        (wording.size(12_345_678), "12.3 MB"),
        (wording.size(412_000_000), "412 MB"),
        (wording.size(5 * 10**15), "5000 TB"),
        (wording.possessive("adamw"), "adamw’s"),
    ],
)
def test_wording(text: str, expected: str) -> None:
    assert spaced(text) == expected
