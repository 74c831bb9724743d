import csv
import json

import pytest

from steepest.lab.bench import cost
from steepest.lab.bench.cost import CASES
from steepest.lab.cli import main
from steepest.lab.studies.batch import coverage


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_newton_muon_has_a_row_for_every_case_and_width(tmp_path):
    words = ["bench", "newton-muon", "--width", "64", "--tokens", "64", "128", "--pairs", "8", "--every", "16", "--out"]
    assert main([*words, str(tmp_path / "out")]) == 0
    found = rows(tmp_path / "out" / "cost.csv")
    assert [(row["case"], row["tokens"]) for row in found] == [(case, n) for n in ("64", "128") for case in CASES]
    for row in found:
        weighed = (15 * float(row["ordinary_ratio"]) + float(row["refresh_ratio"])) / 16
        assert float(row["ratio"]) == pytest.approx(weighed, abs=1e-4)
        assert row["planned_bytes"] == row["held_bytes"]
    assert json.loads((tmp_path / "out" / "cost.json").read_text())["environment"]


@pytest.mark.slow
def test_momo_has_a_row_for_every_recipe_and_kind_of_dual_norms(tmp_path, capsys, monkeypatch):
    from steepest import Muon

    monkeypatch.setattr(cost, "RECIPES", {"Muon": Muon})
    assert main(["bench", "momo", "--task", "digits", "--pairs", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["method"], row["dual"]) for row in found] == [("Muon", "stale"), ("Muon", "cached")]
    assert all(row["extra_memory_momo_mb"] > 0 and row["step_ratio"] > 0 for row in found)


def test_coverage_counts_intervals_that_hold_the_truth(tmp_path, monkeypatch):
    first = coverage.settings()[:1]
    monkeypatch.setattr(coverage, "settings", lambda: first)
    words = ["bench", "coverage", "--replications", "4", "--resamples", "100", "--out"]
    assert main([*words, str(tmp_path / "out")]) == 0
    (row,) = rows(tmp_path / "out" / "coverage.csv")
    tally = coverage.measure(first[0], replications=4, resamples=100)
    assert float(row["covered"]) == pytest.approx(tally.covered / tally.numbers, abs=1e-3)
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "coverage", "--replications", "1", "--resamples", "5"])
