import json
import subprocess
import sys

import pytest
import torch

from steepest.lab.runs.environment import describe_environment
from tests.cases import cases


def test_it_names_what_runs(monkeypatch):
    here = json.loads(json.dumps(describe_environment()))
    assert here["python"] == sys.version.split()[0]
    assert here["torch"] == torch.__version__
    assert here["threads"] == torch.get_num_threads()
    assert here["packages"]["torch"].startswith(torch.__version__.split("+")[0])
    assert here["cpu"]
    assert here["git_commit"] is None or len(here["git_commit"]) == 40


@pytest.mark.parametrize(("value", "workers"), [(None, None), ("1", 1), ("12", 12)])
def test_it_tells_how_many_train_at_once(monkeypatch, value, workers):
    monkeypatch.delenv("STEEPEST_WORKERS", raising=False)
    if value is not None:
        monkeypatch.setenv("STEEPEST_WORKERS", value)
    assert describe_environment()["workers"] == workers


@cases("value", ["", "0", "-1", "two", "1.5", "9" * 5000])
def test_a_number_of_workers_that_is_none_is_refused(monkeypatch, value):
    monkeypatch.setenv("STEEPEST_WORKERS", value)
    with pytest.raises(ValueError, match=f"STEEPEST_WORKERS must be a whole number of at least 1, got '{value}'"):
        describe_environment()


def test_without_git_the_commit_is_unknown(monkeypatch):
    def missing(*_: object, **__: object):
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", missing)
    assert describe_environment()["git_commit"] is None
