"""Stored records of runs: read as written, or refused with the file, the problem and the remedy."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steepest.lab.disk.fields import RecordError
from steepest.lab.disk.packed import RunFiles
from steepest.lab.runs.records import Result, read_result, read_run
from steepest.lab.studies.race.plan import RaceStudy
from steepest.lab.studies.records import read_study
from tests.lab.synthetic import STEPS, Pace, edit, only_problem, run_dir, write_study

DELETED = "Delete the directory [0-9a-f]{16} and repeat the study's command"


@pytest.fixture
def study_dir(tmp_path: Path) -> Path:
    return write_study(tmp_path, {"adamw": Pace(), "muon": Pace(speed=1.7)}, seeds=(0, 1))


def test_a_line_still_being_written_is_left_out(study_dir: Path) -> None:
    run = run_dir(study_dir, "muon", 1)
    (run / "result.json").unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    assert len(read_run(RunFiles(run)).train) == STEPS


def test_a_run_without_environment_is_still_a_run(study_dir: Path) -> None:
    run = run_dir(study_dir, "muon", 1)
    (run / "environment.json").unlink()
    assert read_run(RunFiles(run)).environment == {}


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", {"format": 9}, "format must be 1, got 9"),
        ("config.json", {"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ("config.json", {"steps": True}, "steps must be a whole number, got True"),
        (
            "config.json",
            {"seed": 2**63},
            "seed must be a whole number of at most 9223372036854775807, got 9",
        ),
        ("config.json", {"options": None}, "options must be an object, got None"),
        (
            "config.json",
            {"tuning": {"trials": -1, "source": None}},
            "tuning.trials must be a whole number of at least 0",
        ),
        ("config.json", {"tuning": {"trials": 1}}, "tuning.source is missing"),
        (
            "config.json",
            {"tuning": {"trials": 1, "source": None, "edge": 1}},
            "tuning.edge must be true or false, got 1",
        ),
        (
            "config.json",
            {"data": {"name": "x", "sha256": "12", "bytes": 1}},
            "data.sha256 must be 64 hexadecimal digits",
        ),
        ("result.json", {"status": "won"}, "status must be 'diverged' or 'finished', got 'won'"),
        ("result.json", {"status": "diverged"}, "final_loss must be null after divergence, got 1"),
        ("result.json", {"final_loss": None}, "final_loss must be a finite number, got None"),
        ("result.json", {"train_s": -1.0}, "train_s must be a finite number of at least 0.0, got -1.0"),
        ("result.json", {"train_s": 1e308}, r"train_s must be a finite number of at most 1e\+100, got 1e\+308"),
        (
            "result.json",
            {"final_accuracy": -1e308},
            r"final_accuracy must be a finite number of at least -1e\+100",
        ),
        ("result.json", {"final_loss": 1e308}, r"final_loss is 1e\+308, but the last evaluation in metrics.jsonl is 1"),
        ("config.json", {"options": {"lr": 0.5}}, "changed since the run began, its content belongs to a run named"),
        ("config.json", {"code": "9"}, "changed since the run began, its content belongs to a run named [0-9a-f]{16}"),
        ("result.json", {"final_loss": 1.0}, "final_loss is 1.0, but the last evaluation in metrics.jsonl is 1"),
        ("result.json", {"steps": 149}, "finished with 150 steps, but .* at step 150, the result at step 149"),
        ("config.json", {"seed": 0}, "the run is 'muon' with seed 0, study.json says 'muon' with seed 1"),
    ],
)
def test_a_damaged_run_is_named_and_does_not_spoil_the_others(
    study_dir: Path, file: str, change: dict[str, Any], message: str
) -> None:
    run = run_dir(study_dir, "muon", 1)
    edit(run / file, lambda values: values.update(change))
    study = read_study(study_dir, RaceStudy)
    assert len(study.runs) == 3
    assert re.match(rf"runs/{run.name}/{file}: .*{message}.*{DELETED}", only_problem(study))


@pytest.mark.parametrize(
    ("number", "line", "message"),
    [
        (4, "garbage", "line 4: not valid JSON"),
        (1, '{"kind": "test"}', "line 1: kind must be 'train', 'eval', 'final' or 'diagnostics', got 'test'"),
        (3, '{"kind": "train", "step": 1}', "line 3: tokens is missing"),
        (
            2,
            '{"kind": "eval", "step": 0, "tokens": 0, "loss": NaN}',
            "line 2: not valid JSON .*character .byte 49.",
        ),
        (2, '{"kind": "eval", "step": 0, "tokens": 0, "loss": 1e999}', "line 2: loss must be a finite number"),
        (
            2,
            '{"kind": "eval", "step": 0, "tokens": 0, "loss": 1, "accuracy": null, "train_s": 0}',
            "line 2: step must be larger than 0, the one before it, got 0",
        ),
        (
            2,
            '{"kind": "eval", "step": 1, "tokens": 0, "loss": 1, "accuracy": null, "train_s": 1e101}',
            r"line 2: train_s must be a finite number of at most 1e\+100, got 1e\+101",
        ),
    ],
)
def test_a_damaged_row_is_named(study_dir: Path, number: int, line: str, message: str) -> None:
    path = run_dir(study_dir, "adamw", 0) / "metrics.jsonl"
    lines = path.read_text().splitlines()
    lines[number - 1] = line
    path.write_text("\n".join(lines) + "\n")
    assert re.search(rf"metrics\.jsonl: ({message}).*{DELETED}", only_problem(read_study(study_dir, RaceStudy)))


def test_a_finished_run_needs_its_rows(study_dir: Path) -> None:
    (run_dir(study_dir, "adamw", 0) / "metrics.jsonl").unlink()
    assert re.search(rf"metrics\.jsonl: the file is missing. {DELETED}", only_problem(read_study(study_dir, RaceStudy)))


def test_a_damaged_environment_costs_only_itself(study_dir: Path) -> None:
    (run_dir(study_dir, "adamw", 0) / "environment.json").write_text("?")
    expected = r"environment\.json: not valid JSON .*Delete this file: only the description of the machine is lost\."
    assert re.search(expected, only_problem(read_study(study_dir, RaceStudy)))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


@given(value=JSON, key=st.sampled_from(["steps", "tuning", "data", "options", "seed", "code", "format", "eval_every"]))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_value_of_a_config_gets_through_as_another_kind_of_error(study_dir: Path, value: object, key: str) -> None:
    run = run_dir(study_dir, "muon", 0)
    original = (run / "config.json").read_text()
    edit(run / "config.json", lambda config: config.update({key: value}))
    study = read_study(study_dir, RaceStudy)  # raises nothing: the run is either read or listed as absent
    (run / "config.json").write_text(original)
    assert len(study.runs) + len(study.absent) == 4


def test_a_run_that_ends_at_a_loss_no_sum_can_hold_has_diverged(tmp_path: Path) -> None:
    [run] = read_study(write_study(tmp_path, {"adamw": Pace(end=1e308)}, seeds=(0,)), RaceStudy).runs
    assert run.status == "diverged"
    assert run.result is not None
    assert run.result.final_loss is None
    assert {row.loss for row in run.evals} == {None}


RESULT = Result("finished", 150, 1.73, None, 21.0, 1.2, 19.8, 123456789, "2026-01-01T00:00:00+00:00")


@pytest.mark.parametrize("change", [{}, {"status": "diverged", "final_loss": None}, {"final_accuracy": 0.5}])
def test_a_result_survives_its_file(tmp_path, change):
    result = dataclasses.replace(RESULT, **change)
    (tmp_path / "result.json").write_text(result.to_json())
    assert read_result(tmp_path / "result.json") == result


def test_no_file_is_no_result(tmp_path):
    assert read_result(tmp_path / "result.json") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [({"status": "won"}, "status must be 'diverged' or 'finished', got 'won'"), ({"format": 2}, "format must be 1")],
)
def test_a_damaged_file_is_refused(tmp_path, change, message):
    path = tmp_path / "result.json"
    path.write_text(json.dumps({**json.loads(RESULT.to_json()), **change}))
    with pytest.raises(RecordError, match=rf"result.json: {message}.*Delete this file and repeat the command"):
        read_result(path)
