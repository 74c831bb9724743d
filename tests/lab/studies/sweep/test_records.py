"""Stored records of a sweep: read as written, and refused with the file, the problem and the remedy."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from steepest.lab.disk.fields import RecordError
from steepest.lab.studies.records import Asked, read_kind, read_study
from steepest.lab.studies.sweep.plan import SweepStudy, rate
from tests.lab.synthetic import Pace, Valley, write_study, write_sweep


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
