"""What the drawing adds to a figure: panels, a key, cut lines, both grounds."""

from __future__ import annotations

import json
from io import BytesIO

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from steepest.lab.report.figure import Axis, Bar, Curve, Dots, Figure, Label, cut, evenly, named, pieces
from steepest.lab.report.palette import GUIDE, PAPER, styles
from steepest.lab.report.vega import panels_png, to_png, to_vega
from tests.lab.drawn import layers, rows

LOOKS = styles(("a", "b", "c"), baseline="a")
X, Y = Axis("x", 0.0, 4.0), Axis("y", 1.0, 10.0)


def bars(*names: str) -> Figure:
    drawn = tuple(Bar(LOOKS[name], -float(row), 0.8, 3.0, 1.0, "", name=name) for row, name in enumerate(names))
    return Figure("bars", " ".join(names), "", X, named(names), 60, bars=drawn, keyed=True)


def share(image: NDArray[np.int_], name: str) -> float:
    colour = [int(LOOKS[name].light[i : i + 2], 16) for i in (1, 3, 5)]
    return float((np.abs(image - colour).sum(-1) < 24).mean())


def test_each_panel_shows_its_own_rows_and_names() -> None:
    png = panels_png([bars("b"), bars("c")], columns=2, width=200)
    assert png == panels_png([bars("b"), bars("c")], columns=2, width=200)
    image = np.asarray(Image.open(BytesIO(png)).convert("RGB")).astype(int)
    left, right = image[:, : image.shape[1] // 2], image[:, image.shape[1] // 2 :]
    assert share(left, "b") > 0.05
    assert share(right, "c") > 0.05
    assert share(left, "c") == share(right, "b") == 0


def test_the_key_has_lines_and_marks_as_they_are_drawn() -> None:
    line = Curve("b", LOOKS["b"], (1.0, 2.0), (2.0, 3.0), (), (), bare=True)
    both = Curve("c", LOOKS["c"], (1.0, 2.0), (2.0, 3.0), (), ())
    dots = Dots("a", LOOKS["a"], "mean", (1.0,), (2.0,), ())
    lined, marked, texts = layers(Figure("k", "k", "", X, Y, 300, curves=(line, both), dots=(dots,), keyed=True))["key"]
    assert [row["text"] for row in lined["data"]["values"]] == ["b", "c"]
    assert [row["text"] for row in marked["data"]["values"]] == ["c", "a"]
    assert [row["text"] for row in texts["data"]["values"]] == ["b", "c", "a"]


def test_lines_and_bands_are_cut_at_the_ends_of_the_axis() -> None:
    log = Axis("y", 1.0, 100.0, logarithmic=True)
    [piece] = pieces([(0.0, 1000.0), (1.0, 10.0), (3.0, 0.1)], X, log)
    assert np.ravel(piece) == pytest.approx([0.5, 100.0, 1.0, 10.0, 2.0, 1.0])
    assert [len(piece) for piece in pieces([(0, 5), (1, 20), (2, 20), (3, 5)], X, Y)] == [2, 2]
    assert list(pieces([(0, 20), (1, 30)], X, Y)) == []
    assert [x for x, *_ in cut([(0.0, 5.0, 5.0), (1.0, 5.0, 15.0)], X, Y)] == [0.0, 0.5, 1.0]
    band = Curve("b", LOOKS["b"], (0.0, 1.0), (5.0, 10.0), (5.0, 5.0), (5.0, 15.0))
    area = rows(layers(Figure("f", "f", "", X, Y, 300, curves=(band,)))["area"])
    assert [(row["x"], row["low"], row["high"]) for row in area] == [(0, 5, 5), (0.5, 5, 10), (1, 5, 10)]


def test_one_specification_has_both_grounds() -> None:
    spec = to_vega(bars("b"))
    assert spec["params"] == [{"name": "dark", "value": False}]
    assert {row["light"]: row["dark"] for row in spec["layer"][0]["data"]["values"]} == {
        LOOKS["b"].light: LOOKS["b"].dark
    }
    assert all(paper in str(spec["config"]["background"]) for paper in PAPER.values())


def test_text_is_never_read_as_an_expression_and_is_drawn_as_it_is() -> None:
    name = """'] + "] + datum.x \\ </text>"""
    figure = Figure("t", "t", "", X, named([name]), 80, labels=(Label(1.0, 0.0, name, GUIDE),), above=name)
    drawn = layers(figure)
    assert [rows(drawn[layer])[0]["text"] for layer in ("names", "text")] == [name, name]
    axis = drawn["names"][0]["encoding"]["y"]["axis"]
    assert axis["labelExpr"] == f"{json.dumps([name])}[indexof([0.0], datum.value)]"
    assert to_png(figure).startswith(b"\x89PNG")


def test_even_ticks_are_round_and_few() -> None:
    assert [text for _, text in evenly(0.0, 1.05)] == ["0", "0.2", "0.4", "0.6", "0.8", "1"]
    assert [place for place, _ in evenly(-3.0, 12.0, most=4)] == [0.0, 5.0, 10.0]
    assert all(2 <= len(evenly(low, low + 10.0**power)) <= 7 for power in range(-6, 7) for low in (0.0, 0.3, 7.0))
