import json
import subprocess
import sys

import torch

from steepest.lab.environment import describe_environment


def test_it_names_what_runs(monkeypatch):
    here = json.loads(json.dumps(describe_environment()))
    assert here["python"] == sys.version.split()[0]
    assert here["torch"] == torch.__version__
    assert here["threads"] == torch.get_num_threads()
    assert here["packages"]["torch"].startswith(torch.__version__.split("+")[0])
    assert here["cpu"]
    assert here["git_commit"] is None or len(here["git_commit"]) == 40


def test_without_git_the_commit_is_unknown(monkeypatch):
    def missing(*_: object, **__: object):
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", missing)
    assert describe_environment()["git_commit"] is None
