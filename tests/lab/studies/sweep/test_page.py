"""The page of a sweep: complete, inert, alone, and with tables beside it."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
from selenium.webdriver import Chrome

from steepest.lab.studies.report import write_report
from tests.browser import BROWSER, requests, show
from tests.cases import cases
from tests.lab.report.test_page import Page
from tests.lab.synthetic import HOSTILE, SWEEPS, Valley, write_sweep

in_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium on the PATH")


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_everything_a_reader_asks_for_is_there(pages: dict[str, Path]) -> None:
    text = re.sub(r"\s+", " ", Page(pages["sweep-clear"]).text)
    for expected in (
        "muon-momo has the widest basin:",
        "Learning-rate sweep · text, demo · 31 January 2025",
        "in units of its own norm: widths in decades compare between methods, positions do not",
        "7 learning rates each, 3 seeds (0, 1, 2), 150 steps",
        "3 of 21",
        "at lr 0.3",
        "after one random learning rate",
        "after all 7:",
        "arXiv:1909.03004",
        "momentum = 0.95",
        "lr 0.02, other_lr 0.005, seed 2:",
        "lr_sweep.csv",
        "steepest sweep --methods adamw,muon,muon-momo",
        f"steepest report {pages['sweep-clear'].parent}",
    ):
        assert expected in text
    assert "other_lr = " not in text


@pytest.mark.slow
@pytest.mark.parametrize("name", SWEEPS)
def test_nothing_comes_from_elsewhere(pages: dict[str, Path], name: str) -> None:
    page = Page(pages[name])
    addresses = [value for _, attrs in page.tags for key, value in attrs.items() if key in ("src", "href", "srcset")]
    assert len(addresses) == 3
    assert all(address is not None and address.startswith("data:image/png;base64,") for address in addresses)
    assert len(page.scripts) == 2
    assert not [key for _, attrs in page.tags for key in attrs if key.startswith("on")]


@pytest.mark.slow
@cases("start", ["=", "+", "-", "@", "\t", "\r", "\uff1d", "\uff0b", "\uff0d", "\uff20"])
def test_no_name_in_a_table_is_a_formula(tmp_path: Path, start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steepest.lab.report.page.to_png", lambda _: b"")
    name = f"{start}HYPERLINK(1)"
    study = write_sweep(tmp_path, {"adamw": Valley(0.1, [0.1]), name: Valley(0.1, [0.1])}, seeds=(0,))
    write_report(study)
    for table in study.glob("*.csv"):
        with table.open(newline="") as file:
            cells = [cell for row in csv.reader(file) for cell in row if "HYPERLINK" in cell]
        assert cells, table.name
        assert not [cell for cell in cells if cell.strip().startswith(start.strip() or name)], table.name


@pytest.mark.slow
def test_hostile_names_are_text(pages: dict[str, Path]) -> None:
    page = Page(pages["sweep-hostile"])
    assert HOSTILE[0] in page.text
    assert HOSTILE[1] in page.text
    assert "\u202e" not in pages["sweep-hostile"].read_text()
    assert "b" not in {tag for tag, _ in page.tags}
    names = {row["method"] for row in rows(pages["sweep-hostile"].with_name("rows.csv"))}
    assert names == {"adamw", *HOSTILE[:3], "_a\ufffdb\ufffd\ufffd\ufffdc" + "x" * 60}


@pytest.mark.slow
def test_the_tables_hold_every_run_point_and_method(pages: dict[str, Path]) -> None:
    folder = pages["sweep-troubled"].parent
    runs, points, basins = (rows(folder / f"{name}.csv") for name in ("rows", "lr_sweep", "basins"))
    assert (len(runs), len(points), len(basins)) == (51, 17, 5)
    states = {(row["method"], row["lr"], row["seed"]): row for row in runs}
    assert states["adamw", "0.01", "0"]["status"] == "missing"
    assert states["adamw", "0.1", "2"]["status"] == "unfinished"
    assert states["wild", "0.1", "1"]["status"] == "diverged"
    done = states["stuck", "0.1", "1"]
    assert (done["status"], done["steps"], done["other_lr"]) == ("finished", "150", "0.025")
    assert states["single", "0.1", "0"]["other_lr"] == ""
    assert (folder / "runs" / done["run"]).is_dir()
    wild = next(row for row in points if row["method"] == "wild")
    assert (wild["mean_final_loss"], wild["n"], wild["diverged"]) == ("", "3", "3")
    stuck = next(row for row in basins if row["method"] == "stuck")
    assert (stuck["best_at_edge"], stuck["best_of_all_5pct_pieces"], stuck["own_best_1pct_at_least"]) == (
        "true",
        "1",
        "true",
    )
    assert float(stuck["best_of_all_5pct_decades"]) == pytest.approx(3.0)
    losses = [float(row["final_loss"]) for row in runs if (row["method"], row["lr"]) == ("stuck", "0.1")]
    mean = next(row["mean_final_loss"] for row in points if (row["method"], row["lr"]) == ("stuck", "0.1"))
    assert float(mean) == pytest.approx(sum(losses) / 3)


def test_the_same_records_give_the_same_bytes_and_a_stale_figure_is_removed(tmp_path: Path) -> None:
    study = write_sweep(tmp_path, {"adamw": Valley(0.1, [0.01, 0.1, 1.0])}, seeds=(0,))
    (study / "plots").mkdir()
    (study / "plots" / "mine.png").write_bytes(b"mine")
    write_report(study)
    names = ("report.html", "rows.csv", "lr_sweep.csv", "basins.csv", "plots/lr_sweep.png")
    first = {name: (study / name).read_bytes() for name in names}
    write_report(study)
    assert {name: (study / name).read_bytes() for name in names} == first
    for run in (study / "runs").iterdir():
        (run / "config.json").unlink()
    assert "No run has ended yet" in Page(write_report(study)).text
    assert [path.name for path in (study / "plots").iterdir()] == ["mine.png"]


@pytest.mark.browser
@in_browser
@pytest.mark.parametrize("name", ["sweep-clear", "sweep-nine", "sweep-hostile", "sweep-troubled"])
def test_every_figure_is_drawn_in_a_browser_and_nothing_is_fetched(
    chrome: Chrome, pages: dict[str, Path], name: str
) -> None:
    show(chrome, pages[name])
    marks = "f.querySelector('.plot .mark-symbol path, .plot .mark-rect path')"
    with_marks = f"return [...document.querySelectorAll('figure')].filter(f => {marks}).length"
    assert chrome.execute_script(with_marks) == 3
    assert [url for url in requests(chrome) if url.split(":")[0] not in ("file", "data", "blob")] == []
    assert chrome.get_log("browser") == []
    needed, there = chrome.execute_script(
        "const box = document.querySelector('.scroll'); return [box.scrollWidth, box.clientWidth]"
    )
    assert needed <= there
    key = "return getComputedStyle(document.querySelector('#lr_sweep .key')).display"
    assert chrome.execute_script(key) == "flex"


@pytest.mark.browser
@in_browser
@pytest.mark.parametrize("name", ["sweep-nine", "sweep-hostile", "sweep-troubled"])
def test_a_phone_never_scrolls_sideways(chrome: Chrome, pages: dict[str, Path], name: str) -> None:
    show(chrome, pages[name], width=375, height=812)
    width, shown = chrome.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert width <= shown == 375
    outside = "return [...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > 376)"
    assert chrome.execute_script(f"{outside}.length") == 0
