"""Figures as plain data, and as they are drawn."""

from __future__ import annotations

import json
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from steepest.lab.report import wording
from steepest.lab.report.figure import Figure
from steepest.lab.report.palette import PAPER, styles
from steepest.lab.report.vega import to_png, to_vega
from steepest.lab.studies.race.figures import KEYS, figures
from steepest.lab.studies.race.plan import RaceStudy
from steepest.lab.studies.race.results import read_race
from steepest.lab.studies.records import read_study
from tests.lab.drawn import layers, rows
from tests.lab.synthetic import HOSTILE, Pace, loss_at, write_scenario, write_study


def drawn(study_dir: Path, paces: dict[str, Pace], **changes: Any) -> dict[str, Figure]:
    return {
        figure.key: figure
        for figure in figures(read_race(read_study(write_study(study_dir, paces, **changes), RaceStudy)))
    }


def scenario(study_dir: Path, name: str) -> dict[str, Figure]:
    return {figure.key: figure for figure in figures(read_race(read_study(write_scenario(study_dir, name), RaceStudy)))}


def test_there_are_four_figures_each_with_a_known_key(tmp_path: Path) -> None:
    assert list(scenario(tmp_path / "a", "clear")) == ["difference", "loss-steps", "loss-tokens", "loss-time"]
    assert "loss-samples" in scenario(tmp_path / "b", "many")
    assert set(scenario(tmp_path / "c", "many")) <= set(KEYS)


def test_curves_are_means_in_a_band_from_the_lowest_to_the_highest_seed(tmp_path: Path) -> None:
    pace = Pace()
    curve = drawn(tmp_path, {"adamw": pace})["loss-steps"].curves[0]
    assert curve.x == tuple(range(0, 151, 10))
    exact = [loss_at(pace, int(step), 0) for step in curve.x]
    assert np.ptp(np.array(curve.y) - exact) < 1e-9  # all seeds are the same curve, shifted
    assert all(low < mean < high for low, mean, high in zip(curve.low, curve.y, curve.high, strict=True))


def test_one_seed_has_no_band_and_no_figure_of_a_single_difference(tmp_path: Path) -> None:
    shown = scenario(tmp_path, "one-seed")
    assert all(curve.low == () for curve in shown["loss-steps"].curves)
    assert "difference" not in shown


def test_a_curve_ends_where_its_first_seed_diverges(tmp_path: Path) -> None:
    figure = scenario(tmp_path, "diverged")["loss-steps"]
    curve = figure.curves[-1]
    assert (curve.name, curve.x[-1]) == ("sgd", 60)
    assert "sgd ×" in [label.text for label in figure.labels]
    assert "×: a run diverged there." in figure.caption


def test_runs_on_their_way_are_drawn_only_before_any_has_ended(tmp_path: Path) -> None:
    going = drawn(tmp_path / "going", {"adamw": Pace(stops={0: 37, 1: 84})}, seeds=(0, 1))["loss-steps"]
    assert (going.curves[0].x[-1], going.labels[0].text) == (30, "adamw …")
    assert "…: no run has ended yet." in going.caption
    ended = drawn(tmp_path / "ended", {"adamw": Pace(stops={0: 37})}, seeds=(0, 1))["loss-steps"]
    assert ended.curves[0].x[-1] == 150


def test_nothing_is_drawn_from_nothing(tmp_path: Path) -> None:
    assert drawn(tmp_path, {"adamw": Pace(absent=(0,))}, seeds=(0,)) == {}


def test_the_target_is_drawn_and_said(tmp_path: Path) -> None:
    own = drawn(tmp_path / "own", {"adamw": Pace(), "muon": Pace()})["loss-time"]
    assert own.rule is not None
    assert (own.rule.axis, own.rule.text) == ("y", "target 1.723")
    given = drawn(tmp_path / "given", {"adamw": Pace(), "muon": Pace()}, target=1.9)["loss-steps"]
    assert given.rule is not None
    assert given.rule.value == 1.9
    assert "Dotted: the target, set by the study." in given.caption


def test_refused_races_show_curves_and_no_comparison(tmp_path: Path) -> None:
    assert list(scenario(tmp_path, "unequal")) == ["loss-steps", "loss-tokens", "loss-time"]


def test_losses_over_decades_are_drawn_on_a_logarithmic_axis(tmp_path: Path) -> None:
    small = drawn(tmp_path / "small", {"adamw": Pace(end=0.02), "muon": Pace(end=0.03)})["loss-steps"]
    assert small.y.logarithmic
    assert 0 < small.y.low < 0.02 < small.y.high
    assert not drawn(tmp_path / "large", {"adamw": Pace()})["loss-steps"].y.logarithmic
    y = layers(small)["names"][0]["encoding"]["y"]
    assert (y["scale"]["type"], y["scale"]["domain"]) == ("log", [small.y.low, small.y.high])
    assert y["axis"]["values"] == [place for place, _ in small.y.ticks or ()]
    assert to_png(small).startswith(b"\x89PNG")


def test_ticks_of_a_logarithmic_axis_are_written_in_full(tmp_path: Path) -> None:
    axis = drawn(tmp_path, {"adamw": Pace(end=0.04), "muon": Pace(end=0.05)})["loss-steps"].y
    assert [text for _, text in axis.ticks or ()] == ["0.05", "0.1", "0.2", "0.5"]


@pytest.mark.parametrize("end", [1e-3, 1e-9, 1e-40, 1e-90])
def test_ticks_stay_few_over_many_decades(tmp_path: Path, end: float) -> None:
    axis = drawn(tmp_path, {"adamw": Pace(end=end, noise=0), "muon": Pace(end=1.0)}, seeds=(0,))["loss-steps"].y
    assert axis.ticks is None or 2 <= len(axis.ticks) <= 9


def test_hovering_shows_losses_as_they_are_written_elsewhere(tmp_path: Path) -> None:
    figures = drawn(tmp_path, {"adamw": Pace(end=0.0017, drop=0), "muon": Pace(end=0.0011, drop=0)}, seeds=(0, 1))
    difference, curves = (layers(figures[key])["points"] for key in ("difference", "loss-steps"))
    texts = json.dumps([difference, curves], ensure_ascii=False)
    assert ".3f" not in texts
    for row in figures["difference"].rows:
        assert wording.signed(row.mean) in texts
    for curve in figures["loss-steps"].curves:
        assert f": {wording.loss(curve.y[-1])} (" in texts


@pytest.mark.parametrize("name", ["many", "hostile", "clear"])
def test_labels_keep_their_order_and_do_not_touch(tmp_path: Path, name: str) -> None:
    figure = scenario(tmp_path, name)["loss-steps"]
    heights = [label.y for label in figure.labels]
    assert min(np.diff(heights)) >= 0.0549 * (figure.y.high - figure.y.low)
    assert all(figure.y.low < height < figure.y.high for height in heights)


@pytest.mark.parametrize("name", ["hostile", "clear"])
def test_labels_with_room_are_moved_up_as_much_as_down(tmp_path: Path, name: str) -> None:
    figure = scenario(tmp_path, name)["loss-steps"]
    ends = [curve.y[-1] for curve in figure.curves]
    assert np.mean([label.y for label in figure.labels]) == pytest.approx(np.mean(ends))


def test_every_curve_band_label_and_rule_is_drawn(tmp_path: Path) -> None:
    figure = scenario(tmp_path, "clear")["loss-steps"]
    drawn = layers(figure)
    lines, points = rows(drawn["line"]), rows(drawn["points"])
    for curve in figure.curves:
        own = [row for row in lines if row["light"] == curve.style.light]
        assert {row["dark"] for row in own} == {curve.style.dark}
        framed = {(x, y) for x, y in zip(curve.x, curve.y, strict=True) if y <= figure.y.high}
        assert framed <= {(row["x"], row["y"]) for row in own}
        assert framed == {(row["x"], row["y"]) for row in points if row["light"] == curve.style.light}
        assert own[0]["y"] == pytest.approx(figure.y.high)  # cut where it comes into the frame
    assert {row["line"] for row in rows(drawn["area"])} == {0, 1, 2}
    assert sorted(row["text"] for row in rows(drawn["names"])) == ["adamw", "muon", "muonadam"]
    assert figure.rule is not None
    assert rows(drawn["rule"]) == [{"y": figure.rule.value}]
    assert rows(drawn["text"]) == [{"y": figure.rule.value, "text": figure.rule.text}]


def test_names_are_data_and_never_markup_or_expressions(tmp_path: Path) -> None:
    for figure in scenario(tmp_path, "hostile").values():
        expressions = [value for key, value in walk(to_vega(figure)) if key == "expr"]
        assert expressions
        assert not any(name[:8] in text for text in expressions for name in HOSTILE)
        labels = [value for key, value in walk(to_vega(figure)) if key == "labelExpr"]
        assert all(text.startswith("[") and text.endswith("datum.value)]") for text in labels)


def walk(tree: Any) -> Iterator[tuple[str, Any]]:
    """Every key of a tree, with its value."""
    for key, value in tree.items() if isinstance(tree, dict) else (("", one) for one in tree):
        yield key, value
        if isinstance(value, dict | list):
            yield from walk(value)


@pytest.mark.parametrize("key", ["difference", "loss-steps"])
def test_the_png_is_the_same_each_time_and_shows_each_method(tmp_path: Path, key: str) -> None:
    figure = scenario(tmp_path, "clear")[key]
    png = to_png(figure)
    assert png == to_png(figure)
    image = np.asarray(Image.open(BytesIO(png)).convert("RGB")).astype(int)
    assert image.shape == (2 * figure.height, 1640, 3)
    for mark in (*figure.curves, *figure.rows):
        colour = [int(mark.style.light[i : i + 2], 16) for i in (1, 3, 5)]
        close = np.abs(image - colour).sum(-1) < 24  # the palette of the file has 192 colours
        assert close.sum() > 200


def test_any_name_is_drawn(tmp_path: Path) -> None:
    figures = drawn(tmp_path, {name: Pace() for name in HOSTILE}, seeds=(0, 1))
    for key in ("difference", "loss-steps"):
        assert to_png(figures[key]).startswith(b"\x89PNG")


def test_every_method_looks_different_and_the_baseline_is_the_grey_one() -> None:
    names = [f"method {i}" for i in range(40)]
    looks = styles(names, baseline="method 7")
    assert list(looks) == names
    assert looks["method 7"].index == 0
    assert len({(look.light, look.dash, look.marker) for look in looks.values()}) == 40


def linear(colour: str) -> NDArray[np.float64]:
    channels = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def luminance(colour: str) -> float:
    return float(linear(colour) @ [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colours_can_be_read_as_text(theme: Literal["light", "dark"]) -> None:
    """Contrast by WCAG 2.2, success criterion 1.4.3."""
    for look in styles([str(i) for i in range(8)], baseline="0").values():
        dim, bright = sorted((luminance(look.colour(theme)), luminance(PAPER[theme])))
        assert (bright + 0.05) / (dim + 0.05) >= 4.5


# what full protanopia and deuteranopia make of linear RGB: Machado, Oliveira and Fernandes, 2009
BLINDNESS = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
}
# linear RGB to Oklab: Ottosson, 2020, https://bottosson.github.io/posts/oklab/
LMS = [
    [0.4122214708, 0.5363325363, 0.0514459929],
    [0.2119034982, 0.6806995451, 0.1073969566],
    [0.0883024619, 0.2817188376, 0.6299787005],
]
OKLAB = [
    [0.2104542553, 0.793617785, -0.0040720468],
    [1.9779984951, -2.428592205, 0.4505937099],
    [0.0259040371, 0.7827717662, -0.808675766],
]


@pytest.mark.parametrize("blindness", BLINDNESS)
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_six_colours_stay_apart_for_red_green_blind_readers(theme: Literal["light", "dark"], blindness: str) -> None:
    """A distance of 0.02 in Oklab can just be seen; ask for more than twice that."""
    looks = styles([str(i) for i in range(6)], baseline="0").values()
    seen = np.array([np.clip(BLINDNESS[blindness] @ linear(look.colour(theme)), 0, 1) for look in looks])
    lab = np.cbrt(seen @ np.transpose(LMS)) @ np.transpose(OKLAB)
    distances = np.linalg.norm(lab[:, None] - lab[None], axis=-1)
    assert distances[np.triu_indices(6, 1)].min() > 0.05
