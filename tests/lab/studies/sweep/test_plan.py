"""Sweeps: which rates, which runs, and what the files say."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steepest.lab.disk.fields import RecordError
from steepest.lab.runs.config import run_hash
from steepest.lab.studies.race.plan import Race
from steepest.lab.studies.records import Asked, read_kind, read_study
from steepest.lab.studies.study import StudyMismatchError, read_listing
from steepest.lab.studies.study import write_study as write_plan
from steepest.lab.studies.sweep.plan import Sweep, SweepStudy, parse_rates, rate, rates_by_method
from steepest.lab.tasks import make_task
from tests.cases import cases
from tests.lab.synthetic import Pace, Valley, write_study, write_sweep


@pytest.fixture(scope="module")
def task():
    return make_task("digits", "demo")


def sweep(task, **changes):
    fields = {"methods": ("adamw", "sgd"), "seeds": (0, 1), "options": {}, "steps": 40}
    lrs = {"adamw": (0.001, 0.01), "sgd": (0.1,)}
    return Sweep(task=task, **{**fields, "lrs": lrs, **changes})


@given(
    low=st.floats(1e-9, 1e3),
    factor=st.floats(1.5, 1e5),
    number=st.integers(2, 40),
)
def test_rates_are_evenly_spaced_on_a_logarithmic_scale(low, factor, number):
    high = low * factor
    rates = parse_rates(f"{low}:{high}:log{number}")
    assert len(rates) == number
    assert rates == tuple(float(f"{rate:.6g}") for rate in rates)  # what is printed is what is trained
    for index, one in enumerate(rates):
        expected = math.log(low) + index / (number - 1) * math.log(high / low)
        assert math.log(one) == pytest.approx(expected, abs=1e-5)
    assert parse_rates(",".join(map(str, reversed(rates)))) == rates


@cases(
    "text, message",
    [
        ("", "'' is not a positive number from 1e-30 to below 1e+09"),
        ("0.1,,1", "'' is not a positive number from 1e-30 to below 1e+09"),
        ("0.1,abc", "'abc' is not a positive number from 1e-30 to below 1e+09"),
        ("0", "'0' is not a positive number from 1e-30 to below 1e+09"),
        ("-1", "'-1' is not a positive number from 1e-30 to below 1e+09"),
        ("nan", "'nan' is not a positive number from 1e-30 to below 1e+09"),
        ("inf", "'inf' is not a positive number from 1e-30 to below 1e+09"),
        ("0.1,0.10", "a rate occurs twice"),
        ("1e-3:1", "N is a number from 2 to 1000"),
        ("1e-3:1:9", "N is a number from 2 to 1000"),
        ("1e-3:1:log1", "N is a number from 2 to 1000"),
        ("1e-3:1:log", "N is a number from 2 to 1000"),
        ("1e-3:1:log99999999999", "N is a number from 2 to 1000"),
        ("1e-3:1:log9:2", "N is a number from 2 to 1000"),
        ("1:1e-3:log9", "LOW is below HIGH"),
        ("1:1:log2", "LOW is below HIGH"),
        ("1:1.00001:log9", "N rates of 6 digits fit between them"),
        ("1e-29:1e8:log0000000050000", "N is a number from 2 to 1000"),
        ("1e-31:1:log9", "'1e-31' is not a positive number"),
        ("1:1e9:log9", "'1e9' is not a positive number"),
        ("x:1:log9", "'x' is not a positive number from 1e-30 to below 1e+09"),
    ],
)
def test_rates_that_cannot_be_meant_are_refused(text, message):
    with pytest.raises(ValueError, match=rf"^--lrs {re.escape(text)}: write LOW:HIGH:logN, .*{re.escape(message)}"):
        parse_rates(text)


def test_a_method_may_have_rates_of_its_own():
    found = rates_by_method(["muon=1e-3:1:log4", "0.1,0.2"], ["adamw", "muon"])
    assert found == {"adamw": (0.1, 0.2), "muon": (0.001, 0.01, 0.1, 1.0)}
    assert rates_by_method(["adamw=1"], ["adamw", "muon"]) == {"adamw": (1.0,)}


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["1", "2"], "--lrs gives rates for all methods twice"),
        (["sgd=1", "sgd=2"], "--lrs gives rates for sgd twice"),
        (["=1"], "--lrs =1: write METHOD=RATES"),
    ],
)
def test_rates_given_twice_are_refused(texts, message):
    with pytest.raises(ValueError, match=message):
        rates_by_method(texts, ["sgd"])


@cases(
    "changes, message",
    [
        ({"lrs": {"adamw": (0.1,)}}, "No learning rates for 'sgd'; add --lrs sgd="),
        ({"lrs": {"adamw": (0.1,), "sgd": ()}}, "No learning rates for 'sgd'"),
        (
            {"lrs": {"adamw": (0.1,), "sgd": (0.1,), "sdg": (1.0,)}},
            "for 'sdg', which is not among the methods adamw, sgd; add it. Did you mean 'sgd'?",
        ),
        ({"lrs": {"adamw": (0.1,), "sgd": (0.2, 0.1)}}, "must be positive, rising and of 6 digits, got (0.2, 0.1)"),
        ({"lrs": {"adamw": (0.1,), "sgd": (0.0, 0.1)}}, "must be positive, rising"),
        ({"lrs": {"adamw": (0.1,), "sgd": (0.12345678,)}}, "and of 6 digits, got (0.12345678,)"),
        ({"lrs": {"adamw": (0.1,), "sgd": (0.1, math.inf)}}, "must be positive, rising"),
        ({"methods": ("sgd", "sgd")}, "A sweep takes each method once"),
        ({"seeds": ()}, "A sweep takes at least one seed, got none"),
    ],
)
def test_a_sweep_that_makes_no_sense_is_refused(task, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        sweep(task, **changes)


def test_a_sweep_cut_short_has_the_same_rates_of_every_method(task):
    runs = [(config.seed, config.options["lr"], config.method) for config in sweep(task).configs()]
    one_seed = [(0.001, "adamw"), (0.1, "sgd"), (0.01, "adamw")]
    assert runs == [(seed, *run) for seed in (0, 1) for run in one_seed]


def test_the_other_rate_keeps_its_ratio(task):
    options = {"adamw": {"lr": 0.03, "other_lr": 0.01}}
    for config in sweep(task, options=options).configs():
        if config.method == "adamw":
            assert config.options["other_lr"] == pytest.approx(config.options["lr"] / 3, rel=1e-5)
            assert config.options["other_lr"] == float(f"{config.options['other_lr']:.6g}")
        else:
            assert "other_lr" not in config.options


def test_tables_keep_their_ratio_and_0_stays_0(task):
    lrs = {"adamw": (0.001, 0.1), "muon": (0.02, 0.2)}
    plan = sweep(task, methods=("adamw", "muon"), lrs=lrs, options={"muon": {"lr": 0.04, "table_lr": 0.6}}, seeds=(0,))
    found = {(config.method, config.options["lr"]): config.options["table_lr"] for config in plan.configs()}
    assert found == {("adamw", 0.001): 0, ("adamw", 0.1): 0, ("muon", 0.02): 0.3, ("muon", 0.2): 3}


def test_the_ratio_is_that_of_the_tuned_options_unless_told_otherwise(task):
    found = {config.options["other_lr"] for config in sweep(task, seeds=(0,)).configs() if config.method == "adamw"}
    assert found == {0.002, 0.02}  # tuned on digits: 0.01 and 0.02


def test_without_a_rate_there_is_no_ratio(task):
    for options, found in (
        ({"lr": 0}, r"lr 0 and other_lr 0\.02"),
        ({"lr": -1, "other_lr": 1}, "lr -1 and other_lr 1"),
        ({"lr": 1, "table_lr": -1}, "lr 1 and table_lr -1"),
    ):
        with pytest.raises(
            ValueError, match=rf"adamw has {found}, which have no ratio to keep; --set adamw\.lr above 0"
        ):
            sweep(task, options={"adamw": options}).configs()


def test_a_sweep_keeps_the_names_of_its_runs(task):
    first, finer = sweep(task), sweep(task, lrs={"adamw": (0.001, 0.003, 0.01), "sgd": (0.1,)}, seeds=(0, 1, 2))
    assert {run_hash(config) for config in first.configs()} < {run_hash(config) for config in finer.configs()}


def test_the_file_says_what_was_asked_for(task, tmp_path):
    asked = sweep(task)
    write_plan(tmp_path, asked, asked.configs(), command="steepest sweep ...")
    study = json.loads((tmp_path / "study.json").read_text())
    expected = {"format": 1, "kind": "sweep", "task": "digits", "preset": "demo", "methods": ["adamw", "sgd"]}
    expected |= {"baseline": "adamw", "seeds": [0, 1], "lrs": {"adamw": [0.001, 0.01], "sgd": [0.1]}}
    assert {key: study[key] for key in expected} == expected
    assert study["runs"] == {
        run_hash(config): {"method": config.method, "seed": config.seed, "lr": config.options["lr"]}
        for config in asked.configs()
    }
    assert read_listing(tmp_path).runs == {run_hash(config): config.method for config in asked.configs()}
    write_plan(tmp_path, asked, asked.configs(), command="steepest sweep ...")
    assert json.loads((tmp_path / "study.json").read_text()) == study  # the same study as before


def test_a_sweep_and_a_race_do_not_share_a_directory(task, tmp_path):
    asked = sweep(task)
    write_plan(tmp_path, asked, asked.configs(), command="")
    race = Race(task=task, methods=("sgd",), seeds=(0,), options={}, baseline="sgd")
    with pytest.raises(StudyMismatchError, match=r"holds a sweep on 'digits' at preset 'demo', not a race on 'digits'"):
        write_plan(tmp_path, race, race.configs(), command="")


@pytest.fixture
def study_dir(tmp_path: Path) -> Path:
    valleys = {"adamw": Valley(0.01, [0.1, 0.01]), "muon": Valley(0.1, [1.0], absent=[(1.0, 1)])}
    return write_sweep(tmp_path, valleys, seeds=(0, 1))


def edit(study_dir: Path, **changes: Any) -> None:
    path = study_dir / "study.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_was_written_is_read(study_dir: Path) -> None:
    records = read_study(study_dir, SweepStudy)
    study = records.study
    assert (study.methods, study.baseline, study.seeds) == (("adamw", "muon"), "adamw", (0, 1))
    assert len(records.asked) == 6
    assert study.lrs == {"adamw": (0.01, 0.1), "muon": (1.0,)}
    found = [(run.config.method, rate(run), run.config.seed) for run in records.runs]
    assert found == [("adamw", 0.01, 0), ("adamw", 0.01, 1), ("adamw", 0.1, 0), ("adamw", 0.1, 1), ("muon", 1.0, 0)]
    assert records.absent == {Asked(method="muon", seed=1, lr=1.0): None}


def test_the_kinds_of_studies_are_told_apart(study_dir: Path, tmp_path: Path) -> None:
    assert read_kind(study_dir) == "sweep"
    assert read_kind(write_study(tmp_path / "race", {"adamw": Pace()}, seeds=(0,))) == "race"
    with pytest.raises(RecordError, match="kind must be 'sweep', got 'race'"):
        read_study(tmp_path / "race", SweepStudy)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("lrs", [], r"lrs must be an object, got \[\]"),
        (
            "lrs",
            {"adamw": [0.1]},
            r"lrs\.muon is missing",
        ),
        ("lrs", {"adamw": [0.1, 0.1]}, r"lrs\.adamw must be a list of different values, got \[0\.1, 0\.1\]"),
        ("lrs", {"adamw": [0.1, 0]}, r"lrs\.adamw\.1 must be a finite number of at least 1e-30, got 0"),
        ("lrs", {"adamw": [0.1, "1"]}, r"lrs\.adamw\.1 must be a finite number, got '1'"),
        ("lrs", {"adamw": []}, r"lrs\.adamw must be a non-empty list, got \[\]"),
        ("lrs", {"adamw": [10**400]}, r"lrs\.adamw\.0 must be a finite number"),
        ("baseline", "sgd", r"baseline must be one of the methods \['adamw', 'muon'\], got 'sgd'"),
        ("runs", {"../x": {}}, r"runs\.\.\./x must be named by 16 hexadecimal digits"),
        (
            "runs",
            {"0" * 16: {"method": "muon", "seed": 0, "lr": 0.5}},
            r"runs\.0{16} must be one of the methods with one of its learning rates and one of the seeds",
        ),
        (
            "runs",
            {str(i) * 16: {"method": "muon", "seed": 0, "lr": 1} for i in (0, 1)},
            r"runs\.1{16} must be the only run of 'muon' with seed 0 and lr 1\.0, which 0{16} is already",
        ),
    ],
)
def test_a_sweep_with_a_wrong_field(study_dir: Path, key: str, value: object, message: str) -> None:
    edit(study_dir, **{key: value})
    remedy = "Delete the file and repeat the study's command"
    with pytest.raises(RecordError, match=rf"study\.json: {message}.*\. {remedy}"):
        read_study(study_dir, SweepStudy)


def test_a_run_of_another_rate_is_named_and_does_not_spoil_the_others(study_dir: Path) -> None:
    runs = json.loads((study_dir / "study.json").read_text())["runs"]
    low, high = (next(n for n, run in runs.items() if (run["lr"], run["seed"]) == (lr, 0)) for lr in (0.01, 0.1))
    runs[low]["lr"], runs[high]["lr"] = 0.1, 0.01
    edit(study_dir, runs=runs)
    study = read_study(study_dir, SweepStudy)
    assert len(study.runs) == 3
    problems = {one.lr: problem or "" for one, problem in study.absent.items()}
    assert re.search("the run is 'adamw' with seed 0 and lr 0.1, study.json says .* lr 0.01. Delete", problems[0.01])
