"""Stored records of a batch-size study: read as written, and refused with the file, the problem and the remedy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from steepest.lab.disk.fields import RecordError
from steepest.lab.studies.batch.plan import BatchStudy
from steepest.lab.studies.records import read_study
from tests.lab.studies.batch.cases import written


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
