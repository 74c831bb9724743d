"""Committed tables and pictures are what today's code makes of the committed records."""

import contextlib
import csv
import functools
import io
import math
import runpy
from pathlib import Path

import pytest
from PIL import Image

from steepest.lab.report.vega import SHOWN, to_png
from steepest.lab.studies import KINDS
from steepest.lab.studies.records import read_kind

RESULTS = Path(__file__).parents[2] / "results"
IMAGES = RESULTS.parent / "docs/images"
DRAWN = {  # study and key of the figure, by name of the picture
    "race": ("race_demo", "loss-steps"),
    "lr_sweep": ("lr_sweep", "lr_sweep"),
    "newton_muon": ("newton_muon/tiny", "difference"),
    "critical_batch_samples": ("critical_batch/digits", "samples"),
    "critical_batch_rates": ("critical_batch/digits", "learning_rates"),
    "critical_batch_text": ("critical_batch/text", "token_ratio"),
}
STUDIES = sorted(path.parent for path in RESULTS.rglob("runs.jsonl.xz"))


@functools.cache
def content(study):
    return KINDS[read_kind(study)].content(study)


def same(one, other):
    """Whether two cells say the same; another machine may round the logarithm of a number otherwise."""
    try:
        return math.isclose(float(one), float(other), rel_tol=1e-9)
    except ValueError:
        return one == other


@pytest.mark.slow
@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.relative_to(RESULTS).as_posix())
def test_tables_come_from_their_records(study):
    tables = content(study).tables
    kept = {name for name in tables if (study / name).exists()}
    assert kept in (set(), set(tables))
    for name in kept:
        own, made = (list(csv.reader(io.StringIO(text))) for text in ((study / name).read_text(), tables[name]))
        differing = [pair for pair in zip(own, made, strict=True) if not all(map(same, *pair))]
        assert not differing, f"{name} is not what `steepest report` writes"


def shown(png):
    """What a picture says that it was drawn from; pixels differ with the fonts of the machine."""
    return Image.open(png).text[SHOWN]


@pytest.mark.slow
@pytest.mark.parametrize("name", DRAWN)
def test_pictures_of_the_docs_come_from_records(name):
    study, key = DRAWN[name]
    [figure] = [figure for figure in content(RESULTS / study).figures if figure.key == key]
    today = shown(io.BytesIO(to_png(figure)))
    assert shown(IMAGES / f"{name}.png") == today, f"docs/images/{name}.png is not today's {key}.png"


def test_todays_walk_asks_for_the_settings_of_the_committed_search():
    tune = runpy.run_path(str(RESULTS / "tuning/tune.py"))
    rows = list(csv.DictReader(io.StringIO((RESULTS / "tuning/text.csv").read_text())))
    for label, own in tune["CONTESTANTS"]["text"].items():
        ladders = {name: tune["ladder"](name, start) for name, start in own.start.items()}
        walk = tune["search"](ladders, own.start, budget=tune["BUDGET"])
        found = [row for row in rows if row["label"] == label]
        assert len(found) == tune["BUDGET"]
        asked = next(walk)
        for row in found:
            assert {name: float(row[name]) for name in asked} == asked
            with contextlib.suppress(StopIteration):  # after the last one
                asked = walk.send(float(row["tuning_loss"]))


def test_tables_of_a_search_come_from_its_records():
    tables = runpy.run_path(str(RESULTS / "strongest/study.py"))["tables"]()
    assert set(tables) == {path.name for path in (RESULTS / "strongest").glob("*.csv")}
    for name, text in tables.items():
        own, made = (list(csv.reader(io.StringIO(t))) for t in ((RESULTS / "strongest" / name).read_text(), text))
        assert len(made) > 1
        assert [pair for pair in zip(own, made, strict=True) if not all(map(same, *pair))] == []


@pytest.mark.slow
def test_pictures_of_speed_come_from_their_rows():
    pictures = dict(runpy.run_path(RESULTS / "speed/redraw.py")["pictures"]())
    kept = sorted((RESULTS / "speed").glob("*/*.png"))  # those that a page shows
    assert kept
    old = [path for path in kept if shown(path) != shown(io.BytesIO(pictures[path]))]
    assert not old, "python results/speed/redraw.py draws them anew"
