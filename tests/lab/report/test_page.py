"""The page as text: complete, self-contained, the same each time, and inert whatever the records hold."""

from __future__ import annotations

import base64
import builtins
import hashlib
import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from steepest.lab.studies.records import RecordError
from steepest.lab.studies.report import write_report
from tests.cases import cases
from tests.lab.synthetic import HOSTILE, SCENARIOS, Pace, run_dir, write_study


class Page(HTMLParser):
    """Tags with their attributes, scripts, and the text a reader sees."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._inside = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data


@pytest.mark.slow
@cases("name", SCENARIOS)
def test_the_page_needs_nothing_from_elsewhere_and_is_small(pages: dict[str, Path], name: str) -> None:
    page = Page(pages[name])
    addresses = [value for _, attrs in page.tags for key, value in attrs.items() if key in ("src", "href", "srcset")]
    assert addresses
    assert all(address is not None and address.startswith("data:image/png;base64,") for address in addresses)
    assert "@import" not in pages[name].read_text().split("</style>")[0]
    assert pages[name].stat().st_size < 6_000_000


@pytest.mark.slow
@cases("name", SCENARIOS)
def test_only_our_own_scripts_may_run(pages: dict[str, Path], name: str) -> None:
    page = Page(pages[name])
    [policy] = [
        attrs["content"]
        for tag, attrs in page.tags
        if tag == "meta" and attrs.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy is not None
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    data, script = page.scripts
    assert f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy
    assert set(json.loads(data)) == {tag["id"] for name, tag in page.tags if name == "figure"}
    assert not set(data) & set("<>&\u2028\u2029")
    assert not [key for _, attrs in page.tags for key in attrs if key.startswith("on")]


@pytest.mark.slow
def test_hostile_names_are_text(pages: dict[str, Path]) -> None:
    page = Page(pages["hostile"])
    assert HOSTILE[0] in page.text
    assert HOSTILE[1] in page.text
    assert "<b>task</b>" in page.text
    assert "_a\ufffdb\ufffd\ufffd\ufffdc" in page.text
    assert "\u202e" not in pages["hostile"].read_text()
    assert "b" not in {tag for tag, _ in page.tags}


@pytest.mark.slow
def test_everything_a_reader_asks_for_is_there(pages: dict[str, Path]) -> None:
    text = re.sub(r"\s+", " ", Page(pages["clear"]).text)
    for expected in (
        "muon wins: the same loss in 58% of adamw’s steps",
        "muon is better than adamw: final loss lower by 0.135",
        "1.588 ± 0.012",
        "Steps to target 1.723",
        "55% to 61%",
        "forward, backward 12",
        "optimizer 30.",
        "414 MB",
        "seeds 1",
        "where the curves of adamw end in the mean; for adamw its own",
        "to the end of its curve with the same seed",
        "the first crossing",
        "a run that diverges does not count as having reached anything",
        "Chosen from 6 tried settings, recorded in sweep.",
        "lr = 0.02",
        "Example CPU",
        "packages numpy",
        "steepest race --methods adamw,muon,muonadam",
        f"steepest report {pages['clear'].parent}",
        "31 January 2025",
        "Holm-corrected",
    ):
        assert expected in text


@pytest.mark.slow
def test_rows_that_cannot_be_filled_say_so(tmp_path: Path) -> None:
    paces = {
        "adamw": Pace(accuracy=0.9),
        "sgd": Pace(speed=0.7),
        "late": Pace(absent=(0, 1, 2)),
        "wild": Pace(speed=1.3, diverges={1: 64}),
        "edgy": Pace(speed=1.01, noise=0.02),
    }
    text = re.sub(r"\s+", " ", Page(write_report(write_study(tmp_path, paces))).text)
    for expected in (
        "not reached",
        ">150 · >150 · >150",
        "over 100%",
        "not reached by 3 of 3 seeds",
        "no run has ended",
    ):
        assert expected in text
    assert re.search(r">150 · diverged · >150|\d+ · diverged · \d+", text)
    for expected in ("No run to compare.", "by 2 of 3 seeds", "diverged", "90.0%", "± 0.0"):
        assert expected in text


def test_a_study_with_its_own_target_says_so(tmp_path: Path) -> None:
    text = Page(write_report(write_study(tmp_path, {"adamw": Pace(), "muon": Pace(speed=2)}, target=2.0))).text
    assert "The target was set by the study." in text
    assert "Steps to target 2.000" in text


def test_how_many_runs_shared_the_machine_is_said(tmp_path: Path) -> None:
    pace = Pace(environment={"workers": 2})
    text = Page(write_report(write_study(tmp_path, {"adamw": pace, "muon": pace}, seeds=(0,)))).text
    assert "workers (runs trained at once)2" in text


def test_losses_as_large_as_floats_get_count_as_diverged(tmp_path: Path) -> None:
    study = write_study(tmp_path, {"adamw": Pace(), "muon": Pace(end=1e308)})
    text = re.sub(r"\s+", " ", Page(write_report(study)).text)
    assert "Only adamw did not diverge" in text
    assert "muon, seed 0: the loss was not finite, or above 1e+100, after step 150" in text


def test_an_empty_study_has_a_page(tmp_path: Path) -> None:
    page = Page(
        write_report(write_study(tmp_path, {"adamw": Pace(absent=(0,)), "muon": Pace(absent=(0,))}, seeds=(0,)))
    )
    assert "No run has ended yet" in page.text
    assert "Not recorded." in page.text
    assert json.loads(page.scripts[0]) == {}


@pytest.mark.slow
def test_the_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    study = write_study(tmp_path, {"adamw": Pace(), "muon": Pace()}, seeds=(0, 1))
    first = write_report(study).read_bytes()
    pngs = {path.name: path.read_bytes() for path in (study / "plots").iterdir()}
    assert write_report(study).read_bytes() == first
    assert {path.name: path.read_bytes() for path in (study / "plots").iterdir()} == pngs
    assert sorted(pngs) == ["difference.png", "loss-steps.png", "loss-time.png", "loss-tokens.png"]
    assert sorted(path.name for path in study.iterdir()) == ["plots", "report.html", "runs", "study.json"]


@pytest.mark.slow
def test_a_figure_that_no_longer_holds_is_removed_and_other_files_stay(tmp_path: Path) -> None:
    study = write_study(tmp_path, {"adamw": Pace(), "muon": Pace()}, seeds=(0, 1))
    write_report(study)
    assert (study / "plots" / "difference.png").exists()
    (study / "plots" / "mine.png").write_bytes(b"mine")
    shutil.rmtree(run_dir(study, "muon", 0))
    write_report(study)
    assert not (study / "plots" / "difference.png").exists()
    assert (study / "plots" / "mine.png").read_bytes() == b"mine"


def test_a_damaged_run_is_named_on_the_page(tmp_path: Path) -> None:
    study = write_study(tmp_path, {"adamw": Pace(), "muon": Pace()})
    name = run_dir(study, "muon", 1).name
    (study / "runs" / name / "metrics.jsonl").write_text("<script>\n")
    text = re.sub(r"\s+", " ", Page(write_report(study)).text)
    assert f"muon, seed 1: runs/{name}/metrics.jsonl: line 1: not valid JSON" in text
    assert f"Delete the directory {name} and repeat the study's command" in text


def test_a_damaged_study_has_no_page(tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text("{}")
    with pytest.raises(RecordError, match=r"study\.json: format is missing\. Delete the file and repeat"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_missing_library_is_named_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without_page(name: str, *args: Any, **kwargs: Any) -> object:
        if name == "steepest.lab.report.page":
            raise ModuleNotFoundError("No module named 'vl_convert'", name="vl_convert")
        return original(name, *args, **kwargs)

    write_study(tmp_path, {"adamw": Pace()}, seeds=(0,))
    monkeypatch.delitem(sys.modules, "steepest.lab.studies.race.page", raising=False)
    monkeypatch.setattr(builtins, "__import__", without_page)
    remedy = r"cannot be drawn without vl_convert\. .*pip install 'steepest\[lab\]'"
    with pytest.raises(ModuleNotFoundError, match=remedy):
        write_report(tmp_path)
