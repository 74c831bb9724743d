"""The figures of a sweep as plain data, and as they are drawn."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from steepest.lab.report.figure import Figure
from steepest.lab.report.palette import styles
from steepest.lab.report.vega import to_png, to_vega
from steepest.lab.studies.records import read_study
from steepest.lab.studies.sweep.figures import KEYS, figures
from steepest.lab.studies.sweep.plan import SweepStudy
from steepest.lab.studies.sweep.results import read_results
from tests.lab.drawn import layers, rows
from tests.lab.synthetic import FINE, Valley, write_scenario, write_sweep

PLAIN = Valley(0.1, FINE, flat=0.5)
STEEP = replace(PLAIN, slope=4.0, most=50.0, limit=2.0)


def drawn(study_dir: Path, valleys: Mapping[str, Valley], **changes: Any) -> dict[str, Figure]:
    sweep = read_results(read_study(write_sweep(study_dir, valleys, **changes), SweepStudy))
    return {figure.key: figure for figure in figures(sweep)}


def scenario(study_dir: Path, name: str) -> dict[str, Figure]:
    sweep = read_results(read_study(write_scenario(study_dir, name), SweepStudy))
    return {figure.key: figure for figure in figures(sweep)}


def test_there_are_three_figures_with_known_keys(tmp_path: Path) -> None:
    assert tuple(drawn(tmp_path, {"a": PLAIN}, seeds=(0,))) == KEYS


def test_every_run_is_a_mark_or_in_a_lane(tmp_path: Path) -> None:
    figure = drawn(tmp_path, {"a": PLAIN, "b": STEEP}, seeds=(0, 1))["lr_sweep"]
    marks = {(dots.name, dots.sort): dots for dots in figure.dots}
    assert figure.rule is not None
    ceiling = figure.rule.value
    for name in "ab":
        inside = marks[name, "seed"]
        assert max(inside.y) <= ceiling < figure.y.high
        beyond = [lr for sort in ("above", "diverged") if (name, sort) in marks for lr in marks[name, sort].x]
        assert sorted({*inside.x, *beyond}) == FINE
    assert marks["b", "diverged"].x == tuple(lr for lr in FINE if lr > 2.0)
    assert set(marks["b", "diverged"].texts) == {f"lr {lr:.4g}: diverged, diverged" for lr in FINE if lr > 2.0}
    assert ("a", "diverged") not in marks
    lanes = {y for (_, sort), dots in marks.items() if sort in ("above", "diverged") for y in dots.y}
    assert all(ceiling < y < figure.y.high for y in lanes)
    assert "× diverged" in figure.above
    assert "▲ above the frame" in figure.above


def test_lines_are_straight_in_the_logarithm_and_end_at_the_frame(tmp_path: Path) -> None:
    figure = drawn(tmp_path, {"a": PLAIN, "b": replace(STEEP, noise=0.0, tilt=0.0)}, seeds=(0,))["lr_sweep"]
    [line] = [curve for curve in figure.curves if curve.name == "b"]
    assert figure.rule is not None
    assert (line.y[0], line.y[-1]) == (figure.rule.value, figure.rule.value)
    bottom = min(line.y)
    inside = [lr for lr in FINE if line.x[0] < lr < line.x[-1]]
    for end, inner in ((line.x[0], inside[0]), (line.x[-1], inside[-1])):
        at = line.y[line.x.index(inner)]
        outer = FINE[FINE.index(inner) + (1 if end > inner else -1)]
        there = bottom + 4.0 * max(0.0, abs(math.log10(outer / 0.1)) - 0.5)
        expected = inner * (outer / inner) ** ((figure.rule.value - at) / (there - at))
        assert end == pytest.approx(expected, rel=1e-3)


def test_a_divergence_cuts_the_line(tmp_path: Path) -> None:
    lost = replace(PLAIN, absent=[(FINE[4], 0)])
    figure = drawn(tmp_path, {"a": lost}, seeds=(0,))["lr_sweep"]
    assert not any(curve.x[0] < FINE[4] < curve.x[-1] for curve in figure.curves)
    assert len(figure.curves) == 2


def test_the_frame_shows_the_basin_however_terrible_other_points_are(tmp_path: Path) -> None:
    terrible = replace(PLAIN, slope=30.0, most=1e6)
    figure = drawn(tmp_path, {"a": PLAIN, "b": terrible}, seeds=(0, 1))["lr_sweep"]
    assert figure.zone is not None
    assert figure.zone.high == pytest.approx(1.05 * figure.zone.low)
    assert (figure.zone.high - figure.zone.low) / (figure.y.high - figure.y.low) > 0.05
    assert not figure.y.logarithmic


def test_losses_over_decades_have_a_logarithmic_axis(tmp_path: Path) -> None:
    figure = drawn(tmp_path, {"a": Valley(0.1, FINE, best=0.04, slope=0.9, flat=0.1)}, seeds=(0,))["lr_sweep"]
    assert figure.y.logarithmic
    assert 0 < figure.y.low < figure.y.high
    assert to_png(figure).startswith(b"\x89PNG")
    scale = layers(figure)["points"][0]["encoding"]["y"]["scale"]
    assert (scale["type"], scale["domain"]) == ("log", [figure.y.low, figure.y.high])


def test_bars_are_nested_and_labelled(tmp_path: Path) -> None:
    figure = drawn(tmp_path, {"a": PLAIN, "b": replace(PLAIN, at=10.0)}, seeds=(0,))["basins"]
    five, two, one, own = (bar.length for bar in figure.bars[:4])
    assert one < two < five <= own
    assert [label.text for label in figure.labels][1].startswith("≥")
    assert "goes on beyond what was tried" in figure.caption
    assert figure.bars[0].text.startswith("within 5% of the best of all: 1.")


def test_expected_curves_fall_to_the_best(tmp_path: Path) -> None:
    figure = drawn(tmp_path, {"a": PLAIN, "b": STEEP}, seeds=(0,))["expected_best"]
    for curve in figure.curves:
        assert curve.x == tuple(range(1, 10))
        assert all(np.diff(curve.y) <= 1e-12)
    heights = [label.y for label in figure.labels]
    assert figure.y.low < min(heights) < max(heights) < figure.y.high


def test_labels_stay_inside_of_the_axis(tmp_path: Path) -> None:
    figure = scenario(tmp_path, "sweep-nine")["expected_best"]
    assert len(figure.labels) == 9
    assert all(figure.y.low < label.y < figure.y.high for label in figure.labels)


@pytest.mark.parametrize(
    ("valley", "keys"),
    [
        (replace(PLAIN, limit=0.0), ["expected_best"]),
        (replace(PLAIN, lrs=[0.1]), ["lr_sweep"]),
        (replace(PLAIN, best=-1.0), ["lr_sweep", "expected_best"]),
        (replace(PLAIN, absent=[(lr, 0) for lr in FINE]), []),
    ],
    ids=["diverged", "single rate", "negative", "empty"],
)
def test_only_what_there_is_is_drawn(tmp_path: Path, valley: Valley, keys: list[str]) -> None:
    found = drawn(tmp_path, {"a": valley}, seeds=(0,))
    assert list(found) == keys
    for figure in found.values():
        assert to_png(figure).startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("key", KEYS)
def test_the_png_is_the_same_each_time_and_shows_each_method(tmp_path: Path, key: str) -> None:
    figure = scenario(tmp_path, "sweep-clear")[key]
    png = to_png(figure)
    assert png == to_png(figure)
    image = np.asarray(Image.open(BytesIO(png)).convert("RGB")).astype(int)
    assert image.shape == (2 * figure.height, 1640, 3)
    for mark in (*figure.curves, *figure.bars):
        colour = [int(mark.style.light[i : i + 2], 16) for i in (1, 3, 5)]
        close = np.abs(image - colour).sum(-1) < 24  # the palette of the file has 192 colours
        assert close.sum() > 200


def test_every_mark_bar_and_zone_is_drawn(tmp_path: Path) -> None:
    shown = scenario(tmp_path, "sweep-clear")
    losses, basins = layers(shown["lr_sweep"]), shown["basins"]
    drawn = [(row["x"], row["y"], row["light"]) for row in rows(losses["points"])]
    for dots in shown["lr_sweep"].dots:
        assert {(x, y, dots.style.light) for x, y in zip(dots.x, dots.y, strict=True)} <= set(drawn)
    assert len(drawn) == sum(len(dots.x) for dots in shown["lr_sweep"].dots)
    zone = shown["lr_sweep"].zone
    assert zone is not None
    assert rows(losses["rect"]) == [{"y": zone.low, "y2": zone.high}]
    assert rows(losses["zone"]) == [{"text": f"shaded: {zone.text}"}]
    keyed = [row["text"] for row in rows(losses["key"])]
    assert keyed == list(dict.fromkeys(dots.name for dots in shown["lr_sweep"].dots))
    ends = [(row["x"], row["x2"], row["text"]) for row in rows(layers(basins)["rect"])]
    assert ends == [(0.0, bar.length, bar.text) for bar in basins.bars]


def test_hostile_names_are_drawn(tmp_path: Path) -> None:
    for figure in scenario(tmp_path, "sweep-hostile").values():
        json.dumps(to_vega(figure), allow_nan=False)
        assert to_png(figure).startswith(b"\x89PNG")


def test_a_momo_version_shares_the_hue_of_its_method_and_is_dashed_and_hollow() -> None:
    names = [f"{base}{momo}" for base in ("adam", "muon", "newton-muon", "muonmax") for momo in ("", "-momo")]
    looks = styles([*names, "sgd"], baseline="adam")
    for base in names[::2]:
        plain, momo = looks[base], looks[f"{base}-momo"]
        assert (plain.light, plain.dark, plain.marker) == (momo.light, momo.dark, momo.marker)
        assert (plain.dash, plain.hollow, momo.dash, momo.hollow) == ("solid", False, "dash", True)
    assert len({look.light for look in looks.values()}) == 5
    assert len({look.index for look in looks.values()}) == 9
