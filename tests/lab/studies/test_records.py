"""Stored records of studies: read as written, or refused with the file, the problem and the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from steepest.lab.disk.fields import RecordError
from steepest.lab.studies import KINDS
from steepest.lab.studies.race.plan import RaceStudy
from steepest.lab.studies.records import Asked, read_study
from tests.lab.synthetic import EVERY, STEPS, TOKENS, Pace, edit, write_study


@pytest.fixture
def study_dir(tmp_path: Path) -> Path:
    return write_study(tmp_path, {"adamw": Pace(), "muon": Pace(speed=1.7)}, seeds=(0, 1))


def test_what_was_written_is_read(study_dir: Path) -> None:
    records = read_study(study_dir, RaceStudy)
    study = records.study
    assert (study.task, study.preset, study.methods, study.baseline) == ("text", "demo", ("adamw", "muon"), "adamw")
    assert (study.seeds, study.target, study.created.year, records.absent) == ((0, 1), None, 2025, {})
    assert [(run.config.method, run.config.seed) for run in records.runs] == [
        ("adamw", 0),
        ("adamw", 1),
        ("muon", 0),
        ("muon", 1),
    ]
    run = records.runs[2]
    assert run.status == "finished"
    assert run.config.options == {"lr": 0.02}
    assert run.config.tuning is not None
    assert run.config.tuning.trials == 6
    assert [row.step for row in run.train] == list(range(1, STEPS + 1))
    assert [row.step for row in run.evals] == list(range(0, STEPS + 1, EVERY))
    assert run.evals[-1].tokens == STEPS * TOKENS
    assert run.result is not None
    assert run.result.final_loss == run.evals[-1].loss
    assert run.environment["torch"] == "2.13.0"


def test_runs_not_started_going_on_and_diverged_are_told_apart(tmp_path: Path) -> None:
    pace = Pace(stops={1: 37}, diverges={2: 64}, absent=(3,))
    study = read_study(write_study(tmp_path, {"adamw": pace}, seeds=(0, 1, 2, 3)), RaceStudy)
    assert [run.status for run in study.runs] == ["finished", "unfinished", "diverged"]
    assert study.runs[1].evals[-1].step == 30
    assert study.runs[2].evals[-1].loss is None
    assert study.absent == {Asked(method="adamw", seed=3, lr=None): None}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"study\.json: no study here\. Give the directory that race or sweep was given as --out\."),
        (b"\xff\xfe", r"study\.json: the file cannot be read .*utf-8.* Delete the file and repeat the study's command"),
        (b"{", r"study\.json: not valid JSON .*Delete the file and repeat the study's command"),
        (
            b"[" * 100_000,
            r"study\.json: the content must be an object\. Delete the file and repeat",
        ),
        (
            b"[]",
            r"study\.json: the content must be an object, got \[\]\. Delete the file",
        ),
    ],
)
def test_a_study_that_cannot_be_read(study_dir: Path, content: bytes | None, message: str) -> None:
    path = study_dir / "study.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RecordError, match=message):
        read_study(study_dir, RaceStudy)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", 2, "format must be 1, got 2"),
        ("kind", "sweep", "kind must be 'race', got 'sweep'"),
        ("kind", "rally", f"kind must be one of {', '.join(KINDS)}, got 'rally'"),
        ("methods", [], r"methods must be a non-empty list, got \[\]"),
        ("methods", ["adamw", "adamw"], "methods must be a list of different values, got"),
        ("methods", ["adamw", 3], r"methods\.1 must be a string, got 3"),
        ("baseline", "sgd", r"baseline must be one of the methods \['adamw', 'muon'\], got 'sgd'"),
        ("seeds", [0, -1], r"seeds\.1 must be a whole number of at least 0, got -1"),
        ("seeds", [0, True], r"seeds\.1 must be a whole number, got True"),
        ("task", "", "task must be a non-empty string, got ''"),
        ("created", "yesterday", "created must be a time such as 2025-01-31T12:00:00"),
        ("target", -1e101, r"target must be a finite number of at least -1e\+100, got -1e\+101"),
        ("target", "1.7", "target must be a finite number or null, got '1.7'"),
        ("runs", [], "runs must be an object, got \\[\\]"),
        ("runs", {"../../etc": {}}, r"runs\.\.\./\.\./etc must be named by 16 hexadecimal digits"),
        (
            "runs",
            {"0" * 16: {"method": "sgd", "seed": 0}},
            r"runs\.0{16} must be one of the methods \['adamw', 'muon'\]",
        ),
        ("runs", {"0" * 16: {"method": "muon", "seed": 9}}, r".*with one of the seeds \[0, 1\]"),
        (
            "runs",
            {"0" * 16: {"method": "muon", "seed": 0}, "1" * 16: {"method": "muon", "seed": 0}},
            "runs.1{16} must be the only run of 'muon' with seed 0, which 0{16} is already",
        ),
    ],
)
def test_a_study_with_a_wrong_field(study_dir: Path, key: str, value: object, message: str) -> None:
    edit(study_dir / "study.json", lambda study: study.update({key: value}))
    remedy = "Delete the file and repeat the study's command"
    with pytest.raises(RecordError, match=rf"study\.json: {message}.*\. {remedy}"):
        read_study(study_dir, RaceStudy)
