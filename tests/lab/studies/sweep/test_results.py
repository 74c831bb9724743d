"""From stored sweeps to numbers: against the closed form of the curves they were written with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from steepest.lab.studies.records import read_study
from steepest.lab.studies.sweep.plan import SweepStudy
from steepest.lab.studies.sweep.results import WIDE, Sweep, comparable_settings, read_results
from tests.cases import cases
from tests.lab.synthetic import FINE, UNTRAINED, Valley, grid_of, write_sweep

EXACT = Valley(0.1, grid_of(1e-4, 100, 601), flat=0.5, slope=1.0, tilt=0.0, noise=0.0, best=2.0)


def results(study_dir: Path, valleys: Mapping[str, Valley], **changes: Any) -> Sweep:
    return read_results(read_study(write_sweep(study_dir, valleys, **changes), SweepStudy))


def test_widths_best_and_expectation_of_a_known_valley(tmp_path: Path) -> None:
    """On a flat bottom of 2 * flat decades with walls of a known slope, 5% of the best loss is known, too."""
    valley = replace(EXACT, lrs=grid_of(1e-3, 10, 17))
    sweep = results(tmp_path, {"muon": valley}, seeds=(0,))
    method = sweep.methods[0]
    assert sweep.best is not None
    assert method.best is not None
    assert method.best.loss.mean == sweep.best
    for tolerance, basin in method.of_all.items():
        assert basin.width == pytest.approx(2 * (0.5 + tolerance * sweep.best), rel=1e-3)
        assert (len(basin.intervals), basin.open_ended) == (1, False)
    assert method.by_seed == {0: method.of_all[WIDE].width}
    shift = sweep.best - 2.0
    losses = [valley.loss(lr) + shift for lr in valley.lrs]
    assert method.expected[0] == pytest.approx(sum(losses) / len(losses))
    assert method.expected[-1] == pytest.approx(sweep.best)
    assert sweep.untrained is not None


def test_a_worse_method_is_measured_against_the_best_of_all_and_its_own(tmp_path: Path) -> None:
    better, worse = replace(EXACT, lrs=FINE), replace(EXACT, lrs=FINE, best=2.2)
    first, second = results(tmp_path, {"a": better, "b": worse}, seeds=(0,)).methods
    assert second.of_all[WIDE].width == 0
    assert second.own[WIDE].width == pytest.approx(first.own[WIDE].width, rel=0.1)
    assert first.own == first.of_all


def test_what_diverges_or_ends_above_it_counts_as_the_untrained_model(tmp_path: Path) -> None:
    valley = Valley(0.1, [0.01, 0.1, 1.0], limit=0.5, most=1e4, slope=1e4, flat=0.5)
    sweep = results(tmp_path, {"muon": valley}, seeds=(0,))
    [method] = sweep.methods
    assert sweep.untrained == UNTRAINED
    assert method.best is not None
    assert (method.diverged, method.points[0].loss is not None) == (1, True)
    low = method.best.loss.mean
    assert method.expected == pytest.approx(((low + 2 * UNTRAINED) / 3, (2 * low + UNTRAINED) / 3, low))


def test_runs_that_are_missing_are_left_out_and_flagged(tmp_path: Path) -> None:
    lost = replace(EXACT, lrs=FINE, absent=[(FINE[4], 0), (FINE[4], 1), (FINE[0], 1)])
    sweep = results(tmp_path, {"a": replace(EXACT, lrs=FINE), "b": lost}, seeds=(0, 1))
    method = sweep.method("b")
    assert [point.n for point in method.points] == [1, 2, 2, 2, 0, 2, 2, 2, 2]
    assert method.of_all[WIDE].open_ended
    assert len(method.expected) == 8
    assert not sweep.ranked


@pytest.mark.parametrize(("other", "ranked"), [(FINE, True), (FINE[:-1], False)])
def test_methods_are_ranked_only_if_they_were_tried_alike(tmp_path: Path, other: list[float], ranked: bool) -> None:
    valleys = {"a": replace(EXACT, lrs=FINE), "b": replace(EXACT, lrs=other)}
    assert results(tmp_path, valleys, seeds=(0,)).ranked == ranked


def test_a_rate_without_effect_is_found(tmp_path: Path) -> None:
    valleys = {"a": replace(EXACT, lrs=[0.01, 10.0, 20.0]), "b": Valley(0.1, [0.01, 0.1], constant=True)}
    first, second = results(tmp_path, valleys, seeds=(0, 1)).methods
    assert (first.unchanged, second.unchanged) == ((), ((0.01, 0.1),))


def test_losses_not_above_zero_have_no_basin(tmp_path: Path) -> None:
    sweep = results(tmp_path, {"a": replace(EXACT, lrs=FINE, best=-1.0)}, seeds=(0,))
    assert not sweep.measurable
    assert (sweep.methods[0].of_all, sweep.methods[0].own, sweep.methods[0].by_seed) == ({}, {}, {})
    assert sweep.methods[0].best is not None


@cases("rate", ["other_lr", "table_lr"])
def test_other_rates_may_go_along_but_other_options_may_not_change(tmp_path: Path, rate: str) -> None:
    study = read_study(write_sweep(tmp_path, {"a": replace(EXACT, lrs=[0.01, 0.1, 1.0])}, seeds=(0, 1)), SweepStudy)
    kept, aside = comparable_settings(study)
    assert (len(kept["a"]), aside) == (6, ())
    runs = list(study.runs)
    for i, key, value in ((0, "momentum", 0.5), (5, rate, 7.0)):
        options = {**runs[i].config.options, key: value}
        runs[i] = replace(runs[i], config=replace(runs[i].config, options=options))
    runs[2] = replace(runs[2], config=replace(runs[2].config, code="9"))
    kept, aside = comparable_settings(replace(study, found=dict(zip(study.found, runs, strict=True))))
    assert kept["a"] == (runs[1], runs[3], runs[4])
    reasons = {one.run.name: [key for key, _, _ in one.differences] for one in aside}
    assert reasons == {runs[0].name: ["options"], runs[2].name: ["code"], runs[5].name: [rate]}


def test_without_the_untrained_model_nothing_is_expected(tmp_path: Path) -> None:
    study = read_study(write_sweep(tmp_path, {"a": replace(EXACT, lrs=FINE)}, seeds=(0,)), SweepStudy)
    cut = {one: replace(run, evals=run.evals[1:]) for one, run in study.found.items()}
    sweep = read_results(replace(study, found=cut))
    assert sweep.untrained is None
    assert sweep.methods[0].expected == ()
    assert math.isclose(sweep.best or 0, 2.0, rel_tol=0.05)
