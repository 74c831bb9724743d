"""Batch-size sweeps: which runs they ask for, as results come in."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steepest.lab.disk.fields import RecordError
from steepest.lab.engine.study import FailedRunsError, run_study
from steepest.lab.runs.config import run_hash
from steepest.lab.runs.train import train_run
from steepest.lab.studies.batch import plan as batch_sweep
from steepest.lab.studies.batch.plan import MOST_RATES, Arm, BatchStudy, BatchSweep, make_arms, parse_batches
from steepest.lab.studies.records import read_study
from steepest.lab.studies.study import read_listed, run_directory
from steepest.lab.tasks import make_task
from tests.cases import cases
from tests.lab.studies.batch.cases import written

TASK = make_task("digits")


def sweep(**changes):
    given = {"methods": ("muon", "sgd"), "seeds": (0, 1), "options": {}, "batches": (16, 256), "targets": (0.2, 0.1)}
    given |= {"most_steps": 1000, "most_samples": 20_000, "task": TASK, **changes}
    return BatchSweep(arms=given.pop("arms", make_arms(given["methods"], [])), **given)


def finish(plan, out, outcome):
    """Pretend that all runs asked for have ended; `outcome` of (method, batch size, rate as exponent, seed)."""
    for config in plan.grown(out):
        directory = run_directory(out, config)
        directory.mkdir(parents=True, exist_ok=True)
        own = plan.rate(next(arm for arm in plan.arms if arm.method == config.method), 0)["lr"]
        exponent = round(math.log2(config.options["lr"] / own))
        (directory / "result.json").write_text(
            json.dumps(outcome(config.method, config.batch_size, exponent, config.seed))
        )


@pytest.fixture
def stored(monkeypatch):
    """Outcomes are read from what `finish` wrote."""

    def read(run, target):
        steps, loss = json.loads((run / "result.json").read_text())
        return steps, math.inf if loss is None else loss

    monkeypatch.setattr(batch_sweep, "_outcome", read)


def study(plan, out, outcome):
    rounds = 0
    while True:
        before = len(plan.grown(out))
        finish(plan, out, outcome)
        rounds += 1
        if len(plan.grown(out)) == before and rounds > 1:
            return plan.cells(out)
        assert rounds < 50


@pytest.mark.slow
@pytest.mark.usefixtures("stored")
@settings(max_examples=25, deadline=None)
@given(best=st.integers(-6, 6))
def test_the_search_ends_at_the_best_rate_with_worse_neighbours(tmp_path_factory, best):
    plan = sweep(methods=("muon",), batches=(64,), seeds=(0,))
    out = tmp_path_factory.mktemp("study")
    (cell,) = study(plan, out, lambda method, batch, exponent, seed: (100 * 1.1 ** abs(exponent - best), 0.1))
    if abs(best) < MOST_RATES - 2:
        assert cell.best == best
        assert {best - 1, best + 1} <= set(cell.exponents)
        assert not cell.at_edge
    tuned = [c for c in plan.grown(out) if c.seed >= 1000]
    held_out = [c for c in plan.grown(out) if c.seed < 1000]
    assert len(tuned) == len(cell.exponents) <= MOST_RATES
    assert [c.options["lr"] for c in held_out] == [plan.rate(plan.arms[0], cell.best)["lr"]]
    assert [c.options["other_lr"] / c.options["lr"] for c in held_out] == [pytest.approx(0.25)]


def test_all_rates_of_an_arm_move_together_and_0_stays_0():
    plan = sweep(methods=("muon",), options={"muon": {"lr": 0.04, "other_lr": 0.01, "table_lr": 0.6}})
    assert plan.rate(plan.arms[0], 1) == {"lr": 0.08, "other_lr": 0.02, "table_lr": 1.2}
    plan = sweep(methods=("muon",))
    assert [plan.rate(plan.arms[0], exponent)["table_lr"] for exponent in (-1, 3)] == [0, 0]


@pytest.mark.usefixtures("stored")
def test_a_search_that_never_turns_ends_at_its_edge_and_says_so(tmp_path):
    plan = sweep(methods=("sgd",), batches=(64,))
    (cell,) = study(plan, tmp_path, lambda method, batch, exponent, seed: (100 * 2.0**-exponent, 0.1))
    assert len(cell.exponents) == MOST_RATES
    assert cell.at_edge


@pytest.mark.usefixtures("stored")
def test_rates_that_reach_the_target_beat_those_that_do_not_and_divergence_comes_last(tmp_path):
    plan = sweep(methods=("sgd",), batches=(64,))
    outcomes = {-1: (None, 0.3), 0: (500, 0.1), 1: (None, None)}
    (cell,) = study(plan, tmp_path, lambda method, batch, exponent, seed: outcomes.get(exponent, (None, 0.9)))
    assert cell.best == 0
    outcomes = {-1: (None, 0.3), 0: (None, 0.2), 1: (None, None)}
    (cell,) = study(plan, tmp_path / "b", lambda method, batch, exponent, seed: outcomes.get(exponent, (None, 0.9)))
    assert cell.best == 0


def test_the_first_rates_go_with_the_root_of_the_batch_size_and_long_runs_come_first(tmp_path):
    plan = sweep(batches=(4, 64, 1024), most_samples=20_000)
    cells = plan.cells(tmp_path)
    assert [(cell.arm.method, cell.batch_size, cell.exponents) for cell in cells] == [
        (method, batch, exponents)
        for batch, exponents in ((1024, (1, 2, 3)), (64, (-1, 0, 1)), (4, (-3, -2, -1)))
        for method in ("muon", "sgd")
    ]
    configs = plan.configs()
    assert [config.steps for config in configs if config.method == "sgd"] == [19] * 3 + [312] * 3 + [1000] * 3
    assert {(c.schedule, c.target, c.watch_from, c.eval_every) for c in configs} == {("constant", 0.1, 0.2, 1)}
    assert {c.seed for c in configs} == {1000}
    assert plan.grown(tmp_path) == configs
    assert len({run_hash(c) for c in configs}) == len(configs)


def test_arms_vary_one_option_at_a_time_and_are_told_apart(tmp_path):
    arms = make_arms(("muon", "sgd"), [("muon", "momentum", [0.7, 0.9]), ("muon", "weight_decay", [0.1])])
    assert [arm.label for arm in arms] == ["muon momentum=0.7", "muon momentum=0.9", "muon weight_decay=0.1", "sgd"]
    plan = sweep(arms=arms, options={"muon": {"nesterov": False}})
    labels = [plan.described(config)["arm"] for config in plan.configs()]
    assert [labels.count(arm.label) for arm in arms] == [6, 6, 6, 6]
    own = next(config for config in plan.configs() if plan.described(config)["arm"] == "muon momentum=0.9")
    assert (own.options["momentum"], own.options["nesterov"], own.options["weight_decay"]) == (0.9, False, 0.0)


def test_an_arm_whose_value_is_the_default_keeps_its_own_runs():
    varied = [("muon", "momentum", [0.7, 0.95]), ("muon", "weight_decay", [0.1]), ("muon", "other_lr", [0.005])]
    plan = sweep(methods=("muon",), arms=make_arms(("muon",), varied))
    labels = [plan.described(config)["arm"] for config in plan.configs()]
    assert {label: labels.count(label) for label in labels} == {arm.label: 6 for arm in plan.arms}


def test_values_are_written_as_the_method_takes_them():
    arms = make_arms(("muon",), [("muon", "weight_decay", [0, 1])])
    assert [arm.label for arm in arms] == ["muon weight_decay=0.0", "muon weight_decay=1.0"]
    with pytest.raises(TypeError, match="takes a float, got 'much'"):
        make_arms(("muon",), [("muon", "weight_decay", ["much"])])


@pytest.mark.slow
def test_a_study_grows_until_nothing_is_left_and_one_bad_run_holds_up_no_other_cell(tmp_path, monkeypatch):
    """With the real queue, and runs trained in this process."""

    def train(self, run):
        config = read_listed(run)
        if config.batch_size == 256 and config.seed == 0:
            (run / "worker.log").write_text("no memory\n")
            return "failed"
        train_run(config, run, threads=1)
        return "finished"

    monkeypatch.setattr("steepest.lab.engine.pool.Pool.train", train)
    task = make_task("quadratic")
    changes = {"task": task, "methods": ("muon",), "batches": (64, 256), "targets": (0.6,), "most_steps": 40}
    plan = sweep(**changes, options={"muon": {"lr": 0.02}})
    with pytest.raises(FailedRunsError, match=r"1 of .* runs ended with an error:\n.*no memory"):
        run_study(plan, tmp_path, command="steepest", workers=1)
    assert all(cell.best is not None for cell in plan.cells(tmp_path))
    missing = [c for c in plan.grown(tmp_path) if not (run_directory(tmp_path, c) / "result.json").exists()]
    assert [(c.batch_size, c.seed) for c in missing] == [(256, 0)]
    assert (tmp_path / "report.html").exists()


def test_batches_are_read_from_a_range_or_a_list():
    assert parse_batches("16:1024:x2") == (16, 32, 64, 128, 256, 512, 1024)
    assert parse_batches("256,16") == (16, 256)
    for wrong in ("", "16:1024", "0:8:x2", "8:4:x2", "8:16:x1", "8,8", "a", "1:999999999:x2x", "-4"):
        with pytest.raises(ValueError, match=r"--batches .*: write LOW:HIGH:xF, for example 16:1024:x2"):
            parse_batches(wrong)


@cases(
    "change, message",
    [
        ({"batches": (64, 16)}, r"Batch sizes must be whole numbers of at least 1, rising, got \(64, 16\)"),
        ({"targets": (0.1, 0.2)}, r"Targets must be losses above 0, falling, got \(0.1, 0.2\)"),
        ({"targets": (-1.0,)}, "Targets must be losses above 0"),
        ({"most_steps": 0}, "most_steps must be at least 1, got 0"),
        ({"tuning_seeds": 0}, "tuning_seeds must be at least 1, got 0"),
        ({"most_samples": 200}, "most_samples=200 is less than one batch of 256"),
        ({"seeds": (0, 1000)}, "Seeds from 1000 on tune the learning rates"),
        ({"arms": (Arm("muon"),)}, r"The arms \['muon'\] are not of the methods"),
        ({"arms": (Arm("muon"), Arm("muon"), Arm("sgd"))}, "Give each arm once"),
        ({"batches": (16, 2000)}, "A batch of 2000 would hold examples twice: 'digits' has 1437"),
        (
            {"arms": (Arm("muon", (("lr", 0.1),)), Arm("sgd"))},
            "'muon lr=0.1' varies lr, which is tuned at each batch size",
        ),
        (
            {"arms": (Arm("muon"), Arm("muon", (("momentum", 0.95),)), Arm("sgd"))},
            "The arms 'muon' and 'muon momentum=0.95' are the same; leave one out",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        sweep(**change)


def test_options_that_do_not_exist_are_refused_before_anything_is_trained():
    with pytest.raises(ValueError, match="Unknown option of the method 'muon' 'moment': did you mean 'momentum'"):
        sweep(arms=(Arm("muon", (("moment", 0.9),)), Arm("sgd"))).configs()
    with pytest.raises(ValueError, match=r"--vary adamw\.beta1: give values, and a method among muon, sgd"):
        make_arms(("muon", "sgd"), [("adamw", "beta1", [0.9])])


@pytest.mark.slow
def test_killed_and_repeated_a_study_ends_with_the_numbers_it_would_have_had(tmp_path):
    words = [sys.executable, "-m", "steepest", "critical-batch", "measure", "--task", "quadratic", "--methods", "muon"]
    words += ["--batches", "32,128", "--targets", "0.5", "--seeds", "1", "--most-steps", "60", "--workers", "2"]
    words += ["--most-samples", "20000", "--set", "muon.lr=0.03", "--out", str(tmp_path / "killed")]
    for _ in range(2):
        process = subprocess.Popen(words, start_new_session=True)
        done = len(list(tmp_path.glob("killed/runs/*/result.json")))
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("killed/runs/*/result.json"))) <= done and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(words, check=True, capture_output=True)

    options = {"muon": {"lr": 0.03}}
    task = make_task("quadratic")
    plan = sweep(
        task=task, methods=("muon",), options=options, batches=(32, 128), targets=(0.5,), seeds=(0,), most_steps=60
    )
    whole = tmp_path / "whole"
    while any(not (run_directory(whole, config) / "result.json").exists() for config in plan.grown(whole)):
        for config in plan.grown(whole):  # here, one after the other
            train_run(config, run_directory(whole, config), threads=1)
    results = {
        out.name: {run.parent.name: json.loads(run.read_text())["final_loss"] for run in out.glob("runs/*/result.json")}
        for out in (whole, tmp_path / "killed")
    }
    assert results["whole"] == results["killed"]
    listed = json.loads((tmp_path / "killed" / "study.json").read_text())
    assert set(listed["runs"]) == set(results["killed"])
    assert {run["tunes"] for run in listed["runs"].values()} == {True, False}


@pytest.fixture
def study_dir(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Path:
    return shutil.copytree(written(tmp_path_factory, "started"), tmp_path / "study")


def edit(study_dir: Path, **changes: Any) -> None:
    path = study_dir / "study.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_run(study_dir: Path, **changes: Any) -> str:
    study = json.loads((study_dir / "study.json").read_text())
    name = next(iter(study["runs"]))
    edit(study_dir, runs=study["runs"] | {name: study["runs"][name] | changes})
    return name


def test_what_was_written_is_read(study_dir: Path) -> None:
    records = read_study(study_dir, BatchStudy)
    study = records.study
    assert (study.task, study.preset, study.methods, study.baseline) == ("digits", "demo", ("muon",), "muon")
    assert (study.seeds, study.batches, study.targets) == ((0, 1, 2), (16, 32), (0.1, 0.05))
    ended = [one for one, run in records.found.items() if run.result is not None]
    assert {(one.batch_size, one.tunes) for one in ended} == {(32, True)}
    assert {one.seed for one in records.found if not one.tunes} == {0, 1, 2}
    assert {one.batch_size for one in records.found} == {16, 32}
    assert len(records.asked) == len(records.found) + len(records.absent)
    assert all(run.config.options["lr"] == one.lr for one, run in records.found.items())


def test_long_options_are_shortened_in_names(tmp_path_factory: pytest.TempPathFactory) -> None:
    study = read_study(written(tmp_path_factory, "varied"), BatchStudy).study
    assert study.methods == ("muon momentum=0.8", "muon momentum=0.9")
    assert study.arms[0].changes == (("momentum", "0.8"),)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("kind", "race", "kind must be 'critical-batch', got 'race'"),
        ("arms", ["sgd"], r"arms must be a list of the methods \['muon'\] with what was changed of them"),
        ("arms", ["muon wd=1", "muon weight_decay=1"], "arms must be a list of arms with different names"),
        ("batches", [32, 16], "batches must be a list of whole numbers of at least 1, rising"),
        ("batches", [0, 16], r"batches\.0 must be a whole number of at least 1, got 0"),
        ("targets", [0.05, 0.1], "targets must be a list of losses above 0 .*, falling"),
        ("targets", [0.1, "0.05"], r"targets\.1 must be a finite number, got '0\.05'"),
        ("targets", [1e200], r"targets\.0 must be a finite number of at most 1e\+100, got 1e\+200"),
        ("batches", [32], r"must be at one of the batch sizes \[32\]"),
    ],
)
def test_a_damaged_study_is_refused(study_dir: Path, key: str, value: object, message: str) -> None:
    edit(study_dir, **{key: value})
    with pytest.raises(RecordError, match=message):
        read_study(study_dir, BatchStudy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tunes": 1}, "tunes must be true or false, got 1"),
        ({"arm": "sgd"}, r"arm must be one of the arms \['muon'\], and of its method, got 'sgd'"),
        ({"method": "sgd"}, r"arm must be one of the arms"),
        ({"lr": 0.0}, r"lr must be a finite number of at least 1e-30, got 0\.0"),
        ({"seed": 1}, r"with one of the seeds \[0, 1, 2\]"),
        (
            {"seed": 0, "tunes": False, "batch_size": 32, "lr": 7.0},
            "lr must be .*, as for the other seeds of that batch",
        ),
    ],
)
def test_a_run_that_was_not_asked_for_is_refused(study_dir: Path, changes: dict[str, Any], message: str) -> None:
    edit_run(study_dir, **changes)
    with pytest.raises(RecordError, match=message):
        read_study(study_dir, BatchStudy)


def test_a_run_listed_twice_is_refused(study_dir: Path) -> None:
    runs = json.loads((study_dir / "study.json").read_text())["runs"]
    edit(study_dir, runs=runs | {"0" * 16: next(iter(runs.values()))})
    with pytest.raises(RecordError, match="must be the only run of its arm, batch size, learning rate and seed"):
        read_study(study_dir, BatchStudy)


def test_a_run_of_another_batch_size_is_told(study_dir: Path) -> None:
    found = read_study(study_dir, BatchStudy).found
    own = next(run.name for one, run in found.items() if one.batch_size == 32 and one.tunes)
    study = json.loads((study_dir / "study.json").read_text())
    run = study["runs"][own] | {"batch_size": 16}
    edit(study_dir, runs={own: run})
    [problem] = read_study(study_dir, BatchStudy).absent.values()
    assert "the run has batch_size 32 instead of 16. Delete the directory" in (problem or "")
