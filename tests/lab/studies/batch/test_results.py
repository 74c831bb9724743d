"""Numbers of a batch-size study against worlds in which they are known."""

from __future__ import annotations

import math

import pytest

from steepest.lab.studies.batch.records import BatchStudy
from steepest.lab.studies.batch.results import BatchReport, read_report, reference, sample_ratios
from steepest.lab.studies.batch.varied import varied
from steepest.lab.studies.records import read_study
from steepest.lab.tasks import entry
from tests.lab.studies.batch.cases import written


@pytest.fixture(scope="module")
def clear(tmp_path_factory: pytest.TempPathFactory) -> BatchReport:
    return read_report(read_study(written(tmp_path_factory, "clear"), BatchStudy))


def test_the_known_batch_sizes_are_found(clear: BatchReport) -> None:
    muon, adamw = (one.estimate for one in clear.at(0.05))
    assert muon is not None
    assert adamw is not None
    assert muon.b_star.contains(2.25 * 12)
    assert adamw.chosen.family.key == "H"
    assert adamw.knee.value == pytest.approx(40, rel=0.15)
    assert adamw.b_star.kind == "at most"


def test_only_reported_seeds_count(clear: BatchReport) -> None:
    assert {one.seed for result in clear.results for one in result.arrivals} == {0, 1, 2}


def test_runs_below_the_pole_are_stopped(clear: BatchReport) -> None:
    muon = clear.at(0.05)[0]
    assert {one.crossing.status for one in muon.at(8)} == {"stopped"}
    assert muon.reached == (16, 32, 64, 128, 256)


def test_the_learning_rate_follows_the_root(clear: BatchReport) -> None:
    inner = [rate for rate in clear.arms[1].rates if not rate.at_edge]
    slope = math.log(inner[-1].lr / inner[0].lr) / math.log(inner[-1].batch_size / inner[0].batch_size)
    assert slope == pytest.approx(0.5, abs=0.15)
    assert clear.arms[0].rates[0].at_edge  # at b = 8 every rate misses the target


def test_the_ratio_is_that_of_the_worlds(clear: BatchReport) -> None:
    assert reference(clear) == "adamw"
    muon, adamw = clear.at(0.05)
    found = {one.batch_size: one for one in sample_ratios(adamw, muon, level=0.9)}
    true = 300 * (1 + 40 / 64) / (150 / (1 - math.sqrt(12 / 64)))
    assert found[64].value == pytest.approx(true, rel=0.1)
    assert found[64].low is not None
    assert found[64].low < found[64].value
    assert not any(one.bound for one in found.values())
    turned = {one.batch_size: one for one in sample_ratios(muon, adamw, level=0.9)}
    assert turned[64].value == pytest.approx(1 / found[64].value)
    assert (turned[8].bound, turned[8].low) == (True, None)


def test_a_step_costs_what_it_costs(clear: BatchReport) -> None:
    assert clear.arms[0].seconds[64] == pytest.approx(0.015 + 0.0002 * 64)
    assert clear.at(0.05)[1].time is not None


def test_a_target_below_all_is_refused(clear: BatchReport) -> None:
    with pytest.raises(ValueError, match=r"The target 0\.01 is below 0\.05, at which the runs of this study ended"):
        read_report(clear.records, targets=(0.01,))


def test_nothing_is_made_up_while_rates_are_sought(tmp_path_factory: pytest.TempPathFactory) -> None:
    report = read_report(read_study(written(tmp_path_factory, "started"), BatchStudy))
    assert [one.refusal for one in report.results] == ["No run to be counted has ended."] * 2
    assert report.shown == 0.05
    assert reference(report) is None


def test_arms_that_differ_in_one_option_are_put_side_by_side(tmp_path_factory: pytest.TempPathFactory) -> None:
    report = read_report(read_study(written(tmp_path_factory, "varied"), BatchStudy))
    [one] = varied(report)
    assert (one.method, one.option, [value for value, _ in one.values]) == ("muon", "momentum", [0.8, 0.9])


@pytest.mark.parametrize(("task", "unit"), [("digits", "images"), ("text", "sequences"), ("<b>", "examples")])
def test_batch_sizes_have_units(task: str, unit: str) -> None:
    assert entry(task).examples == unit
