"""A whole race in real processes: finished runs are kept, interrupted ones go on, and nothing is lost or done twice."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from steepest.lab.disk.fields import RecordError
from steepest.lab.disk.ours import RunBusyError, locked
from steepest.lab.engine.display import StudyDisplay
from steepest.lab.engine.pool import read_progress
from steepest.lab.engine.study import FailedRunsError, default_workers, run_study
from steepest.lab.engine.worker import BUSY, INTERRUPTED
from steepest.lab.runs.config import configure, run_hash
from steepest.lab.runs.train import Training
from steepest.lab.studies.race.plan import Race
from steepest.lab.studies.study import StudyMismatchError, run_directory, write_study
from steepest.lab.tasks import make_task
from tests.cases import cases
from tests.lab.processes import ended, modified, rows_of, rows_written, steepest, wait_for, workers_of

STEPS = 120
COMMAND = ("race", "--task", "digits", "--methods", "adamw,muon", "--seeds", 1, "--steps", STEPS, "--workers", 2)


@pytest.fixture(scope="module")
def task():
    return make_task("digits", "demo")


def race(task, **changes):
    fields = {"methods": ("adamw", "muon"), "seeds": (0,), "baseline": "adamw", "options": {}, "steps": STEPS}
    return Race(task=task, **{**fields, **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted race."""
    out = tmp_path_factory.mktemp("race") / "out"
    return out, ended(steepest(*COMMAND, "--out", out))


@pytest.fixture(scope="module")
def expected(finished):
    """The numbers of the uninterrupted race."""
    return rows_of(finished[0])


@pytest.mark.slow
def test_a_race_leaves_runs_a_report_and_a_line_per_run(finished):
    out, output = finished
    assert len(list(out.glob("runs/*/result.json"))) == 2
    assert (out / "report.html").stat().st_size < 6 * 2**20
    assert len(list(out.glob("plots/*.png"))) >= 3
    assert sorted(line for line in output.splitlines() if "finished" in line) == [
        f"{method}: run 1 of 1 finished" for method in ("adamw", "muon")
    ]
    assert output.splitlines()[-1] == f"Report: {out}/report.html"


def test_methods_start_from_the_same_weights_and_see_the_same_data(task):
    starts = {}
    for seed in (0, 1):
        for method in ("adamw", "sgd", "muon", "muonadam", "adam"):
            training = Training(configure(task, method=method, seed=seed), task)
            weights = torch.cat([p.detach().flatten() for p in training.model.parameters()])
            examples = torch.cat([training.order.take(64) for _ in range(50)])
            starts.setdefault(seed, (weights, examples))
            assert torch.equal(weights, starts[seed][0])
            assert torch.equal(examples, starts[seed][1])
    assert not torch.equal(starts[0][0], starts[1][0])
    assert not torch.equal(starts[0][1], starts[1][1])


@pytest.mark.slow
def test_repeating_the_command_trains_nothing(finished):
    out, _ = finished
    before = modified(out)
    assert "finished" not in ended(steepest(*COMMAND, "--out", out))
    assert modified(out) == before


@pytest.mark.slow
def test_more_seeds_and_methods_add_only_what_is_missing(finished, expected, task):
    out, _ = finished
    before = modified(out)
    bigger = race(task, methods=("adamw", "muon", "sgd"))
    run_study(bigger, out, command="steepest race ...", workers=2, console=Console(file=io.StringIO()))
    after = modified(out)
    assert before.items() <= after.items()
    assert len(after) == 3
    write_study(out, race(task), race(task).configs(), command="steepest race ...")  # as it was, for the other tests


@pytest.mark.slow
def test_interrupted_in_every_way_a_race_ends_with_the_same_numbers(expected, tmp_path):
    out = tmp_path / "out"
    for rows, workers_too in ((0, False), (5, True)):
        process = steepest(*COMMAND, "--out", out)
        wait_for(lambda rows=rows: (out / "study.json").exists() and rows_written(out) >= rows)
        os.kill(process.pid, signal.SIGKILL)
        for worker in workers_of(out).values() if workers_too else ():
            with contextlib.suppress(ProcessLookupError):  # it may have noticed, and stopped
                os.kill(worker, signal.SIGKILL)
        process.communicate()
    process = steepest(*COMMAND, "--out", out)
    before = rows_written(out)
    wait_for(lambda: rows_written(out) > before)
    process.send_signal(signal.SIGINT)
    assert "the same command goes on from there" in ended(process, code=130)
    process = steepest(*COMMAND, "--out", out)
    wait_for(lambda: workers_of(out))
    os.kill(next(iter(workers_of(out).values())), signal.SIGKILL)
    kept = modified(out)
    ended(process)
    assert rows_of(out) == expected
    assert kept.items() <= modified(out).items()


@pytest.mark.slow
def test_a_damaged_run_is_reported_and_the_others_are_kept(finished, tmp_path, task):
    out = tmp_path / "out"
    one = race(task, methods=("adamw",), seeds=(0, 1), steps=20)
    configs = one.configs()
    write_study(out, one, configs, command="steepest race")
    broken = run_directory(out, configs[0])
    (broken / "checkpoint.pt").write_bytes(b"not a checkpoint")
    (broken / "environment.json").write_text("{}")
    with pytest.raises(FailedRunsError, match=rf"1 of 2 runs ended with an error:\n.*{broken.name}/worker\.log: .+"):
        run_study(one, out, command="steepest race", workers=2, console=Console(file=io.StringIO()))
    assert (out / "report.html").exists()
    assert (run_directory(out, configs[1]) / "result.json").exists()


def test_progress_is_read_from_the_last_whole_line(tmp_path):
    assert read_progress(tmp_path, steps=9).step == 0
    rows = [json.dumps({"kind": "train", "step": step, "loss": 1.0 / step}) + "\n" for step in range(1, 400)]
    (tmp_path / "metrics.jsonl").write_text("".join(rows) + '{"kind": "train", "st')
    assert read_progress(tmp_path, steps=1000).step == 399
    assert read_progress(tmp_path, steps=1000).loss == pytest.approx(1 / 399)
    (tmp_path / "result.json").write_text("{}")
    assert read_progress(tmp_path, steps=1000).step == 1000


@pytest.mark.slow
def test_a_display_on_a_terminal_shows_every_method(finished, task):
    out, _ = finished
    runs = {
        method: [run_directory(out, c) for c in race(task).configs() if c.method == method]
        for method in ("adamw", "muon")
    }
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120)
    with StudyDisplay(runs, steps=STEPS, console=console) as display:
        display.update()
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    for method in ("adamw", "muon "):
        assert re.search(rf"{method} .*120/120 steps loss \d\.\d+", text)
    assert re.search(r"all .*240/240 steps", text)


@pytest.mark.slow
def test_workers_exit_as_documented(finished, tmp_path, task):
    config = configure(task, method="adamw", seed=5)
    run = tmp_path / run_hash(config)
    run.mkdir()
    (run / "config.json").write_text(config.to_json())
    worker = [sys.executable, "-m", "steepest.lab.engine.worker", str(run)]
    first = subprocess.Popen(worker, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for((run / "metrics.jsonl").exists)
    first.send_signal(signal.SIGSTOP)
    second = subprocess.run(worker, capture_output=True, check=False)
    assert second.returncode == BUSY
    assert b"is being trained by process" in second.stderr
    first.send_signal(signal.SIGTERM)
    first.send_signal(signal.SIGCONT)
    first.communicate(timeout=60)
    assert first.returncode in (INTERRUPTED, 0)


def test_workers_follow_the_cores_and_the_quota_of_a_container(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    for text, expected in (("max 100000", 64), ("200000 100000", 2), ("50000 100000", 1)):
        monkeypatch.setattr(Path, "read_text", lambda _, text=text: text)
        assert default_workers() == expected


def test_two_races_in_one_directory_are_refused(tmp_path, task):
    with locked(tmp_path), pytest.raises(RunBusyError, match="is being trained by process"):
        run_study(race(task), tmp_path, command="", workers=1)


def test_a_race_that_writes_into_its_own_data_is_refused(tmp_path, task):
    with pytest.raises(StudyMismatchError, match=r"lies inside --data .*choose another"):
        run_study(race(task), tmp_path / "out", command="", workers=1, data=tmp_path)


@pytest.mark.slow
def test_no_worker_outlives_its_race(tmp_path):
    out = tmp_path / "out"
    process = steepest(*COMMAND, "--steps", 100000, "--out", out)
    wait_for(lambda: len(list(out.glob("runs/*/worker.log"))) == 2)
    os.kill(process.pid, signal.SIGKILL)  # while the workers still import
    process.communicate()
    wait_for(lambda: not workers_of(out))


@cases(
    "changes, message",
    [
        ({"methods": ("adamw", "moun")}, "Unknown method 'moun': did you mean 'muon'?"),
        ({"methods": ("adamw", "adamw")}, "A race takes each method once and at least one, got adamw, adamw"),
        ({"methods": ()}, "A race takes each method once and at least one, got none"),
        ({"baseline": "sgd"}, "The baseline 'sgd', which is not among the methods adamw, muon; add it"),
        ({"options": {"sgd": {"lr": 0.1}}}, "An option is given for 'sgd', which is not among the methods adamw, muon"),
        ({"seeds": ()}, "A race takes at least one seed, got none"),
    ],
)
def test_a_race_that_makes_no_sense_is_refused(task, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        race(task, **changes)


@pytest.mark.parametrize(("name", "value"), [("workers", 0), ("threads", -1)])
def test_numbers_below_one_are_refused(task, tmp_path, name, value):
    options = {"workers": 1, "threads": 1, name: value}
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got {value}"):
        run_study(race(task), tmp_path, command="", **options)


@pytest.mark.slow
def test_another_study_in_the_directory_is_refused(finished):
    out, _ = finished
    other = race(make_task("digits", "tiny"))
    with pytest.raises(
        StudyMismatchError, match="holds a race on 'digits' at preset 'demo', not a race on 'digits' at 'tiny'"
    ):
        write_study(out, other, other.configs(), command="")


def test_a_damaged_study_is_refused(tmp_path, task):
    (tmp_path / "study.json").write_text("{")
    with pytest.raises(RecordError, match="not valid JSON"):
        write_study(tmp_path, race(task), [], command="")
