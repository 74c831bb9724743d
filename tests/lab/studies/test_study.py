"""The directory of a study: runs are found by what they are, under today's names and those of older records."""

import dataclasses
import json

import pytest

from steepest.lab.methods.tuned import Tuning
from steepest.lab.runs.config import names_of, run_hash
from steepest.lab.studies.pack import pack_study
from steepest.lab.studies.race.plan import Race, RaceStudy
from steepest.lab.studies.records import read_study
from steepest.lab.studies.study import read_listing, run_directory, write_study
from steepest.lab.tasks import make_task
from tests.lab.synthetic import Pace
from tests.lab.synthetic import write_study as made_up

MOVED = Tuning(trials=16, source="docs/moved/README.md", edge=True)


@pytest.fixture(scope="module")
def race():
    return Race(task=make_task("text"), methods=("adamw", "muon"), seeds=(0,), options={}, baseline="adamw")


def written_before(out, configs):
    """A study as older commands have written it, whose names go by the record of the tuning."""
    for config in configs:
        directory = out / "runs" / names_of(config)[1]
        directory.mkdir(parents=True)
        (directory / "config.json").write_text(config.to_json())
        (directory / "mine").write_text(config.method)
    runs = {names_of(config)[1]: {"method": config.method, "seed": config.seed} for config in configs}
    asked = {"kind": "race", "task": "text", "preset": "demo", "created": "2025-01-31T12:00:00+00:00", "id": "0"}
    (out / "study.json").write_text(json.dumps({"format": 1, **asked, "runs": runs}))


def test_a_study_of_older_names_is_read(tmp_path):
    study = made_up(tmp_path, {"adamw": Pace(), "muon": Pace(1.7)}, seeds=(0,))
    before, text = read_study(study, RaceStudy), (study / "study.json").read_text()
    for run in before.runs:
        new, old = names_of(run.config)
        assert run.name == new != old
        (study / "runs" / new).rename(study / "runs" / old)
        text = text.replace(new, old)
    (study / "study.json").write_text(text)
    renamed = {one: dataclasses.replace(run, name=names_of(run.config)[1]) for one, run in before.found.items()}
    assert read_study(study, RaceStudy).found == renamed
    pack_study(study, delete=True)
    assert read_study(study, RaceStudy).found == renamed


@pytest.mark.slow
def test_a_repeated_study_finds_its_runs_though_the_record_of_their_tuning_has_moved(race, tmp_path):
    configs = [dataclasses.replace(config, tuning=MOVED) for config in race.configs()]
    assert all(new != old for new, old in map(names_of, configs))
    written_before(tmp_path, configs)
    write_study(tmp_path, race, race.configs(), command="")
    assert set(read_listing(tmp_path).runs) == {run_hash(config) for config in race.configs()}
    for config in race.configs():
        assert (run_directory(tmp_path, config) / "mine").read_text() == config.method
    assert len(list((tmp_path / "runs").iterdir())) == 2
    write_study(tmp_path, race, race.configs(), command="")
    assert len(list((tmp_path / "runs").iterdir())) == 2


@pytest.mark.slow
def test_runs_of_another_version_of_the_code_keep_their_names(race, tmp_path):
    configs = [dataclasses.replace(config, tuning=MOVED, code="training 2") for config in race.configs()]
    written_before(tmp_path, configs)
    write_study(tmp_path, race, race.configs(), command="")
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {
        *(names_of(config)[1] for config in configs),
        *map(run_hash, race.configs()),
    }
