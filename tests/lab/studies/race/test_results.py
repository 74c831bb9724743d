"""Numbers of the report, from studies whose answers are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from steepest.lab.studies.race.plan import RaceStudy
from steepest.lab.studies.race.results import Race, read_race
from steepest.lab.studies.records import read_study
from tests.lab.synthetic import STEPS, Pace, write_study


def race(study_dir: Path, paces: dict[str, Pace], **changes: Any) -> Race:
    return read_race(read_study(write_study(study_dir, paces, **changes), RaceStudy))


def test_a_method_of_twice_the_speed_needs_half_the_steps(tmp_path: Path) -> None:
    read = race(tmp_path, {"adamw": Pace(noise=0), "muon": Pace(speed=2, noise=0)})
    muon = read.method("muon")
    assert muon.ratio is not None
    # straight lines lie above the convex curve between two evaluations, by under 1% at this spacing
    assert muon.ratio.value == pytest.approx(0.5, rel=0.01)
    assert muon.mean_steps == pytest.approx(STEPS / 2, rel=0.02)
    assert all(steps == STEPS for steps in read.method("adamw").steps.values())
    assert read.verdicts[0].outcome == "better"


def test_the_target_is_the_baselines_mean_final_loss(tmp_path: Path) -> None:
    read = race(tmp_path, {"adamw": Pace(), "muon": Pace(speed=1.5)})
    finals = [loss for loss in read.method("adamw").finals.values() if loss is not None]
    assert read.target == pytest.approx(sum(finals) / 3)


def test_a_target_of_the_study_times_the_baseline_too(tmp_path: Path) -> None:
    read = race(tmp_path, {"adamw": Pace(noise=0), "muon": Pace(speed=2, noise=0)}, target=2.0)
    adamw, muon = read.method("adamw"), read.method("muon")
    assert read.target == 2.0
    assert all(steps is not None and steps < STEPS for steps in adamw.steps.values())
    assert muon.ratio is not None
    assert muon.ratio.value == pytest.approx(0.5, rel=0.03)


def test_there_is_no_ratio_to_a_baseline_that_misses_the_target(tmp_path: Path) -> None:
    read = race(tmp_path, {"adamw": Pace(), "muon": Pace(speed=2)}, target=1.65)
    assert set(read.method("adamw").steps.values()) == {None}
    assert read.method("muon").ratio is None


def test_a_method_that_does_not_get_there_has_a_bound_and_no_mean(tmp_path: Path) -> None:
    slow = race(tmp_path, {"adamw": Pace(), "sgd": Pace(speed=0.7)}).method("sgd")
    assert slow.mean_steps is None
    assert slow.ratio is not None
    assert (slow.ratio.value, slow.ratio.interval, slow.ratio.censored) == (1.0, None, 3)


def test_a_run_that_crosses_the_target_and_then_diverges_has_not_reached_it(tmp_path: Path) -> None:
    read = race(tmp_path, {"adamw": Pace(), "sgd": Pace(speed=3, diverges={1: 140})})
    sgd = read.method("sgd")
    assert read.target is not None
    assert min(row.loss for run in sgd.runs for row in run.evals if row.loss is not None) < read.target
    assert [steps is None for steps in sgd.steps.values()] == [False, True, False]
    assert sgd.ratio is not None
    assert (sgd.ratio.n, sgd.ratio.censored) == (3, 1)


def test_a_diverged_method_has_no_mean(tmp_path: Path) -> None:
    sgd = race(tmp_path, {"adamw": Pace(), "sgd": Pace(diverges={1: 64})}).method("sgd")
    assert (sgd.diverged, sgd.final, sgd.mean_steps) == ((1,), None, None)
    assert sgd.finals[0] is not None


def test_unequal_budgets_take_ratios_and_verdicts_away(tmp_path: Path) -> None:
    read = race(tmp_path, {"adamw": Pace(), "muon": Pace(speed=2, trials=1)})
    assert (read.ranked, read.verdicts, read.method("muon").ratio) == (False, (), None)
    assert read.method("muon").final is not None


def test_a_half_finished_study_uses_what_has_ended(tmp_path: Path) -> None:
    read = race(tmp_path, {"adamw": Pace(), "muon": Pace(speed=2, stops={1: 37}, absent=(2,))})
    muon = read.method("muon")
    assert list(muon.finals) == [0]
    assert muon.ratio is not None
    assert (muon.ratio.n, read.verdicts[0].n) == (1, 1)


def test_without_a_finished_baseline_there_is_no_target(tmp_path: Path) -> None:
    read = race(tmp_path, {"adamw": Pace(absent=(0,)), "muon": Pace()}, seeds=(0,))
    assert (read.target, read.method("muon").steps, read.method("muon").ratio) == (None, {}, None)


def test_times_are_medians_and_memory_is_the_largest(tmp_path: Path) -> None:
    muon = race(tmp_path, {"adamw": Pace(), "muon": Pace(optimizer_s=0.03)}).method("muon")
    assert muon.optimizer_ms == pytest.approx(30, rel=0.1)
    assert muon.forward_backward_ms == pytest.approx(120, rel=0.1)
    assert len(muon.step_ms) == 3
    assert muon.step_ms == pytest.approx((150, 150, 150), rel=0.1)
    assert muon.memory == 414_000_000
    assert muon.train_s is not None
    assert muon.train_s.n == 3


def test_accuracy_is_there_where_the_task_has_one(tmp_path: Path) -> None:
    read = race(tmp_path, {"adamw": Pace(accuracy=0.9), "muon": Pace()})
    accuracy = read.method("adamw").accuracy
    assert accuracy is not None
    assert accuracy.mean == pytest.approx(0.9)
    assert read.method("muon").accuracy is None
