"""Runs that a program lists are trained once."""

import pytest

from steepest.lab.engine.given import train_runs
from steepest.lab.runs.config import configure
from steepest.lab.runs.result import read_result
from steepest.lab.studies.study import run_directory
from steepest.lab.tasks import make_task

TASK = make_task("digits", "demo")


def test_what_is_missing_is_trained_and_what_is_there_stays(tmp_path):
    first, second = (configure(TASK, method="sgd", seed=seed, steps=2, batch_size=4) for seed in (0, 1))
    train_runs({"sgd": [first]}, tmp_path, workers=1)
    before = (run_directory(tmp_path, first) / "result.json").read_bytes()
    train_runs({"sgd": [first, second]}, tmp_path, workers=2)
    assert (run_directory(tmp_path, first) / "result.json").read_bytes() == before
    assert read_result(run_directory(tmp_path, second) / "result.json").steps == 2


def test_a_run_that_fails_is_named_with_its_reason(tmp_path):
    config = configure(TASK, method="sgd", seed=0, steps=2, options={"momentum": 0.0})  # torch refuses Nesterov then
    with pytest.raises(RuntimeError, match=rf"Not finished: .*{run_directory(tmp_path, config).name}: ValueError: "):
        train_runs({"sgd": [config]}, tmp_path, workers=1)
