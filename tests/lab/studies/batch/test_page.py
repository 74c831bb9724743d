"""The page of a batch-size study: complete, inert, alone, and with figures and tables beside it."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import pytest

from steepest.lab.studies.batch.figures import figures
from steepest.lab.studies.batch.plan import BatchStudy
from steepest.lab.studies.batch.results import read_report
from steepest.lab.studies.batch.sentences import look
from steepest.lab.studies.records import read_study
from steepest.lab.studies.report import write_plots, write_report
from tests.cases import cases
from tests.lab.report.test_page import Page
from tests.lab.studies.batch.cases import CASES, written


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    return {name: write_report(shutil.copytree(written(tmp_path_factory, name), folder / name)) for name in CASES}


def text(page: Path) -> str:
    return re.sub(r"\s+", " ", Page(page).text)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
@cases(
    "name, expected",
    [
        ("clear", "muon, loss 0.05: SFO-minimising b*"),
        ("clear", "knee B_crit"),
        ("clear", "(K(b) hyperbola, knee hyperbola, 90% intervals, 3 seeds, 6 batch sizes 8 to 256, adamw, target"),
        ("clear", "target 0.05, b = 8: 3 of 3 seeds; below those that arrived, noise floor; stopped after 3,000 steps"),
        ("clear", "what it computes depends on the batch size itself"),
        ("clear", "momentum 0.95: an average over about 20 steps, which are 160 images at b = 8 and 5,120 at b = 256"),
        ("clear", "under Adam with Muon"),
        ("clear", "on seeds that are not reported"),
        ("started", "No run with a tuned learning rate has ended yet"),
        ("started", "1 learning rate still to be found"),
        ("troubled", "muon-wd, target 0.1: "),
        ("troubled", "Below a target at the first evaluation"),
        ("troubled", "seed 1: after step 5"),
        ("troubled", "the highest of 9"),
        ("troubled", "2 seeds at each batch size"),
        ("varied", "SFO-minimising b* by momentum of muon"),
        ("varied", "Least samples by momentum of muon"),
    ],
)
def test_a_reader_is_told(pages: dict[str, Path], name: str, expected: str) -> None:
    assert expected in text(pages[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_nothing_comes_from_elsewhere(pages: dict[str, Path], name: str) -> None:
    page = Page(pages[name])
    addresses = [value for _, attrs in page.tags for key, value in attrs.items() if key in ("src", "href", "srcset")]
    assert all(address is not None and address.startswith("data:image/png;base64,") for address in addresses)
    assert not [key for _, attrs in page.tags for key in attrs if key.startswith("on")]


@pytest.mark.slow
def test_the_same_records_give_the_same_bytes(pages: dict[str, Path]) -> None:
    before = pages["varied"].read_bytes()
    assert write_report(pages["varied"].parent).read_bytes() == before


@pytest.mark.slow
def test_hostile_names_are_text(pages: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(pages["started"].parent, tmp_path / "hostile")
    study = json.loads((folder / "study.json").read_text())
    evil = "<img src=x onerror=alert(1)>"
    study |= {"task": evil, "methods": [evil], "arms": [evil], "command": evil}
    study["runs"] = {name: run | {"arm": evil, "method": evil} for name, run in study["runs"].items()}
    (folder / "study.json").write_text(json.dumps(study))
    page = Page(write_report(folder))
    assert evil in page.text
    assert not [key for _, attrs in page.tags for key in attrs if key.startswith("on")]
    assert "Model not looked at" in page.text


@pytest.mark.slow
def test_the_tables_hold_every_run_and_answer(pages: dict[str, Path]) -> None:
    folder = pages["clear"].parent
    study = read_study(folder, BatchStudy)
    assert len(rows(folder / "rows.csv")) == len(study.asked)
    answers = {(row["arm"], row["target"]): row for row in rows(folder / "estimates.csv")}
    assert answers["adamw", "0.05"]["family"] == "H"
    assert float(answers["adamw", "0.05"]["knee"]) == pytest.approx(40, rel=0.15)
    assert len(rows(folder / "learning_rates.csv")) == 12
    assert {row["status"] for row in rows(folder / "crossings.csv")} == {"reached", "stopped"}
    assert {row["arm"] for row in rows(folder / "token_ratio.csv")} == {"muon"}


@pytest.mark.slow
def test_plots_alone_and_stale_ones_go(pages: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(pages["started"].parent, tmp_path / "alone")
    (folder / "report.html").unlink()
    (folder / "plots" / "samples.png").write_bytes(b"old")
    written_now = write_plots(folder, "critical-batch")
    assert all(path.exists() for path in written_now)
    assert {path.name for path in written_now} >= {"rows.csv", "estimates.csv"}
    assert not (folder / "plots" / "samples.png").exists()
    assert not (folder / "report.html").exists()


@pytest.mark.slow
def test_figures_show_fits_inside_their_frame_and_stopped_runs(pages: dict[str, Path]) -> None:
    drawn = {one.key: one for one in figures(read_report(read_study(pages["clear"].parent, BatchStudy)))}
    assert list(drawn) == ["steps", "samples", "token_ratio", "learning_rates"]
    for figure in drawn.values():
        heights = [y for curve in figure.curves for y in (*curve.y, *curve.low, *curve.high)]
        heights += [y for dots in figure.dots for y in dots.y]
        assert all(figure.y.low <= y <= figure.y.high for y in heights)
    stopped = [dots for dots in drawn["steps"].dots if dots.sort == "up"]
    assert [(dots.name, set(dots.x)) for dots in stopped] == [("muon", {8})]
    assert any(dots.sort in ("up", "down") for dots in drawn["learning_rates"].dots)


def test_the_model_is_looked_at() -> None:
    assert look("digits", "demo").normalised
    assert 0 < look("digits", "demo").others < 0.5
    assert "unknown" in (look("nothing", "demo").problem or "").lower()
